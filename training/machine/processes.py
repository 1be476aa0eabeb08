"""Processes, devices and memory of a run: Accelerate's set-up, checked, and the allocator tuned for training."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from training.errors import LOST, USAGE, UserError
from training.machine import launcher, meeting
from training.machine.compiling import check_compiler
from training.machine.meeting import is_distributed as is_distributed
from training.machine.meeting import meet as meet
from training.machine.memory import allow_open_files, keep_memory
from training.messages import tell

if TYPE_CHECKING:
    from accelerate import Accelerator

DEVICES = "use auto, cpu, cuda, cuda:N or mps"
PEER = re.compile("gloo|nccl|peer|connection (closed|reset|refused)|broken pipe|socket|failed to recv", re.IGNORECASE)


def start(
    device: str = "auto",
    mixed_precision: str | None = None,
    *,
    compiles: bool = False,
    autocasts: bool = False,
    shards: bool = False,
) -> Accelerator:
    """The Accelerator of this process, the same under python, torchrun and accelerate launch, on CPU (gloo) and GPU.

    A door that `autocasts` itself takes the launcher's precision into account, and one with a `mixed_precision`; one
    that `shards` has taken into account whether weights are to be shared out.
    Raises UserError for a device, precision or (where the run `compiles`) compiler that is not there, for what the
    launcher asks and is not done here, and where processes were started but not joined.
    """
    launcher.check(shards=shards)
    keep_memory()
    allow_open_files()
    torch.set_flush_denormal(True)  # denormals slow a CPU 50-fold and mean nothing here
    target = resolve(device)
    _check_target(target, mixed_precision or "no")
    if compiles:
        check_compiler(target)
    if target.type == "cuda" and target.index is not None:
        torch.cuda.set_device(target)
    accelerator = _accelerator(mixed_precision or "no", on_cpu=target.type == "cpu")
    launcher.tell_unused(*([] if mixed_precision or autocasts else [launcher.PRECISION]))
    return accelerator


def choose_kernels(*, tf32: bool, benchmark: bool) -> None:
    """Let the kernels of CUDA devices be faster and other in their last bits; else they are as torch has them."""
    if tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if benchmark:
        torch.backends.cudnn.benchmark = True


def _check_target(target: torch.device, mixed_precision: str) -> None:
    """Refuse a precision that the device lacks, and GPUs that do not suffice for the processes."""
    if target.type == "cpu":
        if mixed_precision == "fp16":
            raise UserError("--mixed-precision fp16 needs a GPU", hint="use --mixed-precision no on a CPU", code=USAGE)
        return
    if target.type == "mps":
        return _check_mps(mixed_precision)
    if mixed_precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise UserError("this GPU does not support bf16", hint="use --mixed-precision fp16 or no", code=USAGE)
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > 1 and target.index is not None:
        hint = "use --device cuda: each process takes the GPU of its number"
        raise UserError(f"--device {target} names one GPU for {processes} processes", hint=hint, code=USAGE)
    if processes > gpus:
        hint = f"start {gpus} a machine, or use --device cpu"
        raise UserError(f"{processes} processes were started for {gpus} GPU(s)", hint=hint, code=USAGE)


def _check_mps(mixed_precision: str) -> None:
    """Refuse what an Apple GPU is not used for here: scaled gradients, and several processes."""
    if mixed_precision == "fp16":
        hint = "use --mixed-precision bf16 or no"
        raise UserError("--mixed-precision fp16 needs a CUDA device", hint=hint, code=USAGE)
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        what = "--device mps: a machine has one such device, and several processes were started"
        raise UserError(what, hint="start one process, or use --device cpu", code=USAGE)


def _accelerator(mixed_precision: str, *, on_cpu: bool) -> Accelerator:
    """Join the other processes, if there are any, and refuse to go on without them."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    meeting.join("gloo" if on_cpu else "nccl")
    with launcher.unshared():
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=on_cpu,
            # As a plugin: a plain number gives way to one in the environment, by which gradients would be divided.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=meeting.COLLECTIVE)],
        )
    launch_count = int(os.environ.get("WORLD_SIZE", "1"))
    if launch_count != accelerator.num_processes:
        raise UserError(
            f"{launch_count} processes were started but only {accelerator.num_processes} is in the group",
            hint="start with torchrun or accelerate launch, and with ACCELERATE_USE_CPU=true on CPUs",
            code=USAGE,
        )
    if on_cpu and launch_count == 1 and {"ACCELERATE_DYNAMO_BACKEND", "MASTER_PORT"} <= os.environ.keys():
        # Without MPI, `accelerate launch --cpu --num_processes N` starts one process, and names the port it would join.
        raise UserError(
            "accelerate launch --cpu was asked for several processes but started only 1",
            hint="for N processes on a CPU: torchrun --nproc-per-node N SCRIPT FLAGS; "
            "for one: --num_processes 1, and no MASTER_PORT in the environment",
            code=USAGE,
        )
    return accelerator


@contextmanager
def together() -> Iterator[None]:
    """Inside, what ends one process ends all, with one message and one exit code.

    Whoever fails first says why, and leaves it in the store that the processes met at; the others, who fail on the
    lost connection or for the same reason, leave quietly with the same code.
    """
    try:
        yield
    except Exception as failure:
        if not is_distributed():
            raise
        if is_lost_connection(failure):
            failure = meeting.lost("the connection to it broke")
        code = failure.code if isinstance(failure, UserError) else LOST
        record = json.dumps([torch.distributed.get_rank(), code])
        first = _claim(record)
        if first == record:
            raise failure from None
        raise SystemExit(json.loads(first)[1]) from None


def end_all(code: int) -> None:
    """Have the other processes, which wait for this one inside `together`, end with `code`, as it is about to."""
    if is_distributed():
        _claim(json.dumps([torch.distributed.get_rank(), code]))


def is_lost_connection(failure: Exception) -> bool:
    """Whether a failure is that of the connection to another process."""
    return is_distributed() and isinstance(failure, RuntimeError) and PEER.search(str(failure)) is not None


def _claim(record: str) -> str:
    """What the first process to fail left in the store; `record` where that is this one or where the store is gone."""
    try:
        return str(meeting.store().compare_set(meeting.FAILURE, "", record).decode())
    except (RuntimeError, ValueError):
        return record


def resolve(device: str) -> torch.device:
    """`auto` (a CUDA device, else Apple's, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps` as a torch device.

    Raises UserError for one that is absent or not supported.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        found = [name for name, is_there in there.items() if is_there and not launcher.asks_cpu()]
        return torch.device(found[0] if found else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: unknown device", hint=DEVICES) from None
    if target.type not in ("cpu", *there) or (target.type != "cuda" and target.index):
        what = f"--device {device}: not supported; programs here compute on the CPU, CUDA devices and Apple's (mps)"
        raise UserError(what, hint="use --device auto")
    if target.type == "mps" and not there["mps"]:
        raise UserError(f"--device {device}: no Apple GPU (torch {torch.__version__})", hint="use --device cpu")
    if target.type == "cuda" and not (there["cuda"] and (target.index or 0) < torch.cuda.device_count()):
        raise UserError(f"--device {device}: no CUDA device (torch {torch.__version__})", hint="use --device cpu")
    if target.type != "cpu" and launcher.asks_cpu():
        what = f"--device {device} is asked for here, a CPU by ACCELERATE_USE_CPU"
        raise UserError(what, hint="use --device cpu, or take the variable out of the environment")
    return target if target.type == "cuda" else torch.device(target.type)


def announce(accelerator: Accelerator, text: str, speak: Callable[[object], None] = tell) -> None:
    """One line on stderr, from the main process; `speak` is `warn` for a warning."""
    if accelerator.is_main_process:
        speak(text)
