"""What is settled before a training starts: how the batch is split, that the pictures fit, what names the data."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import config as configs
from training.errors import UserError
from training.files import check_output
from training.order import split_batch

if TYPE_CHECKING:
    from training.loop import Loop


def layout(config: Any, args: argparse.Namespace, processes: int) -> tuple[Any, int, int]:
    """(config with its settled global batch, micro-batch, accumulation)."""
    train = config.train
    batch, micro, accumulation = split_batch(
        train.batch_size,
        0 if train.micro_batch_size == "auto" else train.micro_batch_size,
        getattr(args, "gradient_accumulation_steps", None),
        processes,
        batch_given="train.batch_size" in args.overrides or "train.micro_batch_size" not in args.overrides,
    )
    return dataclasses.replace(config, train=dataclasses.replace(train, batch_size=batch)), micro, accumulation


def check_shrinking(config: configs.AutoencoderConfig, model: Any, processes: int) -> None:
    """Refuse a micro-batch "auto" where processes meet inside a backward pass, which one of them may not come to."""
    if config.train.micro_batch_size == "auto" and processes > 1 and model.quantize:
        raise UserError(
            f"--micro-batch-size auto: not with several processes and a {config.model.kind} model,"
            " whose loss is taken over all of them",
            hint="give a number",
        )


def data_facts(folder: str) -> dict[str, Any]:
    """What names the data of a run: the hash of its index."""
    from training.files import file_sha256

    return {"index_sha256": file_sha256(Path(folder) / "index.json")}


def check_images(config: configs.AutoencoderConfig, dataset: Any) -> None:
    """Refuse pictures that the networks cannot take, before anything is built."""
    height, width = dataset[0].data.shape[-2:]
    factor, smallest = config.model.factor, config.discriminator.smallest_image
    if height % factor or width % factor:
        raise UserError(
            f"the packed pictures are {width}x{height}, not divisible by the autoencoder's factor {factor}",
            hint=f"pack again with --resolution {max(factor, height // factor * factor)}"
            f" or {(height // factor + 1) * factor}, or choose another config",
        )
    if config.loss.adversarial and min(height, width) < smallest:
        critic = config.discriminator
        raise UserError(
            f"the packed pictures are {width}x{height}, the discriminator needs {smallest} pixels a side",
            hint="set discriminator.kind to patch"
            if critic.on_features
            else f"lower discriminator.layers (now {critic.layers})",
        )


def held_out_shards(folder: str) -> Any:
    """The val split, or where there is none the training split, said aloud."""
    from training.shards import ShardSet, read_index

    splits = {info.split for info in read_index(folder)[1]}
    name = next((s for s in ("val", "test") if s in splits), "train")
    if name == "train":
        print(
            "warning: the data has no val split; validation looks at training images (pack with --val-fraction)",
            file=sys.stderr,
        )
    return ShardSet(folder, name)


def check_starts(config: configs.AutoencoderConfig) -> None:
    """Say aloud where a part of the losses begins only after the run has ended."""
    for key in ("discriminator_start", "adversarial_start"):
        start = getattr(config.loss, key)
        if config.loss.adversarial and start >= config.train.max_steps:
            print(
                f"warning: loss.{key} {start} is not before train.max_steps {config.train.max_steps}: it never begins",
                file=sys.stderr,
            )


def check_room(loop: Loop) -> None:
    """Refuse, before the first step, a disk that cannot hold the checkpoints kept and the one being written.

    Raises UserError (exit 6) with what is needed and what is free.
    """
    trained = [p for network in loop.stage.networks.values() for p in network.parameters() if p.requires_grad]
    states = [value for network in loop.stage.networks.values() for value in network.state_dict().values()]
    held = [*states, *loop.ema.shadow.values(), *loop.powers.tensors().values(), *trained, *trained]  # two moments
    size = sum(value.nbytes for value in held)
    folder = loop.checkpoints.folder
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    check_output(loop.run, max(size, 3 * size - there))
