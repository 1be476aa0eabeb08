"""The training loss of a denoiser: draw a time and a noise for each sample, and compare with the target."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Backbone
from ldm.diffusion import Diffusion
from ldm.noise import Noise
from ldm.times import TimeSampling
from ldm.weighting import Weighting


@dataclass(frozen=True, kw_only=True)
class Objective:
    """weight(t) ||network(c_in x_t, noise level, cond) - y||^2, a mean over all but the batch.

    x0 (B, ...) are normalised latents; noise has one seed per sample, folded by the caller with the training step.
    """

    diffusion: Diffusion
    times: TimeSampling
    weighting: Weighting

    def __call__(self, backbone: Backbone, x0: Tensor, cond: Cond, noise: Noise) -> Tensor:
        """The loss of each sample, (B,) float32."""
        t = self.times.sample(noise.uniform((), "time"), self.diffusion.schedule)
        eps = noise.normal(x0.shape[1:], "eps", dtype=x0.dtype)
        return self.weighting(self.diffusion, t).float() * self.at(backbone, x0, cond, t, eps)

    def at(self, backbone: Backbone, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor) -> Tensor:
        """The unweighted loss at given times (B,) and noise, (B,) float32: what validation by noise level reads."""
        inputs, level = self.diffusion.condition(self.diffusion.perturb(x0, eps, t), t)
        error = backbone(inputs, level, cond).float() - self.diffusion.target(x0, eps, t).float()
        return error.square().flatten(1).mean(1)
