"""Distribution matching distillation: a generator of one or a few steps whose samples are spread as the teacher's are.

Yin et al. 2023 (arXiv 2311.18828); the turns and several steps: Yin et al. 2024 (arXiv 2405.14867), "DMD2". The GAN of
DMD2 is left out: the generator is held to its teacher's distribution alone, and never sees data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.diffusion import Denoised
from ldm.jumps import mixed, plainly
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Companion, Draw, Losses, Trained
from ldm.objectives.few_step import WALK, FewStep, FewStepConfig, need_teacher
from ldm.schedules import match
from ldm.score_distillation import surrogate

FAKE = "fake"


def direction(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """(fake - real) / mean |x - real|, the mean being of each sample: x goes against it from `fake` towards `real`.

    Those are the x0 of one x_t as both denoisers see it, so that the numerator is sigma^2 / alpha times the difference
    of their scores. Of two that agree it is exactly 0. arXiv 2311.18828, eq. 7 and 8.
    """
    return (fake - real) / match((x - real).abs().flatten(1).mean(1), x)


class DMD(FewStep):
    """min KL(generator || teacher), both noised: the gradient in a clean sample x of the generator is `direction`.

    What the generator makes has a denoiser of its own, the companion "fake". Of each `fake_steps` + 1 steps the first
    is the generator's, whose loss has, in each of the numel elements of a sample x, the gradient direction / numel: as
    all losses here it is a mean over elements. The others are the fake network's, which learns to denoise x at the same
    times, weighed by noise level. `Losses` are those of whose turn it is: "matching" and "regression", or "fake", with
    `total` and `seen` the same, since no rule but `low` to `high` chooses their times. Both read the network plainly.

    With several steps a sample is made at a random one of them: from noise, by the generator's own steps before it,
    each with fresh noise, as the sampler `consistency` takes them on the grid `uniform`.
    """

    config: DMDConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting.terms or self.times.start() is not None:
            raise ValueError("objective.kind dmd draws times of its own and expects no loss at them: set "
                             "weighting.kind to another than learned, and times.kind to another than loss-aware")

    def further(self, x0: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        low, high, steps = self.config.low, self.config.high, self.config.steps
        schedule, share = self.diffusion.schedule, low + (high - low) * noise.uniform((), "dmd-time")
        t = schedule.trained(schedule.time(2 * ((1 - share) / share).log()).clamp(0, 1))
        more = {"time": t, "diffusing": noise.normal(x0.shape[1:], "dmd-eps", dtype=x0.dtype)}
        if steps > 1:
            more["step"] = (noise.uniform((), "dmd-step") * steps).floor()
            more["again"] = noise.normal((steps - 1, *x0.shape[1:]), "dmd-again", dtype=x0.dtype)
        return more

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        """See `Objective.losses`; of x0, the data, nothing is read."""
        if self.config.generates(beside.step):
            return self.generating(backbone, cond, draw, beside)
        return self.faking(cond, draw, beside)

    def generating(self, backbone: Trained, cond: Cond, draw: Draw, beside: Beside) -> Losses:
        """The generator's turn."""
        teacher, t = need_teacher(beside, self.config.kind), draw.more["time"]
        given, at = self.given(cond, draw, beside)
        x = self.clean(backbone, given, at, cond)
        with torch.no_grad():
            x_t = self.diffusion.perturb(x, draw.more["diffusing"], t)
            fake = self.jump(beside.networks[FAKE], x_t, t, torch.zeros_like(t), cond)[0]
            toward = direction(x, fake.x0, teacher(x_t, t, cond).x0)
        parts = {"matching": surrogate(x, toward) / x[0].numel()}
        if self.config.regression:
            end = teacher.walk(given, at, cond, WALK)
            parts["regression"] = self.config.regression * (x - end).float().square().flatten(1).mean(1)
        loss = torch.stack([*parts.values()]).sum(0)
        return Losses(loss, loss, parts)

    def faking(self, cond: Cond, draw: Draw, beside: Beside) -> Losses:
        """The fake network's turn."""
        t, eps = draw.more["time"], draw.more["diffusing"]
        with torch.no_grad():
            x = self.clean(bare(beside), *self.given(cond, draw, beside), cond)
        x_t = self.diffusion.perturb(x, eps, t)
        ends, _ = self.jump(beside.networks[FAKE], x_t, t, torch.zeros_like(t), cond)
        loss = self.error(ends, Denoised(x, eps), t)
        loss = match(self.weighting(self.diffusion, t), loss) * loss
        return Losses(loss, loss, {"fake": loss})

    def clean(self, network: Trained, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Where the generator's jump from t to the clean end lands."""
        end = torch.zeros_like(t)
        return mixed(self.diffusion.schedule, self.jump(network, x, t, end, cond)[0], end)

    @torch.no_grad()
    def given(self, cond: Cond, draw: Draw, beside: Beside) -> tuple[Tensor, Tensor]:
        """What the generator is given, and its times (B,): the noise of t = 1, or after steps of its own."""
        schedule, steps = self.diffusion.schedule, self.config.steps
        x, t = schedule.prior_std * draw.eps, torch.ones_like(draw.t)
        walked, now = x, t
        for step in range(1, steps):
            x0 = self.clean(bare(beside), walked, now, cond)
            now = schedule.trained(torch.full_like(t, 1 - step / steps))
            walked = self.diffusion.perturb(x0, draw.more["again"][:, step - 1], now)
            later = draw.more["step"] >= step
            x = torch.where(later.to(x.device).view(-1, *[1] * (x.ndim - 1)), walked, x)
            t = torch.where(later, now, t)
        return x, t

    def at(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor, beside: Beside = ALONE) -> Tensor:
        """As `FewStep.at`, from the next time of its grid, for at others the generator is never asked. Its distribution
        may be its teacher's, and its sample of one noise another: without `regression`, judge it by what it draws."""
        steps = self.config.steps
        on_grid = self.diffusion.schedule.trained((t * steps - 1e-9).ceil() / steps)
        return super().at(backbone, x0, cond, on_grid, eps, beside)


def bare(beside: Beside) -> Trained:
    """The generator, for what nothing is learned of."""
    assert beside.bare is not None
    return beside.bare


@dataclass(frozen=True, kw_only=True)
class DMDConfig(FewStepConfig, Checked):
    """Config of `DMD`: a generator of so many `steps`, drawn with as many; `fake_rate` times the learning rate is the
    fake network's; samples are compared at shares of noise between `low` and `high`, and `regression` weighs the mean
    square distance to the teacher's sample of the same noise, which steadies the training, as in the first DMD."""

    kind: Literal["dmd"] = "dmd"
    steps: int = 1
    fake_steps: int = 5
    fake_rate: float = 1.0
    low: float = 0.02
    high: float = 0.98
    regression: float = 0.0
    taught = "yes"
    own_grid = True
    reading = staticmethod(plainly)
    made = DMD
    limits: ClassVar = {"steps": "[1, inf)", "fake_steps": "[1, inf)", "fake_rate": "(0, inf)", "low": "(0, high)",
                        "high": "(low, 1)", "regression": "[0, inf)"}

    @property
    def drawn_in(self) -> tuple[int, ...]:
        """As many as it is trained with."""
        return (self.steps,)

    def generates(self, step: int) -> bool:
        """Whether a step of the training is the generator's turn."""
        return step % (self.fake_steps + 1) == 0

    def companions(self) -> Mapping[str, Companion]:
        return {FAKE: Companion(rate=self.fake_rate)}


OBJECTIVES = (DMDConfig,)
