"""What the objectives of few-step models share: a student that jumps, times drawn for it, and how errors are counted.

All is said in pairs (x0, eps), so that it holds for every process and prediction: a target is a pair, often the `chord`
between two points of the teacher's way, and what it costs to miss it is the square error of the network's own
prediction, times the weighting.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Network
from ldm.diffusion import Denoised, Diffusion
from ldm.jumps import Jumping, mixed
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Draw, Losses, Objective, ObjectiveConfig, Trained
from ldm.pairing import Pairing
from ldm.representation import Represented
from ldm.schedules import match
from ldm.teacher import Teacher
from ldm.times import Places, TimeSampling
from ldm.uncertainty import Weighed
from ldm.weighting import Weighting

WALK = 8  # steps of the teacher's way that a validation holds a student to


@dataclass(frozen=True, kw_only=True)
class FewStep(Objective):
    """An objective whose network jumps. `config` says how it is read; ValueError where the variance is learned."""

    diffusion: Diffusion
    times: TimeSampling
    weighting: Weighting
    config: ObjectiveConfig

    def __post_init__(self) -> None:
        if self.diffusion.learned_variance:
            raise ValueError("a few-step model has no use for a learned variance: take a model without it, of "
                             "backbone.learned_variance false, as teacher or to begin with")

    def draw(self, x0: Tensor, noise: Noise, places: Places | None = None, seen: Tensor | None = None,
             cond: Cond | Sequence[str] | None = None) -> Draw:
        """See `Objective.draw`; ValueError where stratified times lack the places of their samples."""
        t, factor = self.times.drawn(noise, self.diffusion.schedule, places, seen)
        eps = noise.normal(x0.shape[1:], "eps", dtype=x0.dtype)
        return Draw(t, eps, factor, self.further(x0, noise))

    @abstractmethod
    def further(self, x0: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        """What else a member draws, under keys of its own."""

    def student(self, network: Network) -> Jumping:
        """A network of this objective as what it is drawn with."""
        jumping = self.config.denoiser(network, self.diffusion)
        assert isinstance(jumping, Jumping)
        return jumping

    def jump(self, network: Trained, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> tuple[Denoised, Tensor | None]:
        """Its jump from t to s; and the logarithm of its expected loss, (B,), where that is learned."""
        expected: list[Tensor] = []

        def plain(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
            answer = network(x, level, cond)
            if isinstance(answer, Weighed):
                expected.append(answer[1])
                return answer[0]
            assert not isinstance(answer, Represented)  # refused of few-step models
            return answer

        ends = self.student(plain).jump(x, t, s, cond)
        return ends, expected[0] if expected else None

    def error(self, ends: Denoised, goal: Denoised, t: Tensor) -> Tensor:
        """The mean square error of the network's prediction, (B,): of two pairs that make up the same x_t."""
        wrong = self.diffusion.target(ends.x0 - goal.x0, ends.eps - goal.eps, t)
        return wrong.float().square().flatten(1).mean(1)

    def counted(self, error: Tensor, draw: Draw, expected: Tensor | None = None) -> Losses:
        """Weighed by noise level, and by what the network expects where it does."""
        loss = match(self.weighting(self.diffusion, draw.t), error) * error
        if expected is not None:
            loss = loss * (-expected).exp() + expected
        return Losses(match(draw.factor, loss) * loss, loss)

    def answered(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw) -> tuple[Tensor, Draw]:
        raise ValueError("a few-step model answers where x_t goes, and no noise makes its answer a sample: "
                         "prior.target answers needs a base that was trained to denoise")

    def at(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor, beside: Beside = ALONE) -> Tensor:
        """How far one jump to the clean end lands from where the teacher's way ends, or without a teacher from x0: the
        mean square distance."""
        x_t = self.diffusion.perturb(x0, eps, t)
        end = x0 if beside.teacher is None else beside.teacher.walk(x_t, t, cond, WALK)
        clean = torch.zeros_like(t)
        ends, _ = self.jump(backbone, x_t, t, clean, cond)
        return (mixed(self.diffusion.schedule, ends, clean) - end).float().square().flatten(1).mean(1)


def unweighed(answer: Any) -> Tensor:
    """The prediction of an answer that may come with its expected loss."""
    prediction: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return prediction


def need_teacher(beside: Beside, kind: str) -> Teacher:
    """The teacher. Raises ValueError where there is none."""
    if beside.teacher is None:
        raise ValueError(f"objective.kind {kind} learns from a trained model: distill_denoiser --teacher RUN")
    return beside.teacher


@dataclass(frozen=True, kw_only=True)
class FewStepConfig(ObjectiveConfig):
    """The config of a `FewStep`, built of the class that `made` says."""

    @property
    @abstractmethod
    def made(self) -> type[FewStep]:
        """The objective."""

    def build(self, *, diffusion: Diffusion, times: TimeSampling, weighting: Weighting, pairing: Pairing) -> FewStep:
        """See `ObjectiveConfig.build`; ValueError for a pairing, which a student's noise has none of."""
        if pairing.kind != "independent":
            raise ValueError(f"pairing.kind {pairing.kind}: a few-step model is taught with independent noise")
        return self.made(diffusion=diffusion, times=times, weighting=weighting, config=self)

