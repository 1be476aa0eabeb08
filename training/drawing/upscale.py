"""The work of `upscale`: small pictures in, large ones out, and how true each is to what it was made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
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
from training.drawing.generate import name, refuse_overwriting
from training.drawing.given import Given, given
from training.drawing.prompts import tell_reading
from training.drawing.replay import LARGEST_PICTURE
from training.drawing.requests import Request, choose
from training.drawing.start import source_of
from training.drawing.steering import pipeline_hashes
from training.errors import DATA, UserError, as_user_error
from training.files import write_json
from training.guarding import make_folder
from training.ledger import Ledger
from training.machine.processes import resolve
from training.messages import answer, per_second, tell
from training.models.assembly import load_pipeline
from training.models.autoencoders import check_tile
from training.models.folders import name_of
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
    ledger, output = Ledger(), Path(args.output)
    requests = requests_of(args, given("FILE|DIR", args.pictures, ledger), ledger)
    refuse_overwriting(output, args.overwrite)
    pipeline = load_pipeline(args.model, resolve(args.device), args.text_encoder)
    with as_user_error("name a run that enlarges pictures: --model RUN"):
        factor = low_res_of(pipeline).factor
    sampling, settings = choose(args)
    tell_reading([*(r.prompt for r in requests), args.negative_prompt], ledger, pipeline.text)
    upscaler = Upscaler(dataclasses.replace(pipeline, tile=args.tile), factor, sampling, args)
    facts = {
        "settings": settings, "negative_prompt": args.negative_prompt, "tile": args.tile,
        "precision": args.mixed_precision, "model": name_of(args.model), "hashes": pipeline_hashes(pipeline),
        "versions": {**versions(), "device": pipeline.device.type}, "samples": args.samples,
    }  # fmt: skip
    make_folder(output)
    rows: dict[str, dict[str, Any]] = {}
    with as_user_error("see --help for levels, windows, samplers and guidance"), Progress(
            "upscaling", len(requests) * args.samples) as told:
        for part, small in batches(requests, pipeline.autoencoder.image_channels, factor, args, ledger):
            upscaler.tell_size((small.shape[-1], small.shape[-2]), ledger)
            made, off = upscaler.draw(part, small, told)
            for request, image, found in zip(part, grids.to_pil(made), off.tolist(), strict=True):
                rows[name(request)] = write(request, image, found, facts, upscaler)
    finish(rows, output, ledger, told.seconds)
    return [output / file for file in rows]


def requests_of(args: argparse.Namespace, sources: Sequence[Given], ledger: Ledger) -> list[Request]:
    """Each picture once, with `--prompt` or the first caption beside it; without either the empty caption, told."""
    requests = []
    for number, source in enumerate(sources):
        captions = (args.prompt,) if args.prompt is not None else source.captions
        if not captions:
            ledger.add("guessed", "picture without a caption, the empty one taken: --prompt gives one", source.name)
        if captions[1:]:
            ledger.add("ignored", "captions after a picture's first", source.name, len(captions) - 1)
        requests.append(Request(number, captions[0] if captions else "", args.seed, source))
    return requests


def batches(requests: Sequence[Request], channels: int, factor: int, args: argparse.Namespace,
            ledger: Ledger) -> Iterator[tuple[list[Request], Tensor]]:
    """Pictures one after another that are of one size, at most a batch of them, decoded; larger ones than can be drawn
    are left out and told. Raises UserError where nothing is left."""
    left = 0
    for first in range(0, len(requests), args.batch_size):
        decoded = [(request, source_of(request).decoded(channels, ledger))
                   for request in requests[first : first + args.batch_size]]
        for (width, height), group in groupby(decoded, lambda pair: pair[1].size):
            part, images = (list(each) for each in zip(*group, strict=True))
            if width * height * factor**2 > LARGEST_PICTURE:
                for request in part:
                    ledger.add("left out", f"picture of more than {LARGEST_PICTURE:,} pixels once it is enlarged",
                               f"{source_of(request).name} {width}x{height}")
                continue
            left += len(part)
            yield part, stacked(images, channels)
    if not left:
        raise UserError("no picture is left that could be enlarged", hint="cut them into smaller ones", code=DATA)


def write(request: Request, image: Image, off: float, facts: dict[str, Any], upscaler: Upscaler) -> dict[str, Any]:
    """One picture with how it was made; what the summary says of it."""
    args, source = upscaler.args, source_of(request)
    own = {"sha256": source.sha256, "name": source.name, "factor": upscaler.factor, "level": args.level,
           "windows": args.windows, "consistent": args.consistent, "residual": round(off, 4)}
    size = [image.height, image.width]
    told = {"prompt": request.prompt, "seed": request.seed, "size": size, FACT: own}
    grids.save(image, Path(args.output) / name(request), facts | told)
    return {"picture": source.name, "size": size, "residual": own["residual"]}


def finish(rows: dict[str, dict[str, Any]], output: Path, ledger: Ledger, seconds: float) -> None:
    """Tell and store the residuals, and what was not used as it was given."""
    mean = sum(row["residual"] for row in rows.values()) / len(rows)
    write_json(output / WRITTEN, {"pictures": rows, "residual": round(mean, 4), "ledger": ledger.report()})
    for file, row in rows.items():
        height, width = row["size"]
        answer(f"{file} {width}x{height}: means over squares {row['residual']:.2f}/255 from {row['picture']}")
    tell(f"wrote {len(rows)} pictures ({per_second(len(rows) / max(1e-9, seconds), 'picture')}) to {output}, "
         f"on average {mean:.2f}/255 from the small ones")
    for line in ledger.lines():
        tell(line)
