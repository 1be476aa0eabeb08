"""The frozen denoiser that a student learns from, guided as the student is to be, at a time of its own for each sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Around, Conditional
from ldm.diffusion import Denoised
from ldm.guidance import ClassifierFree, rescaled
from ldm.guiding import place, together
from ldm.jumps import SCALE, beside, mixed
from ldm.schedules import match


@dataclass(frozen=True)
class Teacher(Around):
    """absent + w (told - absent) of (x (B, ...), t () or (B,), cond), as `ClassifierFree` has it.

    w is the condition's extra "guidance_scale" (B,), and the scale of `guidance` where there is none. `null` (batch 1
    or B) is the condition's absence; at scale 1, that of `guidance`, the denoiser answers alone. One that is a student
    with `embedded` guidance itself is told the scale instead. Raises ValueError where it needs a null and has none.
    """

    denoiser: Conditional
    guidance: ClassifierFree = ClassifierFree(scale=1.0)  # noqa: RUF009  # frozen, without state
    null: Cond | None = None
    embedded: bool = False

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        scale = cond.extras.get(SCALE)
        if self.embedded:
            own = torch.full((len(x),), self.guidance.scale, device=x.device) if scale is None else scale
            return self.denoiser(x, t, beside(cond, SCALE, own))
        bare = cond._replace(extras={name: extra for name, extra in cond.extras.items() if name != SCALE})
        if scale is None and self.guidance.scale == 1:
            return self.denoiser(x, t, bare)
        if self.null is None:
            raise ValueError("guidance at another scale than 1 needs a null condition: the empty caption encoded")
        times = t.expand(len(x)).repeat(2) if t.ndim else t
        told, absent = together(self.denoiser, [bare, bare.absence(self.null)])(x, times)
        low, high = self.guidance.interval
        at = place(t, self.schedule, self.guidance.interval_in)
        w = torch.as_tensor(self.guidance.scale, dtype=x.dtype, device=x.device) if scale is None else scale.to(x.dtype)
        w = match(torch.where(((at >= low) & (at <= high)).to(w.device), w, torch.ones_like(w)).expand(len(x)), x)
        guided = told._replace(x0=torch.lerp(absent.x0, told.x0, w), eps=torch.lerp(absent.eps, told.eps, w))
        return rescaled(guided, told, self.guidance.rescale) if self.guidance.rescale else guided

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """x at s, by one step of DDIM: the straight mix of the answer at t."""
        return mixed(self.schedule, self(x, t, cond), s)

    @torch.no_grad()
    def heun(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """x at s >= t_min, by one step of Heun in r = sigma / alpha, d(x / alpha) = eps dr; one of DDIM from pure
        noise, where r is infinite."""
        first = self(x, t, cond)
        end = mixed(self.schedule, first, s)
        (a_t, b_t), (a_s, b_s) = self.schedule(t), self.schedule(s)
        half = torch.where(a_t > 0, (b_s - a_s * b_t / a_t.clamp(min=1e-300)) / 2, 0.0)
        return end + match(half, x) * (self(end, s, cond).eps - first.eps)

    @torch.no_grad()
    def walk(self, x: Tensor, t: Tensor, cond: Cond, steps: int) -> Tensor:
        """Where x at t ends, in so many steps of DDIM, equal in t; the last is from the last time above 0."""
        times = [t * (1 - i / steps) for i in range(steps + 1)]
        for i in range(steps):
            floor = self.schedule.t_min
            now, after = times[i].clamp(min=floor), times[i + 1]
            x = self.step(x, now, after if i == steps - 1 else after.clamp(min=floor), cond)
        return x
