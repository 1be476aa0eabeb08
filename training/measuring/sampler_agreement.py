"""Whether all samplers of a trained run draw the same: those without noise the same latents, others the same law."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.grids import Karras, Uniform
from ldm.guidance import ClassifierFree, Embedded
from ldm.noise import Noise
from ldm.pipeline import Pipeline, Sampling
from ldm.samplers import RK4, Memory, Sampler
from ldm.students import check_plan
from training.progress import Progress

CLOSE = 0.05  # of the latents' standard deviation
WIDER = {"predictor-corrector": 0.1, "langevin": 0.2}  # whose own laws are wider, at any number of steps
ERRORS = 4.0  # standard errors that chance is granted


@dataclass(frozen=True, kw_only=True)
class Reverse(Sampler):
    """The reverse SDE in its plainest form, written apart from the samplers that it judges.

    x_s has x_t's x0, and of x_t's noise the share r = (alpha_t sigma_s / (alpha_s sigma_t)); the rest is fresh.
    """

    order: ClassVar[int] = 1
    calls: ClassVar[int] = 1
    kind: Literal["reverse"] = "reverse"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        """From t to s < t; without memory."""
        ends, (alpha, sigma), (alpha_t, sigma_t) = denoise(x, t), denoise.schedule(s), denoise.schedule(t)
        share = (alpha_t * sigma / (alpha * sigma_t)).item()
        fresh = noise.normal(x.shape[1:], dtype=x.dtype)
        return alpha * ends.x0 + sigma * (share * ends.eps + math.sqrt(1 - share**2) * fresh), None


class Row(NamedTuple):
    """A sampler's verdict: how far it is from where it should be, and how far it may be, over the latents' standard
    deviation. `apart` is a root mean square; of a stochastic sampler, the difference of that channel's mean or standard
    deviation which fits least."""

    sampler: str
    stochastic: bool
    apart: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the sampler is as near as it must be."""
        return self.apart <= self.allowed


@dataclass(frozen=True)
class Bench:
    """The samplers of a pipeline, without guidance but a student's own, from the same starts.

    Those without noise of their own must come to the latents of the classic Runge-Kutta rule. Those with an order
    converge to the law of the reverse SDE; the rest must come to that, to the law of the ODE, or between. The two laws
    are one where the network is the score of its data, and `gap` is how far they are apart. A law is looked at by the
    mean and standard deviation of each channel, over `seeds` pictures and their pixels, and may be missed by `CLOSE`
    (or `WIDER`) and `ERRORS` standard errors.
    """

    pipeline: Pipeline
    caption: str
    steps: int
    seeds: int

    @cached_property
    def ode(self) -> Tensor:
        """Latents of the ODE."""
        return self._drawn(RK4(), self.seeds)

    @cached_property
    def sde(self) -> Tensor:
        """Latents of the reverse SDE, drawn when a stochastic sampler is judged."""
        return self._drawn(Reverse(), self.seeds)

    @property
    def gap(self) -> float:
        """The most that a channel's mean or standard deviation differs between the ODE and the reverse SDE."""
        return (self._moments(self.ode) - self._moments(self.sde)).mean(0).abs().max().item()

    def judge(self, sampler: Sampler) -> Row:
        """One sampler's row."""
        if not sampler.rises:
            return Row(sampler.kind, True, *self._outside(sampler))
        apart = (self._drawn(sampler, 2) - self.ode[:2]).square().mean().sqrt()
        return Row(sampler.kind, False, (apart / self.ode.std()).item(), CLOSE)

    def _drawn(self, sampler: Sampler, seeds: int) -> Tensor:
        """Latents (seeds, C, h, w) in float64 on the CPU, drawn sixteen at a time."""
        shape, parts, (pipeline, plan) = self.pipeline.latent_shape(self.pipeline.size), [], self._asked(sampler)
        with torch.no_grad():
            for first in range(0, seeds, 16):
                noise = Noise.from_seeds(range(first, min(first + 16, seeds)), self.pipeline.device)
                denoise = pipeline.guided([self.caption] * len(noise), plan=plan)
                parts.append(pipeline.latents(denoise, noise, shape, plan).cpu().double())
        return torch.cat(parts)

    def check(self, sampler: Sampler) -> None:
        """Raises ValueError for a sampler of another kind of model."""
        pipeline, plan = self._asked(sampler)
        check_plan(pipeline.student, plan, pipeline.denoiser)

    def _asked(self, sampler: Sampler) -> tuple[Pipeline, Sampling]:
        """The pipeline, at as many steps as are asked for, and how it draws."""
        own = self.pipeline.sampling.guidance
        # Equal steps of t are no grid for a process whose sigma grows to 80.
        grid = Uniform() if self.pipeline.denoiser.schedule.prior_std == 1 else Karras()
        guidance = own if isinstance(own, Embedded) else ClassifierFree(scale=1.0)
        plan = Sampling(sampler=sampler, grid=grid, guidance=guidance, steps=self.steps)
        return replace(self.pipeline, sampling=plan, student=replace(self.pipeline.student, steps=())), plan

    def _moments(self, x: Tensor) -> Tensor:
        """Of each sample (N, 2 C): what it adds to the mean and the standard deviation of each channel, where the ODE's
        are 0 and 1."""
        whole = self.ode.transpose(0, 1).flatten(1)
        z = (x.flatten(2) - whole.mean(1)[:, None]) / whole.std(1)[:, None]
        return torch.cat([z.mean(2), (z.square().mean(2) - 1) / 2], dim=1)

    def _outside(self, sampler: Sampler) -> tuple[float, float]:
        """How far a sampler's moments lie outside those of the laws it may have, and how far they may, where they fit
        least."""
        laws = [self.sde] if sampler.order else [self.sde, self.ode]
        apart = self._moments(self._drawn(sampler, self.seeds)) - torch.stack([self._moments(law) for law in laws])
        means, errors = apart.mean(1), apart.std(1) / math.sqrt(self.seeds)
        nearer = means.abs().argmin(0, keepdim=True)
        outside = means.gather(0, nearer)[0].abs().where(means[0] * means[-1] > 0, 0.0)
        allowed = WIDER.get(sampler.kind, CLOSE) + ERRORS * errors.gather(0, nearer)[0]
        worst = (outside / allowed).argmax()
        return outside[worst].item(), allowed[worst].item()


def table(bench: Bench, samplers: list[Sampler]) -> Iterator[str]:
    """A Markdown table with one row per sampler, the verdict in its last column."""
    yield f"After {bench.steps} steps, in standard deviations of the latents. Samplers without noise of their own: 2"
    yield f"seeds, against rk4's; {CLOSE:.0%} is allowed."
    if not all(sampler.rises for sampler in samplers):
        wider = ", ".join(f"{kind} {wide:.0%}" for kind, wide in WIDER.items())
        yield f"""Stochastic ones: mean and standard deviation of each channel over {bench.seeds} seeds, against the
reverse SDE's, or between that and the ODE's where their bias has no order; {CLOSE:.0%} ({wider})
and {ERRORS:g} standard errors are allowed. ODE and SDE are {bench.gap:.1%} apart here: the less, the better the network
is the score of its data."""
    yield "\n| sampler | compared | apart | allowed | agrees |"
    yield "|---|---|---:|---:|---|"
    for sampler in Progress("checking", len(samplers), "sampler").each(samplers, lambda sampler: 1):
        row = bench.judge(sampler)
        compared, verdict = "moments" if row.stochastic else "latents", "yes" if row.agrees else "no"
        yield f"| {row.sampler} | {compared} | {row.apart:.2%} | {row.allowed:.2%} | {verdict} |"
