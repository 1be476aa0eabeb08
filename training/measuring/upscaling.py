"""Held-out pictures made small and drawn large again: how near single draws and their mean are, how true to the small
picture, and what enlarging it without drawing gives."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from autoencoder.images import to_uint8, to_unit
from autoencoder.perceptual import Perceptual
from ldm.upscaling import larger, low_res_of, projected, residual, upscaling
from training.drawing.prompts import tell_reading
from training.encoding.shown import made_small
from training.errors import as_user_error
from training.measuring.calibration import Calibration
from training.measuring.distances import share
from training.measuring.held_out import CHUNK, even_indices, held_out
from training.measuring.obedience import verdicts_by
from training.measuring.restoration import table
from training.messages import answer
from training.models.judge import caption
from training.models.lpips import load_distance
from training.models.reconstructions import Fidelity
from training.pictures import grids
from training.progress import Progress

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline, Sampling
    from training.ledger import Ledger

SHOWN = 8  # pictures of --grid
Judge = Callable[[Tensor, list[str]], list[bool]] | None


@dataclass
class Row:
    """One way of making pictures larger: single pictures against the truth, and their means over draws."""

    network: Perceptual | None
    judge: Judge
    residuals: list[Tensor] = field(default_factory=list)
    verdicts: list[bool] = field(default_factory=list)
    shown: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.singles, self.means = Fidelity(self.network), Fidelity(self.network)
        self.calibration = Calibration()

    def add(self, draws: Tensor, pixels: Tensor, small: Tensor, factor: int, captions: list[str]) -> None:
        """uint8 (B, N, C, H, W) of B pictures."""
        for made in draws.unbind(1):
            self.singles.add(made, pixels)
            self.residuals.append(residual(made, small, factor).cpu())
            self.verdicts += self.judge(made, captions) if self.judge else []
        if draws.shape[1] > 1:
            self.means.add(draws.float().mean(1).round().to(torch.uint8), pixels)
            self.calibration.add(pixels, draws)
        self.shown = self.shown or [draws[:SHOWN, 0].cpu()]

    def numbers(self) -> dict[str, Any]:
        """Means over pictures and draws; `residual` is mean |y - A x| in 255ths."""
        several = bool(self.means.rows)
        return {
            **({f"{name}_mean": value for name, value in self.means.means().items()} if several else {}),
            **self.singles.means(),
            **(share("obeyed", self.verdicts) if self.verdicts else {}),
            "residual": torch.cat(self.residuals).mean().item(),
            **(self.calibration.numbers() if several else {}),
        }


def upscaled(
    pipeline: Pipeline, sampling: Sampling, args: argparse.Namespace, device: torch.device, ledger: Ledger
) -> dict[str, Any]:
    """Draws of held-out pictures from their small ones, as they are and `projected` onto these, beside bicubic
    interpolation and the squares themselves (`box`)."""
    with as_user_error("name a run that enlarges pictures: --model RUN"):
        factor = low_res_of(pipeline).factor
    images = held_out(args, "--upscale")
    places = even_indices(images, args.count or len(images))
    own = [caption(images, place) for place in places]
    told_of = [""] * len(own) if args.captions == "empty" else own
    tell_reading(told_of, ledger, pipeline.text, aloud=False)
    network, judge = load_distance(args, images, device), verdicts_by(args.obedience, device)
    rows = {name: Row(network, judge) for name in ("box", "bicubic", "drawn", "projected")}
    top: dict[str, Tensor] = {}
    with Progress("upscaling", len(places) * args.samples) as told:
        for number, batch in enumerate(images.chunks(places, CHUNK, "")):
            pixels = batch.data.to(device)
            part = slice(number * CHUNK, number * CHUNK + len(pixels))
            with as_user_error("give pictures of another size"):
                small = made_small(pixels, factor)
                whole = larger(pipeline, None, (small.shape[-2], small.shape[-1]))
                task = upscaling(whole, small, level=args.level)
                draws = _draws(whole, sampling, args, told_of[part], args.seed + part.start, task, told)
            flat = projected(draws.flatten(0, 1), small.repeat_interleave(args.samples, 0), factor)
            unit, size = to_unit(small), (pixels.shape[-2], pixels.shape[-1])
            made = {"drawn": draws, "projected": flat.view_as(draws), "box": to_uint8(interpolate(unit, size))[:, None],
                    "bicubic": to_uint8(interpolate(unit, size, mode="bicubic", antialias=True))[:, None]}
            for name, row in rows.items():
                row.add(made[name], pixels, small, factor, own[part])
            top = top or {"truth": pixels[:SHOWN].cpu()}
    found = {name: row.numbers() for name, row in rows.items()}
    answer(*table(found, {}))
    if args.grid:
        top |= {name: row.shown[0] for name, row in rows.items()}
        grids.write(grids.grid(torch.cat(list(top.values())), len(top["truth"]), rows=list(top)), Path(args.grid))
    return {"factor": factor, "level": args.level, "captions": args.captions, "pictures": len(places),
            "samples": args.samples, "upscaled": found}


def _draws(pipeline: Pipeline, sampling: Sampling, args: argparse.Namespace, captions: list[str], seed: int, task: Any,
           told: Progress) -> Tensor:
    """(B, N, C, H, W): picture b, draw n with the seed (b's own) + 2^32 n."""
    each = []
    for draw in range(args.samples):
        seeds = [seed + place + (draw << 32) for place in range(len(captions))]
        made = []
        for pixels in pipeline.pixels(captions, seeds, task=task, sampling=sampling, batch_size=args.batch_size):
            made.append(pixels)
            told.add(len(pixels))
        each.append(torch.cat(made))
    return torch.stack(each, dim=1)
