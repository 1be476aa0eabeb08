"""The work of `generate`: prompts in, numbered PNGs and a captioned grid out, picture by picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ldm.pipeline import Pipeline
from ldm.samplers import Snapshot
from training.commands import door
from training.drawing import adapters, cascades, compiled, controls, references, replay
from training.drawing.controls import Controls
from training.drawing.prompts import prompts_of, tell_reading
from training.drawing.references import referring_of
from training.drawing.requests import Request, ask_of, check_scale, choose, parse_also, parse_size
from training.drawing.shown import settled
from training.drawing.start import Group, Start
from training.drawing.starts import TOLD, start_of_flags, unread
from training.drawing.steering import add_weak, flags_without_use, pipeline_hashes, refuse_untaught, student_facts
from training.errors import UserError, as_user_error
from training.guarding import disk_error, make_folder, refuse_link
from training.ledger import Ledger
from training.machine import launcher, memory
from training.machine.processes import resolve, start
from training.messages import per_second, tell
from training.models.assembly import HashedPipeline, load_pipeline
from training.models.autoencoders import check_tile
from training.models.folders import name_of
from training.models.judge import Judge, load_classifier
from training.pictures import grids
from training.pictures.strips import Strip
from training.progress import Progress
from training.runs.folder import versions
from training.settings.flags import check_least

if TYPE_CHECKING:
    import argparse

    from ldm.samplers import Snapshot
    from ldm.tasks import Tasks, Watch
    from ldm.text import TextEncoder

GRID = 64  # pictures the grid shows at most


@dataclass(frozen=True)
class Drawing:
    """How every picture of this call is drawn, and what each says of it."""

    pipeline: Pipeline
    how: dict[str, Any]  # as `Pipeline.pixels` takes it
    facts: dict[str, Any]
    output: Path
    strips: bool
    chunk: int | None  # a batch to fill with copies: the same kernels, so the same bytes
    start: Start
    groups: Callable[[list[Request]], Iterator[Group]]
    controls: Controls | None
    watch: Watch | None = None
    full: int = 0  # the batch that networks are compiled for

    def draw(self, part: list[Request], told: Progress) -> None:
        """One batch, or those of it that are drawn together, written."""
        for requests, task in self.groups(part * ((self.chunk or len(part)) // len(part))):
            self._write(requests[: len(part)] if self.chunk else requests, requests, task, told)

    def _write(self, part: list[Request], batch: list[Request], task: Tasks | None, told: Progress) -> None:
        strip = Strip(self.pipeline) if self.strips else None
        before, stepped = told.done, told.by_steps(len(part), self.how["sampling"].steps)
        watch = each([watch for watch in (stepped, strip, self.watch) if watch])
        kernels, at_work = compiled.kernels(len(batch), self.full and (self.chunk or self.full))
        bf16 = torch.autocast(self.pipeline.device.type, torch.bfloat16, enabled=self.facts["precision"] == "bf16")
        with bf16, at_work:
            prompts, seeds = [r.prompt for r in batch], [self.start.seed_of(r) for r in batch]
            shown = self.controls.extras(batch, self.pipeline, self.how["size"]) if self.controls else {}
            how = {**self.how, "task": task, "watch": watch, "extras": shown}
            images = self.pipeline(prompts, seeds, batch_size=len(batch), **how)
        for index, request in enumerate(part):
            own = {"prompt": request.prompt, "seed": request.seed, "batch": len(batch)}
            own |= {"size": list(images[index].size[::-1]), self.start.fact: self.start.facts(request)}
            own |= {controls.FACT: self.controls.facts(request)} if self.controls else {}
            own["versions"] = {**self.facts["versions"], compiled.FACT: kernels}
            facts = {**self.facts, **own}
            grids.save(images[index], self.output / name(request), facts)
            if strip and strip.shots:  # of strength 0 there is no step
                make_folder(self.output / "strips")
                grids.save(strip.draw(index), self.output / "strips" / name(request), facts)
        told.at(before + len(part))


@dataclass(frozen=True)
class Drawn:
    """What a call of `generate` made: its files, and what it did not use as it was given."""

    pictures: list[Path]
    ledger: Ledger


def each(watches: list[Watch]) -> Watch | None:
    """One watch for all of them; None for none, which costs a sampling nothing."""
    if not watches:
        return None

    def watch(shot: Snapshot) -> None:
        for one in watches:
            one(shot)

    return watch


def generate(args: argparse.Namespace, opened: HashedPipeline | None = None, watch: Watch | None = None) -> Drawn:
    """Make every picture asked for; several processes share them.

    `opened`: the pipeline of --model, where it is loaded already; `watch` is called after each step of a batch.
    """
    cascades.settle(args)
    check_least(args, {"num_images": 1, "batch_size": 1, "tile": 0}, f"{door('generate --help')} says what it means")
    original, ledger = replay.recall(args) if args.like else None, Ledger()
    if not original:
        args.mixed_precision = launcher.precision(args.mixed_precision, ("no", "bf16"))
    start = start_of_flags(args, ledger)
    requests = ask_of(prompts_of(args, start.sources, ledger), args.num_images, args.seed)
    refuse_overwriting(Path(args.output), args.overwrite)
    device, rank, world = processes(args)
    compiled.check(args, device)
    memory.keep_memory()
    captions = [*(r.prompt for r in requests), args.negative_prompt, args.invert_prompt, *(c for _, c in args.also)]
    reading = partial(tell_reading, captions, ledger, aloud=rank == 0)
    own_requests = requests[rank::world]
    drawing = prepare(args, opened, device, start, requests[0], original, reading, ledger)
    drawing = replace(drawing, watch=watch, full=min(args.batch_size, len(own_requests)) if args.compile else 0)
    note_unused(args, drawing, ledger)
    doing = f"drawing, 1 of {world} processes" if world > 1 else "drawing"
    try:
        with Progress(doing, len(own_requests), aloud=rank == 0) as told:
            for first in range(0, len(own_requests), args.batch_size):
                drawing.draw(own_requests[first : first + args.batch_size], told)
    except ValueError as failure:
        raise UserError(str(failure), hint="see --help for sizes, samplers and guidance") from None
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        draw_grid(requests[:GRID], drawing.output)
        drawn = per_second(len(own_requests) * world / max(1e-9, told.seconds), "picture")
        tell(f"wrote {len(requests)} pictures ({drawn}) and {drawing.output / 'grid.png'}")
        for line in ledger.lines():
            tell(line)
    if original:
        tell(replay.verdict(original, drawing.output / name(requests[0])))
    return Drawn([drawing.output / name(request) for request in requests], ledger)


def prepare(
    args: argparse.Namespace,
    opened: HashedPipeline | None,
    device: torch.device,
    start: Start,
    first: Request,
    original: replay.Original | None,
    tell_reading: Callable[[TextEncoder], None],
    ledger: Ledger,
) -> Drawing:
    """The run loaded, and every choice made: by flags, or as `original` was drawn."""
    check_scale(args)
    also, asked = parse_also(args.also), parse_size(args.size)
    shown = controls.controls_of(args, start, asked, ledger)
    pipeline = loaded(args, opened, device, shown, chosen_tile(args, original))
    start = settled(start, pipeline, args)
    sampling, settings = choose(args, original.facts["settings"] if original else None)
    refuse_untaught(pipeline, sampling, [args.negative_prompt], bool(also))
    size = asked if asked and not start.sources else tuple(settings["sample"]["size"])
    with as_user_error("give it with --size"):
        pipeline.latent_shape(size)
    tell_reading(pipeline.text)
    facts = facts_of(args, pipeline, {"settings": settings, "also": also, "device": device.type})
    # Other ingredients than the original's are refused here, before a picture is drawn and a folder made.
    if original:
        seen = shown.facts(first) if shown else None
        replay.compare(original, facts | {start.fact: start.facts(first), controls.FACT: seen})
    # With the pipeline as it will draw: inversion must walk back the very grid that the drawing then walks.
    groups = start.tasks(pipeline, sampling, asked, ledger)
    if referring := referring_of(args):
        groups, facts = referring.around(pipeline, groups), facts | {references.FACT: referring.facts()}
    how = {"negative": args.negative_prompt, "also": also, "sampling": sampling, "size": size}
    output = Path(args.output)
    make_folder(output)
    refuse_link(output / "strips")
    # A batch of another size may take other kernels: to give the same bytes it is filled up to the original's size.
    chunk = original.facts.get("batch") if original else None
    return Drawing(pipeline, how, facts, output, args.strip, chunk, start, groups, shown)


def loaded(args: argparse.Namespace, opened: HashedPipeline | None, device: torch.device, shown: Controls | None,
           tile: int) -> HashedPipeline:
    """The pipeline with all that is put to work in it and beside it."""
    at_work = [*adapters.chosen(args), *(shown.chosen if shown else [])]
    pipeline = opened or load_pipeline(args.model, device, args.text_encoder, args.preview, at_work)
    if shown:
        shown.begin(pipeline)
    if args.weak_model:
        pipeline = add_weak(pipeline, args.weak_model, args.text_encoder)
    if args.compile:
        compiled.compile_networks(pipeline)
    judge = Judge(load_classifier(args.classifier, device)) if args.classifier else None
    return replace(pipeline, judge=judge, tile=tile)


def facts_of(args: argparse.Namespace, pipeline: HashedPipeline, own: dict[str, Any]) -> dict[str, Any]:
    """What every picture says of how it is drawn, of no start yet."""
    hashes = pipeline_hashes(pipeline)
    return {
        "settings": own["settings"],
        "negative_prompt": args.negative_prompt,
        "also": own["also"],
        **dict.fromkeys(TOLD),
        "tile": pipeline.tile,
        "precision": args.mixed_precision,
        "model": name_of(args.model),
        "hashes": hashes,
        **student_facts(pipeline, args.model),
        "preview": hashes["autoencoder"] if args.preview else None,
        adapters.FACT: adapters.facts(args),
        "versions": {**versions(), "device": own["device"]},
    }


def note_unused(args: argparse.Namespace, drawing: Drawing, ledger: Ledger) -> None:
    """Write down what was given or is drawn without being used."""
    sampling, also = drawing.how["sampling"], drawing.how["also"]
    own = unread(args, drawing.start)
    for why in [*flags_without_use(args, drawing.pipeline.text, sampling.guidance, bool(also)), *own]:
        ledger.add("ignored", "flags without use here", why)
    ledger.add("ignored", "copies that fill the batch up to the original's", count=(drawing.chunk or 1) - 1)


def chosen_tile(args: argparse.Namespace, original: replay.Original | None) -> int:
    """The side of the autoencoder's tiles in latents: --tile, else as `original` was drawn, else 0 for none."""
    tile = int(args.tile or (original.facts.get("tile", 0) if original else 0))
    check_tile(tile)
    return tile


def draw_grid(shown: list[Request], output: Path) -> None:
    """grid.png of pictures already written, each with its caption."""
    images = [Image.open(output / name(request)).copy() for request in shown]
    sheet = grids.grid(images, min(8, len(shown)), captions=[request.prompt for request in shown])
    grids.write(sheet, output / "grid.png")


def name(request: Request) -> str:
    """File names come from numbers, never from prompts; and from the picture that is drawn from, where it is of a
    folder."""
    own = f"-{Path(request.source.name).stem[:40]}" if request.source and request.source.of_folder else ""
    return f"{request.number:05d}{own}.png"


def refuse_overwriting(output: Path, allowed: bool, own: Container[str] = ()) -> None:
    """Pictures already made are never replaced unless asked; those of `own` names are not going to be."""
    try:
        there, folder = output.exists(), output.is_dir()
        holds = folder and any(path.name not in own for path in output.glob("[0-9]*.png"))
    except OSError as failure:  # a name over 255 bytes, say
        raise disk_error(output, failure) from None
    if holds and not allowed:
        raise UserError(f"{output} already holds pictures", hint="use --overwrite, or another --output")
    if there and not folder:
        raise UserError(f"{output} is a file", hint="choose another --output")


def processes(args: argparse.Namespace) -> tuple[torch.device, int, int]:
    """(device, rank, world): Accelerate only where several processes were started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        accelerator = start(args.device, autocasts=not args.like)
        return accelerator.device, accelerator.process_index, accelerator.num_processes
    launcher.tell_unused(*([launcher.PRECISION] if args.like else []))  # a picture has its own
    return resolve(args.device), 0, 1
