"""What `accelerate launch` or its config file asks for through the environment: taken, refused, or told to be unused.

Every variable that Accelerate reads is in one of three tables, and those of FSDP in a fourth, of what is done of them;
none changes a training in silence. Free of torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from training.errors import UserError
from training.messages import note

PRECISION, ACCUMULATION = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
ON = ("1", "true", "yes", "y", "t", "on")
ASKS_NOTHING = ("", "0", "false", "no", "n", "f", "off", "none", "default")

# Taken: by this program (precision, accumulation, CPU), or by Accelerate with no effect on what is computed.
TAKEN = re.compile(
    f"{PRECISION}|{ACCUMULATION}|"
    "ACCELERATE_(USE_CPU|DEBUG_MODE|DEBUG_RDV_FILE|CPU_AFFINITY|LOG_LEVEL|ENABLE_RICH|IN_TPU_POD)"
)
SHARDING = "ACCELERATE_USE_FSDP"
SHARED = "weights are shared out by --train.sharding full alone; start with torchrun, or with accelerate launch without"
# Refused where they ask for something: the training would be another one, or none. Name -> next step.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": f"{SHARED} --use_deepspeed",
    SHARDING: "only train_denoiser shares weights out; start with torchrun, or accelerate launch without --use_fsdp",
    "ACCELERATE_USE_MEGATRON_LM": f"{SHARED} --use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": f"{SHARED} --use_parallelism_config",
    "ACCELERATE_USE_TP": f"{SHARED} tensor parallelism",
    "ACCELERATE_USE_SAGEMAKER": f"{SHARED} SageMaker's launcher",
    "ACCELERATE_DYNAMO_BACKEND": "start with --dynamo_backend no; a training is compiled with --train.compile true",
    "ACCELERATE_GRADIENT_CLIPPING": "take it out of the environment; gradients are clipped with --max-grad-norm",
    "ACCELERATE_TORCH_DEVICE": "take it out of the environment; the device is chosen with --device",
}
OFF = "|0|false|no|n|f|off|none"
# What a training that shares weights out does as it is asked: name -> such values, and the next step for all others.
SHARES = {
    "FSDP_VERSION": ("2", "start with --fsdp_version 2"),
    "FSDP_SHARDING_STRATEGY": ("|full_shard|1", "start with --fsdp_sharding_strategy FULL_SHARD"),
    "FSDP_RESHARD_AFTER_FORWARD": ("|true|1|full_shard", "start with --fsdp_reshard_after_forward true"),
    "FSDP_OFFLOAD_PARAMS": (OFF, "start with --fsdp_offload_params false, on more GPUs"),
    "FSDP_AUTO_WRAP_POLICY": ("|transformer_based_wrap", "start with --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (OFF, "leave --fsdp_transformer_layer_cls_to_wrap out: a unit is a block"),
    "FSDP_STATE_DICT_TYPE": ("|sharded_state_dict", "start with --fsdp_state_dict_type SHARDED_STATE_DICT"),
    "FSDP_FORWARD_PREFETCH": (OFF, "start with --fsdp_forward_prefetch false"),
    "FSDP_BACKWARD_PREFETCH": ("|backward_pre", "start with --fsdp_backward_prefetch BACKWARD_PRE"),
    "FSDP_ACTIVATION_CHECKPOINTING": (OFF, "give --backbone.gradient_checkpointing true in its place"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (OFF, "start with --fsdp_activation_checkpointing_offload false"),
    "FSDP_IGNORED_MODULES": (OFF, "take it out of the environment: the whole network is shared out"),
}
# Without use here, as what would read them is refused above. Told where they ask for something.
UNUSED = re.compile(
    "ACCELERATE_(DEEPSPEED|FP8|DYNAMO|CONFIG_DS|SAGEMAKER)_.+|FSDP_.+|MEGATRON_LM_.+|PARALLELISM_CONFIG_.+|"
    "ACCELERATE_(ALLOW_CP_STANDALONE|BYPASS_DEVICE_MAP|DOWNCAST_BF16|INIT_INCLUDE_BUFFERS)"
)


def check(*, shards: bool = False) -> None:
    """Raise UserError (exit 2) for what the environment asks of Accelerate and this program does not do; it `shards` in
    trainings that can share weights out."""
    for name, step in REFUSED.items():
        if _asked(name) and not (shards and name == SHARDING):
            raise UserError(f"{name}={os.environ[name]} is not supported", hint=step)
    wanted = _asked(PRECISION)
    if wanted not in ("", "bf16", "fp16"):
        hint = "start with --mixed_precision bf16, fp16 or no"
        raise UserError(f"{PRECISION}={wanted} is not supported", hint=hint)


def tell_unused(*more: str) -> None:
    """Name, in the first process, the variables of Accelerate (and `more`) that ask for something and are not used."""
    used = re.compile(f"{TAKEN.pattern}|{'|'.join(REFUSED)}")
    unused = [name for name in os.environ if name.startswith("ACCELERATE_") and not used.fullmatch(name)]
    others = (name for name in os.environ if UNUSED.fullmatch(name) and name not in unused)
    unused += [name for name in others if not (_asked(SHARDING) and name.startswith("FSDP_"))]
    unused += [name for name in os.environ if name in more]
    if (asking := sorted(name for name in unused if _asked(name))) and first_process():
        note(f"not used: {', '.join(f'{name}={os.environ[name]}' for name in asking)}")


def sharding(given: str | None) -> str:
    """How weights are to be shared out: as `given` here; where nothing is, as the launcher asks; else "none".

    Raises UserError (exit 2) where both say something and differ, or where the launcher's is another kind of it.
    """
    if not _asked(SHARDING):
        return given or "none"
    if given == "none":
        what = f"--train.sharding is none here, and {SHARDING} asks for it"
        raise UserError(what, hint="give --train.sharding full, or start with accelerate launch without --use_fsdp")
    for name, (done, step) in SHARES.items():
        wanted = os.environ.get(name, "").strip()
        if not re.fullmatch(done, wanted.lower()):
            raise UserError(f"{name}={wanted} is not supported", hint=step)
    if given is None and first_process():
        note(f"--train.sharding full, as {SHARDING} asks")
    return "full"


@contextmanager
def unshared() -> Iterator[None]:
    """Inside, Accelerate is not asked to share weights out, which is done here: it would only do it on GPUs."""
    asked = os.environ.pop(SHARDING, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[SHARDING] = asked


def precision(
    given: str | None, offered: tuple[str, ...] = ("no", "bf16", "fp16"), *, shards: bool = False
) -> str:
    """The precision to compute in: the one `given` here; where none is, the launcher's; else "no".

    Raises UserError (exit 2) where both are given and differ, or where the launcher's is not `offered`.
    """
    check(shards=shards)
    wanted = _asked(PRECISION)
    if not wanted or given == wanted:
        return given or "no"
    launch = "start with accelerate launch --mixed_precision no"
    if wanted not in offered:
        raise UserError(f"{PRECISION}={wanted} is not supported here", hint=f"{launch} or {offered[-1]}")
    if given is not None:
        what = f"--mixed-precision is {given} here and {wanted} in {PRECISION}"
        raise UserError(what, hint=f"give --mixed-precision {wanted}, or {launch}")
    if first_process():
        note(f"--mixed-precision {wanted}, as {PRECISION} asks")
    return wanted


def accumulation(given: int | None) -> int | None:
    """The backward passes per optimiser step: those `given` here; where none are, more than one of the launcher.

    Raises UserError (exit 2) where both are given and differ, or where the launcher's is no number.
    """
    wanted = _asked(ACCUMULATION)
    if wanted in ("", "1", "auto"):
        return given
    if not wanted.isdecimal():
        what = f"{ACCUMULATION}={wanted}: expected a whole number"
        raise UserError(what, hint="take it out of the environment, or give --gradient-accumulation-steps")
    if given is not None and given != int(wanted):
        raise UserError(
            f"--gradient-accumulation-steps is {given} and {ACCUMULATION} {wanted}",
            hint=f"give --gradient-accumulation-steps {wanted}, or take the variable out of the environment",
        )
    if given is None and first_process():
        note(f"--gradient-accumulation-steps {wanted}, as {ACCUMULATION} asks")
    return int(wanted)


def first_process() -> bool:
    """Whether this is the process that speaks, by the launcher's count."""
    return os.environ.get("RANK", "0") == "0"


def asks_cpu() -> bool:
    """Whether the launcher asks for a CPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ON


def _asked(name: str) -> str:
    value = os.environ.get(name, "").strip().lower()
    return "" if value in ASKS_NOTHING else value
