"""The two training scripts' work: from parsed flags to a finished run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import config as configs
from training.errors import USAGE, UserError, explained
from training.settle import check_images, data_facts, held_out_shards, layout

if TYPE_CHECKING:
    import argparse

    from accelerate import Accelerator

    from training.loop import Loop
    from training.runs import Run


def resolve(args: argparse.Namespace, stage: str) -> configs.Config | None:
    """The config that the flags mean; None where it was only to be printed."""
    config = configs.load(stage, args.config, args.overrides)
    if args.print_config:
        print(json.dumps(configs.to_values(config), indent=1))
        return None
    source = {"autoencoder": "data", "denoiser": "latents"}[stage]
    if not getattr(args, source):
        raise UserError(f"--{source} is missing", hint=f"name the folder of shards: --{source} DIR")
    if not args.output and not args.dry_run:
        raise UserError("--output is missing", hint="name the run folder: --output runs/NAME")
    return config


def train_autoencoder(args: argparse.Namespace) -> int:
    """Stage one: train, measure the latent normaliser, export. Returns the exit code."""
    config = resolve(args, "autoencoder")
    if config is None:
        return 0
    from training import launch
    from training.data import Images
    from training.runs import autoencoder_hashes
    from training.shards import ShardSet

    assert isinstance(config, configs.AutoencoderConfig)
    shards = ShardSet(args.data, "train")
    dataset = Images(shards, flip=config.train.flip, seed=config.train.seed)
    held_out = Images(held_out_shards(args.data))
    check_images(config, dataset)
    accelerator = launch.start(args.device, config.train.mixed_precision)
    config, micro, accumulation = layout(config, args, accelerator.num_processes)
    run = None if args.dry_run else open_run(args, "autoencoder", config, accelerator)
    if run and run.finished():
        return already(run)
    stage = stage_one(args, config, dataset, held_out)
    model = stage.model
    what = f"{_count(model)} parameters, factor {model.factor}, {model.latent_channels} channels"
    announce(accelerator, f"autoencoder: {what}; {len(dataset):,} images")
    if run is None:
        return 0
    facts = {"data": data_facts(args.data)}
    path = begin(args, run, accelerator, facts)
    loop, stopped = fit(args, config, stage, accelerator, run, micro, accumulation, path)
    if stopped:
        return stopped
    if accelerator.is_main_process:
        with loop.ema.applied():
            stage.normalise()
            numbers = stage.evaluate(_folder(run.folder / "samples" / "final"))
            facts |= {"hashes": autoencoder_hashes(model), "validation": numbers}
            finish(run, model.state_dict(), "Autoencoder", facts)
    accelerator.wait_for_everyone()
    return 0


def stage_one(args: argparse.Namespace, config: configs.AutoencoderConfig, dataset: Any, held_out: Any) -> Any:
    """The networks and losses of stage one, freshly initialised from the seed or from another run's weights."""
    import torch

    from training.perceptual import load_perceptual
    from training.runs import fill, load_autoencoder
    from training.stage_one import AutoencoderStage

    torch.manual_seed(config.train.seed)
    with explained("change the config"):
        model, discriminator = config.model.build(), config.discriminator.build()
    for network in (model, discriminator):  # convolutions run 10-50 % faster with channels innermost
        network.to(memory_format=torch.channels_last)
    if args.init_from:
        fill(model, load_autoencoder(args.init_from).state_dict(), Path(args.init_from))
    loss = config.loss
    perceptual = (
        load_perceptual(loss.perceptual_net, loss.perceptual_weights, args.lpips_weights) if loss.perceptual else None
    )
    return AutoencoderStage(config, model, discriminator, perceptual, dataset, held_out)


def train_denoiser(args: argparse.Namespace) -> int:
    """Stage two: train on encoded latents, export a self-contained model. Returns the exit code."""
    config = resolve(args, "denoiser")
    if config is None:
        return 0
    from training import launch, system
    from training.data import Latents
    from training.shards import ShardSet

    assert isinstance(config, configs.DenoiserConfig)
    shards = ShardSet(args.latents, "train")
    dataset = Latents(shards, flip=config.train.flip, seed=config.train.seed)
    held_out = Latents(held_out_shards(args.latents))
    accelerator = launch.start(args.device, config.train.mixed_precision)
    config, micro, accumulation = layout(config, args, accelerator.num_processes)
    if config.sample.size == (0, 0):
        config = dataclasses.replace(
            config, sample=dataclasses.replace(config.sample, size=tuple(shards.summary["latent"]["picture"]))
        )
    run = None if args.dry_run else open_run(args, "denoiser", config, accelerator)
    if run and run.finished():
        return already(run)
    parts, stage = stage_two(args, config, dataset, held_out, run, accelerator)
    what = f"{_count(stage.network)} parameters on latents {'x'.join(map(str, parts.shape))}"
    announce(accelerator, f"denoiser: {what}; {len(dataset):,} latents")
    if run is None:
        return 0
    facts = {"data": data_facts(args.latents), "hashes": parts.hashes}
    path = begin(args, run, accelerator, facts)
    if accelerator.is_main_process:
        system.store(parts, Path(args.latents), run.folder / "final")
    loop, stopped = fit(args, config, stage, accelerator, run, micro, accumulation, path)
    if stopped:
        return stopped
    if accelerator.is_main_process:
        with loop.ema.applied():
            system.export_text(stage.network.text, run.folder / "final")
            finish(run, parts.backbone.state_dict(), "Denoiser", facts)
    accelerator.wait_for_everyone()
    return 0


def stage_two(
    args: argparse.Namespace,
    config: configs.DenoiserConfig,
    dataset: Any,
    held_out: Any,
    run: Run | None,
    accelerator: Accelerator,
) -> tuple[Any, Any]:
    """What stage two trains with, and its stage, freshly initialised from the seed or from another run's weights."""
    import torch

    from training import system
    from training.stage_two import DenoiserStage

    torch.manual_seed(config.train.seed)
    home = run.folder / "final" if run else None
    with explained("change the config"):
        parts = system.assemble(config, Path(args.latents), dataset, home, args.text_encoder, accelerator.device)
        norm = parts.autoencoder.norm
        stage = DenoiserStage(config, parts.backbone, parts.text, norm, dataset, held_out, parts.pipeline, parts.null)
    if args.init_from:
        system.fill_network(stage.network, args.init_from)
    return parts, stage


def fit(
    args: argparse.Namespace,
    config: Any,
    stage: Any,
    accelerator: Accelerator,
    run: Run,
    micro: int,
    accumulation: int,
    path: Path | None,
) -> tuple[Loop, int]:
    """Build the loop, resume from checkpoint `path`, train. Returns the loop and the exit code of a signal, or 0."""
    from training.loop import Loop

    loop = Loop(stage, config.train, config.optimizer, accelerator, run.folder, accumulation, micro)
    start = 0
    if path is not None:
        checkpoint = loop.checkpoints.load(path)
        loop.restore(checkpoint)
        start = checkpoint.step
        if start > config.train.max_steps:
            raise UserError(
                f"the run is at step {start}, past train.max_steps {config.train.max_steps}",
                hint="raise --max-steps",
                code=USAGE,
            )
        announce(accelerator, f"resumed from step {start}")
    elif args.resume:
        announce(accelerator, "note: no checkpoint yet; starting fresh")
        loop.journal.restart()
    if number := loop.fit(start):
        announce(
            accelerator, f"stopped by a signal: saved; resume with the same command and --resume auto ({run.folder})"
        )
        return loop, 128 + number
    return loop, 0


def begin(args: argparse.Namespace, run: Run, accelerator: Accelerator, facts: Mapping[str, Any]) -> Path | None:
    """Write down what the run is made of; returns the checkpoint to go on from. All that may be refused was tried."""
    from training.checkpoint import Checkpoints

    checkpoints = Checkpoints(run.folder)
    if accelerator.is_main_process:
        checkpoints.sweep()
    path = checkpoints.find(args.resume)
    if accelerator.is_main_process:
        run.same_ingredients(facts)
        run.describe("training", 0, facts)
    return path


def open_run(args: argparse.Namespace, stage: str, config: Any, accelerator: Accelerator) -> Run | None:
    """The run folder, claimed by the main process; the others only know its place."""
    from training.runs import Run

    if accelerator.is_main_process:
        run = Run(Path(args.output), stage, config, args.resume)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        run = Run.__new__(Run)
        run.folder, run.stage, run.config = Path(args.output), stage, config
    return run


def finish(run: Run, tensors: Mapping[str, Any], title: str, facts: Mapping[str, Any]) -> None:
    """Export final/ and close the books."""
    from training.checkpoint import refuse_non_finite
    from training.runs import card, export

    values = configs.to_values(run.config)
    refuse_non_finite(tensors)
    flat = {**facts.get("validation", {}), **facts["hashes"]}
    identity = export(
        run.folder / "final", values, tensors, card(title, {"steps": run.config.train.max_steps, **flat}, values)
    )
    run.describe("finished", run.config.train.max_steps, {**facts, "model": identity})
    print(f"finished: {run.folder / 'final'}", file=sys.stderr)


def already(run: Run) -> int:
    """A finished run asked to go on is done."""
    print(f"{run.folder}: already complete at step {run.config.train.max_steps}", file=sys.stderr)
    return 0


def announce(accelerator: Accelerator, text: str) -> None:
    """One line on stderr, from the main process."""
    if accelerator.is_main_process:
        print(text, file=sys.stderr, flush=True)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _count(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"
