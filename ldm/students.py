"""What a few-step model keeps of how it was taught, and what it therefore cannot be asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.arguments import Sampling
from ldm.conditioning import Cond
from ldm.denoiser import Around, Conditional, Denoise, Denoiser
from ldm.diffusion import Denoised
from ldm.grids import Uniform
from ldm.guidance import Embedded, told_scale
from ldm.guiding import Scaled
from ldm.jumps import SCALE, Jumping, jumps
from ldm.samplers import Sampler
from ldm.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Student:
    """How many `steps` it was taught to be drawn in, none meaning any; and the `guidance_scale` of its teacher that it
    has taken in: none, one that is baked into it, or the ends (low, high) of the range in which it is told one.

    `learns_from` "data": no teacher is asked, whose weights it may begin with all the same, where its objective can.
    """

    steps: tuple[int, ...] = ()
    guidance_scale: float | tuple[float, ...] = ()
    learns_from: Literal["teacher", "data"] = "teacher"

    def __post_init__(self) -> None:
        if len(self.scales) > 2 or any(not 0 < scale < math.inf for scale in self.scales) or self.scales != tuple(
                sorted(set(self.scales))):
            raise ValueError("guidance_scale must be one number above 0, or two that rise: the ends of a range; got "
                             f"{list(self.scales)}")
        if any(steps < 1 for steps in self.steps):
            raise ValueError(f"steps must be at least 1, got {list(self.steps)}")

    @property
    def scales(self) -> tuple[float, ...]:
        """No scale, one, or the ends of a range."""
        return self.guidance_scale if isinstance(self.guidance_scale, tuple) else (float(self.guidance_scale),)

    @property
    def baked(self) -> float | None:
        """The scale that is in it once and for all; of 1, which is no guidance, there is nothing in it."""
        return self.scales[0] if len(self.scales) == 1 and self.scales[0] != 1 else None

    @property
    def guided(self) -> bool:
        """Whether it has taken guidance in, so that another one would count twice."""
        return self.embedded or self.baked is not None

    @property
    def embedded(self) -> bool:
        """Whether it is told its scale."""
        return len(self.scales) == 2

    @property
    def words(self) -> str:
        """Its steps and its guidance, for people."""
        steps = f"drawn in {in_steps(self.steps)}"
        if self.embedded:
            return f"{steps}, told a guidance scale from {self.scales[0]:g} to {self.scales[1]:g}"
        return f"{steps}, guidance at scale {self.baked:g} baked in" if self.guided else f"{steps}, no guidance in it"

    @property
    def reads(self) -> tuple[str, ...]:
        """The extras that its network is made to read for that."""
        return (SCALE,) if self.embedded else ()


NO_STUDENT = Student()


def in_steps(steps: Sequence[int]) -> str:
    """Numbers of steps, for people; none are any."""
    several = "any number of" if not steps else " or ".join(map(str, steps))
    return f"{several} step{'' if several == '1' else 's'}"


def check_plan(student: Student, plan: Sampling, denoiser: Denoiser) -> None:
    """Raises ValueError where a model was not taught to be drawn so."""
    guidance = plan.guidance
    if plan.sampler.jumps and not isinstance(denoiser, Jumping):
        raise ValueError(f"sampler {plan.sampler.kind} takes the steps of a few-step model, and this one was trained "
                         "to denoise: take --sampler dpmpp-2m, or teach a student with distill_denoiser")
    if student.steps and plan.steps not in student.steps:
        raise ValueError(f"this student was taught to draw in {in_steps(student.steps)}, not in {plan.steps}: give "
                         f"--steps {student.steps[-1]}, or draw with its teacher")
    if isinstance(guidance, Embedded) != student.embedded:
        raise ValueError(_other_guidance(student))
    if student.baked is not None and not (isinstance(guidance, Scaled) and guidance.scale == 1):
        instead = "give --guidance-scale 1" if isinstance(guidance, Scaled) else "leave --guidance.kind out"
        raise ValueError(f"guidance at scale {student.baked:g} is baked into this student, and a second one would "
                         f"count twice: {instead}")
    if isinstance(guidance, Embedded) and not student.scales[0] <= guidance.scale <= student.scales[1]:
        low, high = student.scales
        raise ValueError(f"this student was taught guidance scales from {low:g} to {high:g}, not {guidance.scale:g}: "
                         f"give --guidance-scale {min(max(guidance.scale, low), high):g}")
    if student.guided and plan.image_scale != 1:
        raise ValueError("this student has taken its guidance in, and a second one, by the picture, would count twice: "
                         "set image_scale to 1, or draw with its teacher")
    if isinstance(denoiser, Jumping):
        _check_steps(plan, denoiser)
        _check_hidden(plan, denoiser)


def _check_steps(plan: Sampling, denoiser: Jumping) -> None:
    """Raises ValueError for steps that are not those of the jumps that a model was taught."""
    kind, aim, several = plan.sampler.kind, denoiser.aim, plan.steps > 1
    if not plan.sampler.jumps and not denoiser.denoises:
        own = "jump" if aim == "next" else "consistency"
        raise ValueError(f"sampler {kind} asks what a noisy sample may have been, and this student answers where it "
                         f"goes: give --sampler {own}, or draw with its teacher")
    if several and (kind, aim) in (("consistency", "next"), ("consistency", "none")):
        raise ValueError("sampler consistency goes to the clean end at each step, and this student was taught to get "
                         "there step by step: give --sampler jump")
    if several and (kind, aim) == ("jump", "clean"):
        raise ValueError("sampler jump goes on from where it is, and this student was taught to go to the clean end: "
                         "give --sampler consistency, which adds noise on the way back")
    if aim == "next" and getattr(plan.sampler, "noise", False):
        raise ValueError("noise of the sampler jump lets it jump farther than it goes, and this student was taught the "
                         "steps of its own grid alone: give --sampler.noise 0")
    if denoiser.own_grid:
        times, taught = (grid(plan.steps, denoiser.schedule) for grid in (plan.grid, Uniform()))
        if not torch.allclose(times, taught, rtol=0, atol=1e-9):
            raise ValueError(f"this student was taught the steps of the grid uniform, and {plan.grid.kind} visits "
                             "others: give --grid.kind uniform, without a shift")


def _check_hidden(plan: Sampling, denoiser: Jumping) -> None:
    """Raises ValueError for a guidance that mixes answers, of which a jump knows nothing."""
    if not plan.sampler.jumps:
        return
    guidance, told = plan.guidance, isinstance(plan.guidance, Embedded)
    off = told or (guidance.scale == 1 if isinstance(guidance, Scaled) else getattr(guidance, "strength", 1) == 0)
    if off and plan.image_scale == 1:
        return
    what = f"guidance {guidance.kind}" if not off else "guidance by the picture (image_scale)"
    raise ValueError(f"{what} mixes what is answered at one time, and the sampler {plan.sampler.kind} asks where x "
                     f"goes: set its scale to 1{_or_denoise(denoiser)}")


def _or_denoise(denoiser: Denoiser) -> str:
    return ", or take --sampler dpmpp-2m with more --steps" if _denoises(denoiser) else ", or draw with its teacher"


def _denoises(denoiser: Denoiser) -> bool:
    return not isinstance(denoiser, Jumping) or denoiser.denoises


def check_held(denoiser: Denoiser, sampler: Sampler, denoise: Denoise) -> None:
    """Raises ValueError where what a drawing is held to, as a measurement, hides the jumps that the sampler asks for.
    """
    if sampler.jumps and not jumps(denoise):
        raise ValueError(f"what this drawing is held to corrects what is answered at one time, and the sampler "
                         f"{sampler.kind} asks where x goes: {_or_denoise(denoiser).removeprefix(', or ')}")


def check_walk(denoiser: Denoiser, task: Task, times: Tensor, grid: Tensor) -> None:
    """Raises ValueError where a few-step model would see nothing of a picture that it begins from, or all of it; and
    where it would begin between the times of the grid that it was taught."""
    if not isinstance(denoiser, Jumping) or not task.parted:
        return
    several = [f"{t:g}" for t in grid[1:-1].tolist()] if denoiser.own_grid else []
    instead = f"give --start-time {' or '.join(several)}" if several else "draw with its teacher"
    instead = instead if denoiser.own_grid else "give --start-time T, a time between"
    if task.start_time is None and len(times) in (1, len(grid)):
        share = "all" if len(times) == len(grid) else "none"
        raise ValueError(f"strength {task.strength:g} of {in_steps([len(grid) - 1])} is {share} of the way, from noise "
                         f"alone to the picture itself: {instead}")
    if denoiser.own_grid and task.start_time is not None and not any((times[0] - grid).abs() < 1e-9):
        raise ValueError(f"this student was taught to go on from the times of its own grid alone, not from "
                         f"{task.start_time:g}: {instead}")


def check_denoises(denoiser: Denoiser, what: str) -> None:
    """Raises ValueError where a few-step model's answers are not those of a denoiser, which `what` is made of."""
    if not _denoises(denoiser):
        raise ValueError(f"{what} asks what a noisy sample may have been, and this student answers where it goes: take "
                         "its teacher")


def unguided(student: Student, denoiser: Denoiser, what: str) -> Conditional:
    """The denoiser of the data, as `what` needs it: a student with a range of scales is told scale 1. Raises ValueError
    where it is none, or no longer without guidance."""
    check_denoises(denoiser, what)
    if student.embedded and student.scales[0] <= 1 <= student.scales[1]:
        return Told(denoiser)
    if student.guided:
        scale = " to ".join(f"{scale:g}" for scale in student.scales)
        raise ValueError(f"{what} asks for the data's own denoiser, and this student has taken in guidance of scale "
                         f"{scale}: take its teacher")
    return denoiser


@dataclass(frozen=True)
class Told(Around):
    """A student that is told its guidance scale, told one and the same."""

    denoiser: Conditional
    scale: float = 1.0

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        return self.denoiser(x, t, told_scale(cond, self.scale))


def _other_guidance(student: Student) -> str:
    if student.embedded:
        return ("this student is told its guidance scale, and another guidance around it would count twice: give "
                "--guidance.kind embedded")
    return ("guidance embedded tells a student its scale, and this model was not taught to be told one: leave "
            "--guidance.kind out, or give --guidance.kind classifier-free")


def check_negatives(student: Student, plan: Sampling, denoiser: Denoiser, negatives: Sequence[str],
                    also: bool) -> None:
    """Raises ValueError for negative prompts and further captions where they would do nothing, or the wrong thing."""
    if student.guided and any(negatives):
        raise ValueError("a negative prompt does nothing here, for what this student moves away from was settled when "
                         "it was taught: leave it out, or draw with its teacher")
    if student.guided and also:
        raise ValueError("further captions are weighed against the empty one, and this student has taken its guidance "
                         "in: leave --also out, or draw with its teacher")
    if also and plan.sampler.jumps:
        raise ValueError(f"further captions mix what is answered at one time, and the sampler {plan.sampler.kind} asks "
                         f"where x goes: leave --also out{_or_denoise(denoiser)}")
