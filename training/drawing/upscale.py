"""The work of `upscale`: small pictures in, large ones out, and how true each is to what it was made of.

All pictures are looked at before one is drawn, and those that the same command drew before are kept: what takes hours
ends at nothing that could be known at its start, and goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor

from ldm.image_tasks import stacked
from ldm.pipeline import Pipeline, Sampling
from ldm.upscaling import canvas, larger, low_res_of, projected, residual, upscaling
from training.drawing import adapters
from training.drawing.generate import name, refuse_overwriting
from training.drawing.given import Given, given, instead
from training.drawing.prompts import tell_reading
from training.drawing.replay import LARGEST_PICTURE
from training.drawing.requests import Request, choose
from training.drawing.start import source_of
from training.drawing.steering import pipeline_hashes, refuse_untaught, student_facts
from training.errors import DATA, UserError, as_user_error
from training.files import finite, write_json
from training.guarding import make_folder
from training.ledger import Ledger
from training.machine.processes import resolve
from training.messages import answer, per_second, tell
from training.models.assembly import load_pipeline
from training.models.autoencoders import check_tile
from training.models.folders import name_of
from training.packing.problems import Problems
from training.pictures import grids
from training.progress import Progress
from training.runs.folder import versions
from training.settings.flags import check_least

if TYPE_CHECKING:
    import argparse

FACT = "upscale"  # the key under which a picture tells of it
WRITTEN = "upscaled.json"


@dataclass(frozen=True)
class Upscaler:
    """A model, and how it makes pictures larger."""

    pipeline: Pipeline
    factor: int
    sampling: Sampling
    args: argparse.Namespace
    facts: dict[str, Any]  # that all pictures share

    def told(self, request: Request) -> dict[str, Any]:
        """What a picture says of how it is made, but for what is known when it is drawn: its size and residual."""
        args, source = self.args, source_of(request)
        own = {"sha256": source.sha256, "name": source.name, "factor": self.factor, "level": args.level,
               "windows": args.windows, "consistent": args.consistent}
        return self.facts | {"prompt": request.prompt, "seed": request.seed, FACT: own}

    def draw(self, requests: Sequence[Request], small: Tensor, told: Progress) -> tuple[Tensor, Tensor]:
        """Large pictures of small ones, all uint8 and of one size, each the mean of its draws; and their residuals."""
        args, factor = self.args, self.factor
        whole = larger(self.pipeline, args.windows, (small.shape[-2], small.shape[-1]))
        task = upscaling(whole, small, level=args.level, consistent=args.consistent)
        total = torch.zeros(())
        for draw in range(args.samples):
            seeds = [request.seed + draw for request in requests]
            watch = told.by_steps(len(requests), self.sampling.steps)
            before = told.done
            with torch.autocast(whole.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                parts = list(whole.pixels([r.prompt for r in requests], seeds, negative=args.negative_prompt, task=task,
                                          sampling=self.sampling, batch_size=len(requests), watch=watch))
            total = total + torch.cat(parts).cpu().float()
            told.at(before + len(requests))
        made = (total / args.samples).round().to(torch.uint8)
        made = projected(made, small, factor) if args.consistent else made
        return made, residual(made, small, factor)

    def tell_size(self, size: tuple[int, int], ledger: Ledger) -> None:
        """Write down how a small picture of (width, height) is drawn that is not of the trained size."""
        width, height = size
        rows, columns = canvas(self.pipeline, (height, width))
        if (rows, columns) != (height, width):
            ledger.add("replaced", "pictures continued by their reflection to a canvas that fits, then cut back",
                       f"{width}x{height} to {columns}x{rows}")


def upscale(args: argparse.Namespace) -> list[Path]:
    """Make every picture larger, write it with how it was made, and tell how true each is."""
    check_least(args, {"samples": 1, "batch_size": 1, "tile": 0})
    check_tile(args.tile)
    ledger, problems, output = Ledger(), Problems(), Path(args.output)
    sources = given("FILE|DIR", args.pictures, ledger, problems)
    upscaler = opened(args)
    channels = upscaler.pipeline.autoencoder.image_channels
    requests = requests_of(args, usable(sources, channels, upscaler.factor, args, ledger, problems), ledger)
    rows = {} if args.overwrite else written(requests, upscaler, output)
    refuse_overwriting(output, args.overwrite, rows)
    missing = [request for request in requests if name(request) not in rows]
    tell_reading([*(r.prompt for r in requests), args.negative_prompt], ledger, upscaler.pipeline.text)
    make_folder(output)
    with as_user_error("see --help for levels, windows, samplers and guidance"), Progress(
            "upscaling", len(missing) * args.samples) as told:
        for part, small in batches(missing, channels, args.batch_size):
            upscaler.tell_size((small.shape[-1], small.shape[-2]), ledger)
            made, off = upscaler.draw(part, small, told)
            for request, image, found in zip(part, grids.to_pil(made), off.tolist(), strict=True):
                rows[name(request)] = write(request, image, found, output, upscaler)
    finish({name(request): rows[name(request)] for request in requests}, len(missing), output, ledger, told.seconds)
    return [output / name(request) for request in requests]


def opened(args: argparse.Namespace) -> Upscaler:
    """The model, and how it draws. Raises UserError for one that enlarges no pictures."""
    at_work = adapters.chosen(args)
    pipeline = load_pipeline(args.model, resolve(args.device), args.text_encoder, adapters=at_work)
    with as_user_error("name a run that enlarges pictures: --model RUN"):
        factor = low_res_of(pipeline).factor
    sampling, settings = choose(args)
    refuse_untaught(pipeline, sampling, [args.negative_prompt])
    facts = {
        "settings": settings, "negative_prompt": args.negative_prompt, "tile": args.tile,
        "precision": args.mixed_precision, "model": name_of(args.model), "hashes": pipeline_hashes(pipeline),
        "versions": {**versions(), "device": pipeline.device.type}, "samples": args.samples,
        adapters.FACT: adapters.facts(args), **student_facts(pipeline, args.model),
    }  # fmt: skip
    return Upscaler(dataclasses.replace(pipeline, tile=args.tile), factor, sampling, args, facts)


def usable(sources: Sequence[Given], channels: int, factor: int, args: argparse.Namespace, ledger: Ledger,
           problems: Problems) -> list[tuple[int, Given]]:
    """The pictures that can be enlarged, with their numbers; others follow `--on-bad-data`. Raises UserError where that
    is "error" and there are some, and where nothing is left."""
    if sources and not sources[0].of_folder:
        check_large(sources[0].decoded(channels, ledger), factor)
        return [(0, sources[0])]
    found = []
    for number, source in enumerate(sources):
        try:
            check_large(source.read(channels, ledger), factor)
            found.append((number, source))
        except UserError as problem:
            problems.add(source.name, problem.what, instead(problem))
            ledger.add("left out", problem.what, source.name)
    if args.on_bad_data == "error":
        problems.refuse()
    if not found:
        raise UserError("no picture is left that could be enlarged", hint="give others", code=DATA)
    return found


def check_large(picture: Image, factor: int) -> None:
    """Raises UserError for a picture that is too large to be drawn once it is enlarged."""
    if picture.width * picture.height * factor**2 > LARGEST_PICTURE:
        what = f"picture of more than {LARGEST_PICTURE:,} pixels once it is enlarged"
        raise UserError(f"{what} ({picture.width}x{picture.height})", hint="cut it into smaller ones", code=DATA)


def requests_of(args: argparse.Namespace, sources: Sequence[tuple[int, Given]], ledger: Ledger) -> list[Request]:
    """Each picture once, with `--prompt` or the first caption beside it; without either the empty caption, told."""
    requests = []
    for number, source in sources:
        captions = (args.prompt,) if args.prompt is not None else source.captions
        if not captions:
            ledger.add("guessed", "picture without a caption, the empty one taken: --prompt gives one", source.name)
        if captions[1:]:
            ledger.add("ignored", "captions after a picture's first", source.name, len(captions) - 1)
        requests.append(Request(number, captions[0] if captions else "", args.seed, source))
    return requests


def batches(requests: Sequence[Request], channels: int, batch_size: int) -> Iterator[tuple[list[Request], Tensor]]:
    """Pictures one after another that are of one size, at most a batch of them, decoded again: all of them at once, as
    they were looked at, would fill the memory."""
    for first in range(0, len(requests), batch_size):
        decoded = [(request, source_of(request).decoded(channels, Ledger()))
                   for request in requests[first : first + batch_size]]
        for _, group in groupby(decoded, lambda pair: pair[1].size):
            part, images = (list(each) for each in zip(*group, strict=True))
            yield part, stacked(images, channels)


def write(request: Request, image: Image, off: float, output: Path, upscaler: Upscaler) -> dict[str, Any]:
    """One picture with how it was made; what the summary says of it."""
    size, facts = [image.height, image.width], upscaler.told(request)
    facts[FACT]["residual"] = round(off, 4)
    grids.save(image, output / name(request), facts | {"size": size})
    return row(facts | {"size": size})


def row(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary says of a picture."""
    return {"picture": facts[FACT]["name"], "size": facts["size"], "residual": facts[FACT]["residual"]}


def written(requests: Sequence[Request], upscaler: Upscaler, output: Path) -> dict[str, dict[str, Any]]:
    """Files of this output that the same command made of the same pictures before it was stopped, each with its row."""
    found = {}
    for request in requests:
        with suppress(OSError, SyntaxError, ValueError, LookupError, AttributeError):  # not there, or none of ours
            facts = grids.facts(output / name(request))
            own = json.loads(json.dumps(finite(upscaler.told(request))))
            told = {**facts, FACT: {key: value for key, value in facts[FACT].items() if key != "residual"}}
            if all(told[key] == value for key, value in own.items() if key != "versions"):
                found[name(request)] = row(facts)
    return found


def finish(rows: dict[str, dict[str, Any]], drawn: int, output: Path, ledger: Ledger, seconds: float) -> None:
    """Tell and store the residuals, and what was not used as it was given."""
    mean = sum(told["residual"] for told in rows.values()) / len(rows)
    write_json(output / WRITTEN, {"pictures": rows, "residual": round(mean, 4), "ledger": ledger.report()})
    for file, told in rows.items():
        height, width = told["size"]
        answer(f"{file} {width}x{height}: means over squares {told['residual']:.2f}/255 from {told['picture']}")
    kept = f", kept {len(rows) - drawn} that were there" if len(rows) > drawn else ""
    tell(f"wrote {drawn} pictures ({per_second(drawn / max(1e-9, seconds), 'picture')}) to {output}{kept}, "
         f"on average {mean:.2f}/255 from the small ones")
    for line in ledger.lines():
        tell(line)
