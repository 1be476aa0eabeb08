"""Checks before a training starts: how the batch is split, whether pictures, losses and disk fit."""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
from collections.abc import Mapping
from hashlib import sha256
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.order import order_of, split_batch
from training.errors import UserError
from training.guarding import check_output
from training.loop.ema import averaged_parameters
from training.machine.launcher import first_process
from training.messages import note, warn
from training.models.lpips import LPIPS_NEEDS, fitting
from training.settings import decoding
from training.settings.sections import Loss, Train
from training.shards.index import data_facts

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.loop.loop import Loop
    from training.loop.stage import Stage
    from training.stages.job import Job


def layout(config: Any, args: argparse.Namespace, processes: int) -> tuple[Any, int, int]:
    """(config with its settled global batch, micro-batch, accumulation); says aloud what of its losses the split of the
    batch decides.
    """
    train = config.train
    batch, micro, accumulation = split_batch(
        train.batch_size,
        0 if train.micro_batch_size == "auto" else train.micro_batch_size,
        getattr(args, "gradient_accumulation_steps", None),
        processes,
        explicit_batch="train.batch_size" in args.overrides or "train.micro_batch_size" not in args.overrides,
    )
    coupled = (getattr(config, name, None) for name in ("objective", "representation"))
    if micro % (group := math.lcm(*(getattr(part, "group", 1) for part in coupled))):
        what = f"train.micro_batch_size is {micro}, and {group} samples at a time are held against each other"
        raise UserError(what, hint=f"--batch-size and --micro-batch-size must be multiples of {group}")
    if (parts := batch_coupled_parts(config, accumulation, processes)) and first_process():
        shares = f"{processes} process(es) and {accumulation} micro-batch(es) each"
        what = f"{' and '.join(parts)} depend on how a batch is split, here over {shares}"
        warn(f"{what}: another split trains another model")
    return dataclasses.replace(config, train=dataclasses.replace(train, batch_size=batch)), micro, accumulation


def shared_facts(job: Job, accelerator: Accelerator) -> dict[str, Any]:
    """All that the processes of a training must have in common: settings, data, software. Compared by the whole value.

    Not the number of loader processes, nor where data and run lie, which machines may have otherwise.
    """
    values = decoding.to_values(job.config)
    facts = {f"{section}.{key}": v for section, part in values.items() for key, v in part.items()}
    del facts["train.num_workers"]
    names = ("resume", "on_bad_data", "gradient_accumulation_steps", "allow_batch_change", "dry_run")
    facts |= {f"--{name.replace('_', '-')}": getattr(job.args, name, None) for name in names}
    data = data_facts(job.dataset.shards.directory)["index_sha256"]
    return facts | {"data": data, "device": accelerator.device.type, **software()}


def software() -> dict[str, str]:
    """The versions that a training depends on, and the hash of this project's own code."""
    packages = {name: version(name) for name in ("torch", "accelerate", "numpy")}
    code = sha256()
    for package in ("autoencoder", "ldm", "training"):
        home = Path(str(resources.files(package)))
        for file in sorted(home.rglob("*.py")):
            code.update(file.relative_to(home).as_posix().encode() + file.read_bytes())
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, **packages, "code": code.hexdigest()[:12]}


def batch_coupled_parts(config: Any, accumulation: int, processes: int) -> list[str]:
    """What sees no more than a part of a global batch that is split so; all else trains the same under every split."""
    if not isinstance(config, decoding.AutoencoderConfig):
        return []
    norm = config.loss.adversarial and getattr(config.discriminator, "norm", "") == "batch"
    parts = ["the statistics of discriminator.norm batch"] if norm and accumulation * processes > 1 else []
    if config.model.kind == "lfq" and config.model.entropy and accumulation > 1:  # processes share theirs
        parts.append("the batch entropy of model.kind lfq")
    return parts


def check_batch(dataset: Any, train: Train) -> None:
    """Refuse fewer samples than one global batch, while no folder is claimed yet."""
    order_of(dataset, train.batch_size, train.seed)


def check_shrinking(config: decoding.AutoencoderConfig, model: Any, processes: int) -> None:
    """Refuse a micro-batch "auto" where processes meet inside a backward pass, which one of them may not come to."""
    if config.train.micro_batch_size == "auto" and processes > 1 and model.quantize:
        raise UserError(
            f"--micro-batch-size auto: not with several processes and a {config.model.kind} model,"
            " whose loss is taken over all of them",
            hint="give a number",
        )


def settle_channels(config: decoding.AutoencoderConfig, channels: int, given: Mapping[str, Any]) -> Any:
    """The config with the channels of the packed pictures in each network, where neither file nor flag names others."""
    for name in ("model", "discriminator"):
        part = getattr(config, name)
        plain = {field.name: field.default for field in dataclasses.fields(part)}.get("image_channels", channels)
        if plain == getattr(part, "image_channels", channels) != channels and f"{name}.image_channels" not in given:
            note(f"{name}.image_channels is {channels}, as in the packed pictures")
            config = dataclasses.replace(config, **{name: dataclasses.replace(part, image_channels=channels)})
    return config


def check_sharding(config: Any) -> None:
    """Refuse to share out the weights of what is not one denoiser that learns alone. Raises UserError."""
    if config.train.sharding == "none":
        return
    adapter, objective = getattr(config, "adapter", None), getattr(config, "objective", None)
    if isinstance(config, decoding.AutoencoderConfig):
        why = "an autoencoder, which is balanced against its critic by gradients within it"
    elif adapter and adapter.kind != "none":
        why = "an adapter, whose base would still be whole in every process"
    elif objective is None or objective.reading is not None:
        why = f"objective.kind {objective and objective.kind}, which asks several networks"
    elif config.optimizer.matrices == "muon":
        why = "optimizer.matrices muon, which turns whole matrices"
    else:
        return
    raise UserError(f"train.sharding full: not with {why}", hint="leave it out, or give --train.sharding none")


def check_images(config: decoding.AutoencoderConfig, dataset: Any) -> None:
    """Refuse pictures that the networks cannot take, before anything is built: in buckets, those of any."""
    channels, height, width = dataset[0].data.shape[-3:]
    for rows, columns in dataset.sizes or [(height, width)]:
        _check_size(config, channels, rows, columns, in_buckets=bool(dataset.sizes))


def _check_size(
    config: decoding.AutoencoderConfig, channels: int, height: int, width: int, *, in_buckets: bool
) -> None:
    factor, loss, critic = config.model.factor, config.loss, config.discriminator
    actual = f"the packed pictures {'of a bucket ' * in_buckets}are {width}x{height}"
    critics = [("discriminator", critic)] if loss.adversarial else []
    for name, part in [("model", config.model), *critics]:
        if (channels_needed := getattr(part, "image_channels", channels)) != channels:
            what = f"{name}.image_channels is {channels_needed}, the packed pictures have {channels}"
            raise UserError(what, hint=f"set {name}.image_channels to {channels}")
    if height % factor or width % factor:
        raise UserError(
            f"{actual}, not divisible by the autoencoder's factor {factor}",
            hint=f"pack again with --bucket-step {factor} or a multiple of it, or choose another config"
            if in_buckets
            else f"pack again with --resolution {max(factor, height // factor * factor)}"
            f" or {(height // factor + 1) * factor}, or choose another config",
        )
    if critics and min(height, width) < critic.smallest_image:
        raise UserError(
            f"{actual}, the discriminator needs {critic.smallest_image} pixels a side",
            hint="set discriminator.kind to patch"
            if critic.on_features
            else f"lower discriminator.layers (now {critic.layers})",
        )
    least = LPIPS_NEEDS[loss.perceptual_net]
    if loss.perceptual and min(height, width) < least:
        nets = " or ".join(fitting(min(height, width)))
        raise UserError(
            f"{actual}, LPIPS on {loss.perceptual_net} needs {least} pixels a side",
            hint=(f"set loss.perceptual_net to {nets}, or" if nets else "set") + " loss.perceptual to 0",
        )


def check_starts(config: decoding.AutoencoderConfig) -> None:
    """Say aloud where a part of the losses begins only after the run has ended."""
    for key in ("discriminator_start", "adversarial_start"):
        start = getattr(config.loss, key)
        if config.loss.adversarial and start >= config.train.max_steps:
            warn(f"loss.{key} {start} is not before train.max_steps {config.train.max_steps}: it never begins")


def checkpoint_bytes(stage: Stage, train: Train) -> int:
    """What one checkpoint of a stage takes: weights and buffers, averages in float32, two moments of what learns."""
    learning = [p for network in stage.networks.values() for p in network.parameters() if p.requires_grad]
    states = [value for network in stage.networks.values() for value in network.state_dict().values()]
    averaged = averaged_parameters(stage.averaged).values()
    powers = len(train.ema_lengths) * sum(p.numel() for p in averaged if p.requires_grad)
    averages = 4 * (sum(p.numel() for p in averaged) + powers)
    return sum(int(value.nbytes) for value in [*states, *learning, *learning]) + averages


def check_room(loop: Loop) -> None:
    """Refuse, before the first step, a disk that cannot hold the checkpoints kept and the one being written.

    Raises UserError (exit 6) with what is needed and what is free.
    """
    size = checkpoint_bytes(loop.stage, loop.train)
    folder = loop.checkpoints.folder
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    check_output(loop.run, max(size, 3 * size - present))


def check_returns(loss: Loss, train: Train) -> None:
    """Refuse settings under which no good state would be there to return to. Raises UserError."""
    if not (loss.return_margin and loss.adversarial):
        return
    if not train.keep_best or train.sample_every % train.save_every:
        raise UserError(
            "loss.return_margin needs a checkpoint of every validation and the best kept, but train.sample_every is "
            f"{train.sample_every}, train.save_every {train.save_every}, keep_best {str(train.keep_best).lower()}",
            hint="set train.keep_best true and train.save_every to train.sample_every or a divisor of it",
        )
    if loss.adversarial_start < train.sample_every:
        raise UserError(
            f"loss.return_margin needs a validation before loss.adversarial_start {loss.adversarial_start}, "
            f"but train.sample_every is {train.sample_every}",
            hint="lower train.sample_every, or start the adversarial gradient later",
        )
