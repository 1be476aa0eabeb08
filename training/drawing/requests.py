"""What `generate` is asked for: which pictures, from what and how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.arguments import numbered
from training.drawing.given import Given
from training.errors import UserError
from training.guarding import read_json
from training.models.assembly import sampling_of
from training.models.folders import find
from training.settings import decoding

if TYPE_CHECKING:
    import argparse

    from ldm.arguments import Sampling


CUT = ("original_size", "crop_offset")  # what a model of conditioning.size is told


@dataclass(frozen=True)
class Request:
    """One picture to make, from a picture that is given or from noise."""

    number: int
    prompt: str
    seed: int
    source: Given | None = None


def ask(captions: Iterable[str], copies: int, seed: int) -> list[Request]:
    """Prompt by prompt, `copies` of each. A prompt's k-th picture has seed + k, wherever in the list it stands."""
    return ask_of(((caption, None) for caption in captions), copies, seed)


def ask_of(pairs: Iterable[tuple[str, Given | None]], copies: int, seed: int) -> list[Request]:
    """As `ask`, of captions each with the picture that is drawn from: its k-th picture with that caption has seed + k.
    """
    if copies < 1:
        raise UserError(f"--num-images: must be at least 1 (got {copies})")
    every = [pair for pair in pairs for _ in range(copies)]
    numbers = numbered(every, seed)
    return [Request(place, pair[0], next(numbers), pair[1]) for place, pair in enumerate(every)]


def parse_also(pairs: Sequence[Sequence[str]]) -> list[tuple[str, float]]:
    """--also WEIGHT TEXT ... as (caption, weight)."""
    weights = []
    for weight, caption in pairs:
        try:
            weights.append((caption, float(weight)))
        except ValueError:
            raise UserError(f"--also {weight} {caption!r}: expected a number, then a caption") from None
        if not math.isfinite(weights[-1][1]):
            raise UserError(f"--also {weight} {caption!r}: the weight must be a finite number")
    return weights


def check_scale(args: argparse.Namespace) -> None:
    """Raises UserError where --guidance-scale is no finite number."""
    if args.guidance_scale is not None and not math.isfinite(args.guidance_scale):
        raise UserError(f"--guidance-scale: must be a finite number (got {args.guidance_scale})")


def choose(args: argparse.Namespace, stored_values: decoding.Values | None = None) -> tuple[Sampling, decoding.Values]:
    """The run's sampling, or a picture's `stored_values`, with the flags' changes laid over; also as plain values."""
    check_scale(args)
    run_values = read_json(find(args.model, "denoiser").home / "config.json")
    values = {
        name: section
        for name, section in (run_values | (stored_values or {})).items()
        if name in ("sampler", "grid", "guidance", "sample")
    }
    flags = {"sampler.kind": args.sampler, "sample.steps": args.steps, "guidance.scale": args.guidance_scale,
             "sample.dynamic_threshold": args.dynamic_threshold,
             "sample.image_scale": getattr(args, "image_guidance_scale", None),  # which only generate has
             **told_cut(args)}
    editing = decoding.sections("editing")  # read by the starts
    own = {key: text for key, text in args.overrides.items() if key.partition(".")[0] not in editing}
    changes = {key: str(value) for key, value in flags.items() if value is not None} | own
    for key in changes:
        if key.partition(".")[0] not in values:
            raise UserError(
                f"--{key}: generate takes keys of {', '.join(values)}", hint="other keys are settled by training"
            )
    merged = decoding.lay_over("denoiser", {**run_values, **values}, changes, "the model's own settings")
    config = decoding.decode_stored("denoiser", merged, dict.fromkeys(changes, decoding.ASKED))
    assert isinstance(config, decoding.DenoiserConfig)
    plain = decoding.to_values(config)
    return sampling_of(config), {n: plain[n] for n in values}


def told_cut(args: argparse.Namespace) -> dict[str, str]:
    """What --original-size and --crop-offset say, by the keys that it settles."""
    told = {}
    for key in CUT:
        if (text := getattr(args, key, None)) is not None:
            try:
                told[f"sample.{key}"] = ",".join(map(str, two_sides(text)))
            except ValueError:
                what = f"--{key.replace('_', '-')} {text}: expected a number or HEIGHTxWIDTH"
                raise UserError(what) from None
    return told


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`64` or `HEIGHTxWIDTH`. Raises UserError for anything else."""
    try:
        return None if text is None else two_sides(text)
    except ValueError:
        raise UserError(f"--size {text}: expected a number or HEIGHTxWIDTH") from None


def two_sides(text: str) -> tuple[int, int]:
    """`64` or `HEIGHTxWIDTH`. Raises ValueError for anything else."""
    sides = [int(side) for side in text.lower().split("x")]
    height, width = sides * (3 - len(sides))  # one side is both; of more, none is left
    return height, width
