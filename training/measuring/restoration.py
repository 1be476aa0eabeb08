"""Held-out pictures measured by an operator and drawn again: how near, how true to y, and how well calibrated."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from autoencoder.images import to_uint8, to_unit
from autoencoder.perceptual import Perceptual
from autoencoder.precision import double
from ldm import image_tasks
from ldm.inverse.operators import LinearOperator, Operator, measure, residual
from ldm.noise import Noise
from ldm.samplers import Snapshot
from ldm.students import NO_STUDENT, Student
from training.commands import door
from training.drawing.prompts import tell_reading
from training.drawing.restoration import method_of, operator_of
from training.errors import UserError, as_user_error
from training.measuring.calibration import EXACT, TOLD, Calibration, floor
from training.measuring.distances import share
from training.measuring.held_out import CHUNK, even_indices, held_out
from training.measuring.obedience import verdicts_by
from training.messages import answer, note
from training.models.judge import caption
from training.models.lpips import load_distance
from training.models.reconstructions import Fidelity, reconstructed
from training.pictures import charts, grids
from training.progress import Progress
from training.settings import decoding

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline, Sampling
    from training.ledger import Ledger

SHOWN, DRAWN = 8, 2  # pictures of --grid, and draws of each
COLUMNS = ("psnr_mean", "psnr", "ssim", "lpips", "obeyed", "residual", "coverage_50", "coverage_90", "calls", "seconds")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How pictures are measured and drawn again."""

    pipeline: Pipeline
    sampling: Sampling
    operator: Operator
    sigma_y: float
    samples: int
    batch_size: int
    told: Progress  # of draws
    judge: Callable[[Tensor, list[str]], list[bool]] | None = None  # of pictures and their own captions

    def draws(self, method: image_tasks.Method, y: Tensor, captions: list[str], noise: Noise,
              told: list[int]) -> Iterator[tuple[slice, Tensor]]:
        """Images in [-1, 1], not clipped, of each y (B, ...), `samples` of one after those of another, and which they
        are; the denoiser's calls of one draw are put into `told`. Raises UserError for what cannot be drawn."""
        whose = torch.arange(len(y)).repeat_interleave(self.samples).tolist()
        keyed = torch.stack([noise.fold("restoration", k).seeds for k in range(self.samples)], dim=1).flatten()
        with as_user_error(f"{door('evaluate --help')} lists operators, methods and samplers"):
            task = image_tasks.restoration(self.pipeline, self.operator, y[whose], self.sigma_y, method)
            for first in range(0, len(whose), self.batch_size):
                part, calls = slice(first, first + self.batch_size), [0]
                own = task(part)
                denoise = self.pipeline.guided([captions[place] for place in whose[part]], plan=self.sampling)
                latents = self.pipeline.latents(
                    denoise, Noise(keyed[part]), own.shape or (), self.sampling, own, _counting(calls))
                told[:] = calls
                yield part, _sound(self.pipeline.decode(latents), method.kind)
                self.told.add(len(latents))


def _counting(calls: list[int]) -> Any:
    def watch(shot: Snapshot) -> None:
        calls[0] = shot.calls

    return watch


def _sound(images: Tensor, kind: str) -> Tensor:
    if not images.isfinite().all():
        raise UserError(f"{kind} drew values that are not finite", hint="give more --steps, or another --method")
    return images


@dataclass
class Score:
    """What a method's draws are worth, and the first of them to look at."""

    singles: Fidelity
    means: Fidelity
    calibration: Calibration = field(default_factory=Calibration)
    residuals: list[Tensor] = field(default_factory=list)
    verdicts: list[bool] = field(default_factory=list)
    calls: list[int] = field(default_factory=lambda: [0])
    seconds: float = 0.0
    shown: list[Tensor] = field(default_factory=list)  # the mean and some draws, (B, C, H, W) each

    @torch.no_grad()
    def add(self, bench: Bench, method: image_tasks.Method, pixels: Tensor, y: Tensor, captions: list[str],
            own: list[str], noise: Noise) -> None:
        """Draw pictures (B, C, H, W) again under `captions` and judge the draws, by the pictures' own."""
        truth, since, made = pixels.repeat_interleave(bench.samples, dim=0), time.perf_counter(), []
        ys = y.repeat_interleave(bench.samples, dim=0)
        for part, images in bench.draws(method, y, captions, noise, self.calls):
            self.seconds += time.perf_counter() - since
            self.residuals.append(residual(bench.operator, images, ys[part]).cpu() / bench.sigma_y)
            made.append(to_uint8(images))
            self.singles.add(made[-1], truth[part])
            since = time.perf_counter()
        draws = torch.cat(made).view(len(pixels), bench.samples, *made[0].shape[1:])
        mean = double(draws).mean(1).round().to(torch.uint8).to(draws.device)
        self.means.add(mean, pixels)
        for k in range(bench.samples if bench.judge else 0):
            self.verdicts += bench.judge(draws[:, k], own)  # type: ignore[misc]
        self.calibration.add(pixels, draws)
        if not self.shown:
            self.shown = [part[:SHOWN].cpu() for part in (mean, *draws[:, :DRAWN].unbind(1))]

    def numbers(self) -> dict[str, Any]:
        """Means over draws and pictures; `residual` in units of sigma_y, `seconds` and `calls` of one draw."""
        residuals = torch.cat(self.residuals)
        return {
            **{f"{name}_mean": value for name, value in self.means.means().items()},
            **self.singles.means(),
            **(share("obeyed", self.verdicts) if self.verdicts else {}),
            "residual": residuals.mean().item(),
            **self.calibration.numbers(),
            "calls": self.calls[0],
            "seconds": self.seconds / len(residuals),
        }


@dataclass
class Baseline:
    """Pictures that cost no drawing."""

    fidelity: Fidelity
    residuals: list[Tensor] = field(default_factory=list)
    verdicts: list[bool] = field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        """Means over pictures."""
        residuals = torch.cat(self.residuals)
        obeyed = share("obeyed", self.verdicts) if self.verdicts else {}
        return {**self.fidelity.means(), **obeyed, "residual": residuals.mean().item()}


def restoration(
    pipeline: Pipeline, sampling: Sampling, args: argparse.Namespace, device: torch.device, ledger: Ledger
) -> dict[str, Any]:
    """Posterior samples of held-out pictures from y = A x + sigma_y n, by each of the methods, beside what is there
    without drawing: the picture itself, its reconstruction, A^+ y, and y enlarged."""
    methods, operator, images = methods_of(args), operator_of(args), held_out(args, "--restore")
    check_noise(args.sigma_y)
    tell_limits(args.samples, sampling, pipeline.student)
    places = even_indices(images, args.count or len(images))
    named = [caption(images, place) for place in places]
    captions = [""] * len(named) if args.captions == "empty" else named
    tell_reading(captions, ledger, pipeline.text, aloud=False)
    network = load_distance(args, images, device)
    bench = Bench(pipeline=pipeline, sampling=sampling, operator=operator, sigma_y=args.sigma_y, samples=args.samples,
                  batch_size=args.batch_size, judge=verdicts_by(args.obedience, device),
                  told=Progress("restoring", len(places) * len(methods) * args.samples, "draw"))
    scores = {name: Score(Fidelity(network), Fidelity(network)) for name in methods}
    others: dict[str, Baseline] = {}
    top: dict[str, Tensor] = {}
    for number, batch in enumerate(images.chunks(places, CHUNK, "")):
        pixels = batch.data.to(device)
        part = slice(number * CHUNK, number * CHUNK + len(pixels))
        noise = Noise.from_seeds([args.seed + place for place in places[part]], device)
        if args.truth == "model":
            pixels = own_drawings(bench, captions[part], [args.seed + place for place in places[part]])
        with as_user_error("choose other settings of the operator, or pictures of another size"):
            y = measure(operator, to_unit(pixels), args.sigma_y, noise)
        compare(bench, pixels, y, named[part], network, others)
        for name, method in methods.items():
            scores[name].add(bench, method, pixels, y, captions[part], named[part], noise)
        top = top or {"truth": pixels[:SHOWN].cpu()} | as_picture(y[:SHOWN].cpu(), pixels)
    found = {name: score.numbers() for name, score in scores.items()}
    beside = {name: other.numbers() for name, other in others.items()}
    answer(*table(found, beside))
    chosen = {name: decoding.values_of(method) for name, method in methods.items()}
    numbers: dict[str, Any] = {"operator": decoding.values_of(operator), "methods": chosen}
    numbers |= {"sigma_y": args.sigma_y, "captions": args.captions, "truth": args.truth}
    numbers |= {"pictures": len(places), "samples": args.samples}
    if args.grid:
        grids.write(sheet(top, scores, found), Path(args.grid))
        numbers["grid"] = Path(args.grid).name
    return numbers | {"restored": found, "beside": beside}


def own_drawings(bench: Bench, captions: list[str], seeds: list[int]) -> Tensor:
    """uint8 (B, C, H, W) that the model draws: truths from the very prior that a method is given, so that a draw of the
    posterior cannot be told from them. Talts et al. 2018 (arXiv 1804.06788)."""
    return torch.cat(list(bench.pipeline.pixels(captions, seeds, sampling=bench.sampling, batch_size=bench.batch_size)))


def methods_of(args: argparse.Namespace) -> dict[str, image_tasks.Method]:
    """The methods of `--method NAME,NAME`, by name. Raises UserError for one that there is not."""
    names = [name.strip() for name in args.method.split(",")]
    return {name: method_of(argparse.Namespace(**{**vars(args), "method": name})) for name in names}


def check_noise(sigma_y: float) -> None:
    """Raises UserError for a noise in which no residual can be told."""
    if not 0 < sigma_y < math.inf:
        what = f"--sigma-y: must be a number above 0, in whose units residuals are told (got {sigma_y:g})"
        raise UserError(what, hint="give a small one for a measurement that has next to none, such as 0.001")


def tell_limits(samples: int, sampling: Sampling, student: Student = NO_STUDENT) -> None:
    """Say what coverage will not show."""
    if samples < EXACT:
        share = f"{floor(samples, TOLD[-1]):.2f}"
        note(f"of {samples} samples a value beyond all of them counts as {share} in the coverage of {TOLD[-1]:.0%}; "
             f"of {EXACT} and more it counts as 0")
    if student.baked is not None:
        note(f"guidance of scale {student.baked:g} is baked into this student, whose prior is another than the data's, "
             "and draws less spread; calibration is a question for its teacher")
    if (scale := getattr(sampling.guidance, "scale", 1)) != 1:
        note(f"guidance of scale {scale:g} makes the prior another than the data's, and draws less spread; "
             "calibration is a question for --guidance-scale 1")


@torch.no_grad()
def compare(bench: Bench, pixels: Tensor, y: Tensor, own: list[str], network: Perceptual | None,
            others: dict[str, Baseline]) -> None:
    """Add what there is without drawing to `others`, by name."""
    images, operator = to_unit(pixels), bench.operator
    made = {"truth": images, "autoencoder": to_unit(reconstructed(bench.pipeline.autoencoder, pixels))}
    if isinstance(operator, LinearOperator):
        made["pseudo-inverse"] = operator.pinv(y)
    if y.ndim == 4 and y.shape[1] == images.shape[1] and y.shape[-1] < images.shape[-1]:
        made["bicubic"] = interpolate(y, images.shape[-2:], mode="bicubic", antialias=True)
    for name, one in made.items():
        other = others.setdefault(name, Baseline(Fidelity(network)))
        other.fidelity.add(to_uint8(one), pixels)
        other.verdicts += bench.judge(to_uint8(one), own) if bench.judge else []
        other.residuals.append(residual(operator, one, y).cpu() / bench.sigma_y)


def as_picture(y: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """Measurements as pictures of the others' size, where they are pictures."""
    if y.ndim != 4 or y.shape[1] not in (1, pixels.shape[1]):
        return {}
    return {"measured": to_uint8(interpolate(y, pixels.shape[-2:])).expand(-1, pixels.shape[1], -1, -1)}


def sheet(top: Mapping[str, Tensor], scores: Mapping[str, Score], found: Mapping[str, Any]) -> Any:
    """Truth, measurement, mean and draws beneath each other, and the reliability of every method."""
    rows = dict(top)
    for name, score in scores.items():
        kinds = [f"{name}: mean", *(f"{name}: {k + 1}" for k in range(DRAWN))]
        rows |= dict(zip(kinds, score.shown, strict=True))
    pictures = grids.grid(torch.cat(list(rows.values())), len(rows["truth"]), rows=list(rows))
    curves = {name: [[0.0, 0.0], *numbers["reliability"], [1.0, 1.0]] for name, numbers in found.items()}
    return charts.stacked([pictures, charts.unit_square(curves, "level of the central interval", "holds the truth")])


def table(found: Mapping[str, Mapping[str, Any]], beside: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """For people: a line a method, and a line for each picture beside."""
    rows = {**found, **beside}
    keys = [key for key in COLUMNS if any(key in row for row in rows.values())]
    width = max(map(len, rows))
    lines = [" ".join([f"{'':{width}}", *(f"{key:>11}" for key in keys)])]
    for name, row in rows.items():
        told = (f"{row[key]:11.4g}" if key in row else " " * 11 for key in keys)
        lines.append(" ".join([f"{name:{width}}", *told]).rstrip())
    return lines
