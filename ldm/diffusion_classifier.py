"""Which condition a sample shows, by a denoiser's own errors: argmin over c of E w(t) ||y - y_c(x_t, t)||^2.

With the weights of the variational bound the differences of these sums between conditions are those of -log p(x0 | c),
in nats, so that softmax of minus them is the posterior under equal priors. Li et al. 2023 (arXiv 2303.16203), sections
3 and 4; weights: Kingma et al. 2021 (arXiv 2107.00630), eq. 17. What is drawn is keyed by (sample, draw) and shared by
all conditions, so that the error they have in common cancels in the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from autoencoder.precision import double, double_device
from ldm.conditioning import Cond
from ldm.denoiser import Conditional
from ldm.diffusion import Diffusion
from ldm.noise import Noise
from ldm.weighting import ELBO, SNR, Weighting


class Question(NamedTuple):
    """What a denoiser is asked about every condition: data and noise (B, ...), times (B,) float64."""

    x0: Tensor
    eps: Tensor
    t: Tensor


def radical_inverse(number: int) -> float:
    """The binary digits of a whole number mirrored at the point: 0, 1/2, 1/4, 3/4, 1/8 ... (van der Corput 1935).

    The first 2^n of them lie one in each of 2^n equal shares of [0, 1).
    """
    value, share = 0.0, 0.5
    while number:
        number, digit = divmod(number, 2)
        value, share = value + digit * share, share / 2
    return value


def question(sample: Callable[[Noise], Tensor], noise: Noise, number: int, diffusion: Diffusion) -> Question:
    """Draw `number` of each sample: latents by `sample` of a noise source, noise, and a time.

    Times are `radical_inverse` moved round the unit interval by a number of the sample's own: each is uniform, and any
    number of the first ones is stratified, so that fewer draws are the beginning of more.
    """
    own = noise.fold("classify", number)
    x0 = sample(own)
    place = (noise.uniform((1,), "classify-time")[:, 0] + radical_inverse(number)) % 1
    return Question(x0, own.normal(x0.shape[1:], "eps", dtype=x0.dtype), diffusion.schedule.trained(place))


@dataclass(frozen=True, eq=False, kw_only=True)
class DiffusionClassifier:
    """Mean weighted errors of C conditions, (len(weightings), B, C) float64: sums over all elements of a sample.

    `diffusion` names the target y whose error is measured, and the weightings are those of a training on it: `ELBO`
    counts in nats, `SNR` is 1 on the error of eps, for times uniform on the schedule. `keep`, after how many draws how
    many conditions stay: those with the least mean so far by any one of the weightings, sample by sample; the others
    end as infinity. What stays has seen the draws that it would have seen if all had, in the same order. Raises
    ValueError on nonsense.
    """

    denoiser: Conditional
    diffusion: Diffusion
    draws: int = 32
    weightings: tuple[Weighting, ...] = (ELBO(), SNR())
    keep: Mapping[int, int] = field(default_factory=dict)
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.draws < 1 or self.batch_size < 1 or not self.weightings:
            raise ValueError("a diffusion classifier needs at least 1 draw, 1 weighting and a batch of 1, got "
                             f"{self.draws}, {len(self.weightings)} and {self.batch_size}")
        for after, kept in self.keep.items():
            if not (1 <= after < self.draws and kept >= 1):
                raise ValueError(f"conditions are left out after 1 to {self.draws - 1} of {self.draws} draws, and at "
                                 f"least 1 is kept, got {kept} after {after}")

    @torch.no_grad()
    def __call__(self, sample: Callable[[Noise], Tensor], noise: Noise, cond: Cond) -> Tensor:
        """`sample` gives the data (B, ...) of a noise source, afresh for each draw; `cond` is the C conditions."""
        size = len(noise), len(cond.mask)
        going = torch.ones(size, dtype=torch.bool, device=double_device(noise.seeds.device))
        totals = torch.zeros(len(self.weightings), *size, dtype=torch.float64, device=going.device)
        for number in range(self.draws):
            asked = question(sample, noise, number, self.diffusion)
            weights = torch.stack([weighting(self.diffusion, asked.t) for weighting in self.weightings])
            totals += weights[:, :, None] * self.errors(asked, cond, going)
            if kept := self.keep.get(number + 1):
                going = best(totals.masked_fill(~going, torch.inf), kept)
        return (totals / self.draws).masked_fill(~going, torch.inf)

    def errors(self, asked: Question, cond: Cond, going: Tensor) -> Tensor:
        """||y - y_c||^2 (B, C) float64 of the pairs of sample and condition that are `going` (B, C), 0 for the rest."""
        x_t = self.diffusion.perturb(*asked)
        target = self.diffusion.target(*asked)
        errors = torch.zeros(going.shape, dtype=torch.float64, device=going.device)
        for pairs in torch.split(going.nonzero(), self.batch_size):
            row, column = pairs.unbind(1)
            t = asked.t[row]
            ends = self.denoiser(x_t[row], t, cond.select(column))
            off = self.diffusion.target(ends.x0, ends.eps, t) - target[row]
            errors[row, column] = double(off).square().flatten(1).sum(1)
        return errors


def best(scores: Tensor, count: int) -> Tensor:
    """Which conditions are among the `count` of least finite score by any of the scores (W, B, C): (B, C) bool."""
    least = scores.argsort(dim=2, stable=True)[:, :, :count]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, least, torch.ones_like(least, dtype=torch.bool))
    return (chosen & scores.isfinite()).any(0)


def posterior(scores: Tensor) -> Tensor:
    """Probabilities (..., C) of the conditions under equal priors: softmax of minus their scores (..., C).

    Those of `ELBO` are Bayes' rule as far as the bound is tight; any other weighting's are a ranking with a scale.
    """
    return (-scores).softmax(-1)
