"""The two training scripts' work: from parsed flags to a finished run."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import UserError, explained
from training.machine.processes import announce
from training.settings import decoding
from training.shards.addresses import repeated
from training.shards.index import data_facts
from training.shards.reading import held_out_shards
from training.stages.checks import check_images, check_room, check_shrinking, check_starts, layout
from training.stages.resuming import begin, open_run, resume

if TYPE_CHECKING:
    import argparse

    from accelerate import Accelerator

    from training.loop.loop import Loop
    from training.runs.folder import Run


def resolve(args: argparse.Namespace, stage: str) -> decoding.Config | None:
    """The config that the flags mean; None where it was only to be printed."""
    config = decoding.load(stage, args.config, args.overrides)
    if args.print_config:
        print(json.dumps(decoding.to_values(config), indent=1))
        return None
    return config


def train_autoencoder(args: argparse.Namespace) -> int:
    """Stage one: train, measure the latent normaliser, export. Returns the exit code."""
    return _train(args, "autoencoder", _autoencoder)


def train_denoiser(args: argparse.Namespace) -> int:
    """Stage two: train on encoded latents, export a self-contained model. Returns the exit code."""
    return _train(args, "denoiser", _denoiser)


def _train(args: argparse.Namespace, stage: str, body: Callable[[argparse.Namespace, Any, ExitStack], int]) -> int:
    """One stage's work, in which all processes end together and the run folder is given back."""
    config = resolve(args, stage)
    if config is None:
        return 0
    from training.machine.processes import together

    with together(), ExitStack() as ending:
        return body(args, config, ending)


def _autoencoder(args: argparse.Namespace, config: decoding.AutoencoderConfig, ending: ExitStack) -> int:
    from training.data.samples import Images
    from training.machine import processes
    from training.models.previews import keep_teacher, teacher_hash
    from training.models.vision import chosen, vision_hash
    from training.shards.reading import ShardSet
    from training.shards.remote import located
    from training.stages.preview import taught

    args.data = located(args.data, args.cache_dir, args.cache_size, config.train.window_shards)
    shards = ShardSet(args.data, "train")
    dataset = Images(shards, flip=config.train.flip, seed=config.train.seed, on_bad_data=args.on_bad_data)
    held_out = Images(held_out_shards(args.data))
    config, teacher = taught(args, config)
    vision = chosen(args, config)
    check_images(config, dataset)
    accelerator = processes.start(args.device, config.train.mixed_precision, compiles=config.train.compile)
    config, micro, accumulation = layout(config, args, accelerator.num_processes)
    check_starts(config)
    run = None if args.dry_run else open_run(args, "autoencoder", config, accelerator, ending)
    if run and run.finished():
        return already(run)
    stage = stage_one(args, config, dataset, held_out, teacher, vision)
    model = stage.model
    check_shrinking(config, model, accelerator.num_processes)
    what = f"{_count(model)} parameters, factor {model.factor}, {model.latent_channels} channels"
    announce(accelerator, f"autoencoder: {what}; {len(dataset):,} images")
    if run is None:
        return 0
    facts = {"data": data_facts(args.data), "teacher": teacher_hash(teacher), "vision": vision_hash(vision)}
    path = begin(args, run, accelerator, facts)
    keep_teacher(teacher, run.folder / "final", accelerator)
    loop, stopped = fit(args, stage, accelerator, run, micro, accumulation, path, facts)
    if stopped:
        return stopped
    if accelerator.is_main_process:
        export_autoencoder(stage, loop, run, facts)
    accelerator.wait_for_everyone()
    return 0


def export_autoencoder(stage: Any, loop: Loop, run: Run, facts: dict[str, Any]) -> None:
    """The last act, with the averaged weights: measure the normaliser, evaluate, export."""
    from training.models.autoencoders import autoencoder_hashes

    with loop.ema.applied():
        stage.normalise()
        numbers = stage.evaluate(_folder(run.folder / "samples" / "final"))
        facts |= {"hashes": autoencoder_hashes(stage.model), "validation": numbers}
        finish(run, stage.model.state_dict(), "Autoencoder", facts)


def stage_one(
    args: argparse.Namespace,
    config: decoding.AutoencoderConfig,
    dataset: Any,
    held_out: Any,
    teacher: Any = None,
    vision: Any = None,
) -> Any:
    """The networks and losses of stage one, freshly initialised from the seed or from another run's weights."""
    import torch

    from training.models.autoencoders import load_autoencoder
    from training.models.folders import fill
    from training.models.lpips import load_perceptual
    from training.stages.autoencoder import AutoencoderStage
    from training.stages.preview import DistillationStage

    loss, perceptual = config.loss, None
    if loss.perceptual or config.discriminator.on_features:
        perceptual = load_perceptual(loss.perceptual_net, loss.perceptual_weights, args.lpips_weights)
    torch.manual_seed(config.train.seed)
    with explained("change the config"):
        model = config.model.build()
        discriminator = config.discriminator.build(perceptual.features if perceptual else None)
    for network in (model, discriminator):  # convolutions run 10-50 % faster with channels innermost
        network.to(memory_format=torch.channels_last)
    if args.init_from:
        fill(model, load_autoencoder(args.init_from).state_dict(), Path(args.init_from))
    if teacher is not None:
        return DistillationStage(config, model, teacher, perceptual, dataset, held_out)
    return AutoencoderStage(config, model, discriminator, perceptual, dataset, held_out, vision)


def _denoiser(args: argparse.Namespace, config: decoding.DenoiserConfig, ending: ExitStack) -> int:
    from training.data.samples import Latents
    from training.machine import processes
    from training.models import assembly
    from training.shards.reading import ShardSet
    from training.shards.remote import Remote, located

    args.latents = located(args.latents, args.cache_dir, args.cache_size, config.train.window_shards)
    shards = ShardSet(args.latents, "train")
    dataset = Latents(shards, flip=config.train.flip, seed=config.train.seed, on_bad_data=args.on_bad_data)
    held_out = Latents(held_out_shards(args.latents))
    if isinstance(args.latents, Remote):
        args.latents.bring_models(text=dataset.text)
    accelerator = processes.start(args.device, config.train.mixed_precision, compiles=config.train.compile)
    config, micro, accumulation = layout(config, args, accelerator.num_processes)
    if config.sample.size == (0, 0):
        config = dataclasses.replace(
            config, sample=dataclasses.replace(config.sample, size=tuple(shards.summary["latent"]["picture"]))
        )
    run = None if args.dry_run else open_run(args, "denoiser", config, accelerator, ending)
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
        assembly.store(parts, Path(args.latents), run.folder / "final")
    loop, stopped = fit(args, stage, accelerator, run, micro, accumulation, path, facts)
    if stopped:
        return stopped
    if accelerator.is_main_process:
        with loop.ema.applied():
            assembly.export_learned(parts, run.folder / "final")
            finish(run, parts.backbone.state_dict(), "Denoiser", facts)
    accelerator.wait_for_everyone()
    return 0


def stage_two(
    args: argparse.Namespace,
    config: decoding.DenoiserConfig,
    dataset: Any,
    held_out: Any,
    run: Run | None,
    accelerator: Accelerator,
) -> tuple[Any, Any]:
    """What stage two trains with, and its stage, freshly initialised from the seed or from another run's weights."""
    import torch

    from training.models import assembly
    from training.stages.denoiser import DenoiserStage

    torch.manual_seed(config.train.seed)
    home = assembly.vocabulary_home(config.text, run.folder / "final" if run else None, args.init_from)
    with explained("change the config"):
        parts = assembly.assemble(config, Path(args.latents), dataset, home, args.text_encoder, accelerator.device)
        norm = parts.autoencoder.norm
        stage = DenoiserStage(config, parts.backbone, parts.text, norm, dataset, held_out, parts.pipeline, parts.null)
    if args.init_from:
        assembly.fill_network(parts, dataset, args.init_from)
    return parts, stage


def fit(
    args: argparse.Namespace,
    stage: Any,
    accelerator: Accelerator,
    run: Run,
    micro: int,
    accumulation: int,
    path: Path | None,
    facts: Mapping[str, Any],
) -> tuple[Loop, int]:
    """Build the loop, resume from checkpoint `path`, train. Returns the loop and the exit code of a signal, or 0."""
    from training.loop.loop import Loop

    config: Any = run.config
    loop = Loop(stage, config.train, config.optimizer, accelerator, run.folder, accumulation, micro)
    if accelerator.is_main_process:
        check_room(loop)
    start = resume(args, loop, path, accelerator)
    try:
        number = loop.fit(start)
    except UserError:
        if accelerator.is_main_process:
            with suppress(UserError):  # a full disk, say: the first reason is the one to tell
                run.describe("failed", loop.done, facts)
        raise
    if number and accelerator.is_main_process:
        run.describe("stopped", loop.done, facts)
        again = repeated([*sys.argv, *([] if args.resume == "auto" else ["--resume", "auto"])])
        stopped = f"stopped by {signal.Signals(number).name}: saved step {loop.done}"
        print(f"{stopped}; resume with: {again}", file=sys.stderr)
    return loop, 128 + number if number else 0


def finish(run: Run, tensors: Mapping[str, Any], title: str, facts: Mapping[str, Any]) -> None:
    """Export final/ and close the books."""
    from training.models.folders import card, export
    from training.runs.checkpoints import refuse_non_finite

    values = decoding.to_values(run.config)
    refuse_non_finite(tensors)
    flat = {**facts.get("validation", {}), **facts["hashes"]}
    identity = export(
        run.folder / "final", values, tensors, card(title, {"steps": run.config.train.max_steps, **flat}, values)
    )
    run.describe("finished", run.config.train.max_steps, {**facts, "model": identity})
    print(f"finished: {run.folder / 'final'}", file=sys.stderr)


def already(run: Run) -> int:
    """A finished run asked to go on is done."""
    from training.files import read_json

    print(f"{run.folder}: already complete at step {read_json(run.folder / 'run.json')['step']}", file=sys.stderr)
    return 0


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _count(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"
