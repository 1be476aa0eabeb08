"""The work of scripts/generate.py: prompts in, numbered PNGs and a captioned grid out, picture by picture."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ldm.pipeline import Pipeline, Sampling
from training import config as configs
from training import launch, pictures
from training.errors import DATA, UserError
from training.files import read_json
from training.runs import find, versions
from training.strips import Strip
from training.system import add_weak, load_pipeline, pipeline_hashes

if TYPE_CHECKING:
    import argparse

GRID = 64  # pictures the grid shows at most


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    number: int
    prompt: str
    seed: int


def generate(args: argparse.Namespace) -> int:
    """Make every picture asked for; several processes share them. Returns the exit code."""
    requests = ask(prompts(args), args.num_images, args.seed)
    output = Path(args.output)
    refuse_overwriting(output, args.overwrite)
    device, rank, world = processes(args)
    launch.keep_memory()
    pipeline = load_pipeline(args.model, device, args.text_encoder)
    if args.weak_model:
        add_weak(pipeline, args.weak_model)
    sampling, settings = choose(args, pipeline)
    size = parse_size(args.size) or pipeline.size
    facts = {
        "settings": settings,
        "negative_prompt": args.negative_prompt,
        "size": list(size),
        "hashes": pipeline_hashes(pipeline),
        "versions": versions(),
    }
    mine = requests[rank::world]
    output.mkdir(parents=True, exist_ok=True)
    since = time.perf_counter()
    try:
        for first in range(0, len(mine), args.batch_size):
            part = mine[first : first + args.batch_size]
            draw(pipeline, part, sampling, size, output, {**facts, "batch": args.batch_size}, args)
            if rank == 0:
                done, rate = first + len(part), (first + len(part)) / (time.perf_counter() - since)
                made = len(requests) if done == len(mine) else done * world
                print(f"{made}/{len(requests)} pictures, {rate * world:.1f} a second", file=sys.stderr)
    except ValueError as failure:
        raise UserError(str(failure), hint="see --help for sizes, samplers and guidance") from None
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        draw_grid(requests[:GRID], output)
        print(f"wrote {len(requests)} pictures and {output / 'grid.png'}", file=sys.stderr)
    return 0


def draw_grid(shown: list[Request], output: Path) -> None:
    """grid.png of pictures already written, each with its caption."""
    images = [Image.open(output / name(request)).convert("RGB") for request in shown]
    sheet = pictures.grid(images, min(8, len(shown)), captions=[request.prompt for request in shown])
    sheet.save(output / "grid.png")


def draw(
    pipeline: Pipeline,
    part: list[Request],
    sampling: Sampling,
    size: tuple[int, int],
    output: Path,
    facts: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """One batch, written."""
    strip = Strip(pipeline, sampling.steps) if args.strip else None
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        images = pipeline(
            [r.prompt for r in part],
            [r.seed for r in part],
            negative=args.negative_prompt,
            sampling=sampling,
            size=size,
            batch_size=len(part),
            watch=strip,
        )
    for index, (request, image) in enumerate(zip(part, images, strict=True)):
        own = {"prompt": request.prompt, "seed": request.seed, **facts}
        pictures.save(image, output / name(request), own)
        if strip:
            (output / "strips").mkdir(exist_ok=True)
            pictures.save(strip.draw(index), output / "strips" / name(request), own)


def name(request: Request) -> str:
    """File names come from numbers, never from prompts."""
    return f"{request.number:05d}.png"


def ask(captions: list[str], copies: int, seed: int) -> list[Request]:
    """Prompt by prompt, `copies` of each. A prompt's k-th picture has seed + k, wherever in the list it stands."""
    if copies < 1:
        raise UserError(f"--num-images: must be at least 1 (got {copies})")
    seen: Counter[str] = Counter()
    requests: list[Request] = []
    for caption in captions:
        for _ in range(copies):
            requests.append(Request(len(requests), caption, seed + seen[caption]))
            seen[caption] += 1
    return requests


def prompts(args: argparse.Namespace) -> list[str]:
    """The captions asked for: --prompt TEXT (repeatable), or the lines of --prompts FILE but blank and # ones."""
    if args.prompt is not None:
        return list(args.prompt)
    path = Path(args.prompts)
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of prompts", hint="one prompt a line", code=DATA) from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(f"{path}: not a UTF-8 text file", hint="one prompt a line, saved as UTF-8", code=DATA) from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if len(found) < len(lines):
        print(f"note: {len(lines) - len(found)} blank or comment lines skipped in {path}", file=sys.stderr)
    if not found:
        raise UserError(f"{path}: no prompts in it", hint="one prompt a line", code=DATA)
    return found


def choose(args: argparse.Namespace, pipeline: Pipeline) -> tuple[Sampling, configs.Values]:
    """The run's own sampling, with the flags' changes laid over it; also as plain values."""
    home, _ = find(args.model, "denoiser")
    values = {
        name: section
        for name, section in read_json(home / "config.json").items()
        if name in ("sampler", "grid", "guidance", "sample")
    }
    given = {"sampler.kind": args.sampler, "sample.steps": args.steps, "guidance.scale": args.guidance_scale}
    changes = {key: str(value) for key, value in given.items() if value is not None} | args.overrides
    for key in changes:
        if key.partition(".")[0] not in values:
            raise UserError(
                f"--{key}: generate takes keys of {', '.join(values)}", hint="other keys are settled by training"
            )
        if key.endswith(".kind") and values[key.partition(".")[0]].get("kind") != changes[key]:
            values[key.partition(".")[0]] = {}  # another kind has other keys
    whole = configs.overlay({**read_json(home / "config.json"), **values}, changes)
    config = configs.decode("denoiser", whole, dict.fromkeys(changes, "command line"))
    assert isinstance(config, configs.DenoiserConfig)
    decoded = configs.to_values(config)
    return Sampling(sampler=config.sampler, grid=config.grid, guidance=config.guidance, steps=config.sample.steps), {
        n: decoded[n] for n in values
    }


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`64` or `HEIGHTxWIDTH`."""
    if text is None:
        return None
    try:
        sides = [int(side) for side in text.lower().split("x")]
        height, width = sides if len(sides) == 2 else (sides[0], sides[0])
    except (ValueError, IndexError):
        raise UserError(f"--size {text}: expected a number or HEIGHTxWIDTH") from None
    return height, width


def refuse_overwriting(output: Path, allowed: bool) -> None:
    """Pictures already made are never replaced unless asked."""
    if not allowed and output.is_dir() and any(output.glob("[0-9]*.png")):
        raise UserError(f"{output} already holds pictures", hint="use --overwrite, or another --output")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file", hint="choose another --output")


def processes(args: argparse.Namespace) -> tuple[torch.device, int, int]:
    """(device, rank, world): Accelerate only where several processes were started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        accelerator = launch.start(args.device)
        return accelerator.device, accelerator.process_index, accelerator.num_processes
    return launch.resolve(args.device), 0, 1
