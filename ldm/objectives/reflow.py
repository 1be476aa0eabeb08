"""Reflow: a denoiser of pairs of noise and where a teacher's ODE takes it, whose own ODE is straighter.

Liu et al. 2022 (arXiv 2209.03003), section 2.2. The pairs are written beforehand, as latents with the noise beside them
as `extra-eps.npy`; no teacher is asked in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.diffusion import Denoised, Diffusion
from ldm.jumps import plainly
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Draw, Losses, Trained
from ldm.objectives.few_step import FewStep, FewStepConfig
from ldm.pairing import Pairing
from ldm.times import Places, TimeSampling
from ldm.weighting import Weighting

NOISE = "eps"  # the extra of a condition (B, ...) that is the noise of its sample, which no network is told
LEAST = 1e-3  # of a weight that counts


class Reflow(FewStep):
    """||network(x_t) - y||^2 with x_t and y of the pair (x0, eps) of a sample: eps is the condition's extra "eps".

    So that one step of a perfect student from the eps of a pair lands at its x0, wherever straight ways between the
    pairs do not cross: in one dimension always. A share `at_noise` of the samples is trained at t = 1 alone, which is
    the regression of the ODE's map. Raises ValueError for samples that are no pairs.
    """

    config: ReflowConfig

    def further(self, x0: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        return {}

    def draw(self, x0: Tensor, noise: Noise, places: Places | None = None, seen: Tensor | None = None,
             cond: Cond | Sequence[str] | None = None) -> Draw:
        """See `Objective.draw`; of the samples at t = 1 neither time nor loss goes by how often other times come."""
        draw = super().draw(x0, noise, places, seen, cond)
        last = noise.uniform((), "at-noise") < self.config.at_noise
        return draw._replace(t=torch.where(last, 1.0, draw.t), factor=torch.where(last, 1.0, draw.factor))

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        cond, eps = parted(cond, x0)
        ends, expected = self.jump(backbone, self.diffusion.perturb(x0, eps, draw.t), draw.t, draw.t, cond)
        return self.counted(self.error(ends, Denoised(x0, eps), draw.t), draw, expected)

    def at(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor, beside: Beside = ALONE) -> Tensor:
        """How far one jump lands from the x0 of a pair, from t on the straight way between both: the mean square
        distance. `eps` is not used, and no teacher."""
        cond, own = parted(cond, x0)
        return super().at(backbone, x0, cond, t, own)


def parted(cond: Any, x0: Tensor) -> tuple[Any, Tensor]:
    """The condition without the noise of its samples, and that noise, like x0 (B, ...). Raises ValueError where there
    is none, or of another shape."""
    extras = dict(cond.extras)
    if (eps := extras.pop(NOISE, None)) is None:
        raise ValueError("objective.kind reflow is trained on pairs, and these latents hold no noise beside them "
                         "(extra-eps.npy): distill_denoiser --teacher RUN writes pairs")
    if eps.shape != x0.shape:
        raise ValueError(f"the noise of pairs is {tuple(eps.shape[1:])}, their latents are {tuple(x0.shape[1:])}: "
                         "write the pairs anew")
    return cond._replace(extras=extras), eps.to(x0)


@dataclass(frozen=True, kw_only=True)
class ReflowConfig(FewStepConfig, Checked):
    """Config of `Reflow`: `at_noise` is the share of samples that is trained at t = 1, 1 for one step alone; `pairs`
    the number that the teacher draws."""

    kind: Literal["reflow"] = "reflow"
    pairs: int = 10_000
    at_noise: float = 0.0
    taught = "yes"
    aim = "none"
    reading = staticmethod(plainly)
    made = Reflow
    limits: ClassVar = {"at_noise": "[0, 1]", "pairs": "[1, inf)"}

    def build(self, *, diffusion: Diffusion, times: TimeSampling, weighting: Weighting, pairing: Pairing) -> FewStep:
        """See `FewStepConfig.build`; ValueError also for a weighting by which t = 1 does not count, where it is trained
        at."""
        weight = weighting(diffusion, torch.ones(1, dtype=torch.float64)).item()
        if self.at_noise and weight < LEAST:
            raise ValueError(f"weighting.kind {weighting.kind} counts t = 1 {weight:g} times, where at_noise of reflow "
                             "trains: take weighting.kind uniform")
        return super().build(diffusion=diffusion, times=times, weighting=weighting, pairing=pairing)


OBJECTIVES = (ReflowConfig,)
