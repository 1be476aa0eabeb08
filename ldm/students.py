"""What a few-step model keeps of how it was taught, and what it therefore cannot be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ldm.arguments import Sampling
from ldm.guidance import Embedded
from ldm.guiding import Scaled
from ldm.jumps import SCALE, Jumping


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
        if len(self.scales) > 2 or any(not scale > 0 for scale in self.scales) or self.scales != tuple(
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
    def embedded(self) -> bool:
        """Whether it is told its scale."""
        return len(self.scales) == 2

    @property
    def reads(self) -> tuple[str, ...]:
        """The extras that its network is made to read for that."""
        return (SCALE,) if self.embedded else ()


NO_STUDENT = Student()


def check_plan(student: Student, plan: Sampling, denoiser: object) -> None:
    """Raises ValueError where a model was not taught to be drawn so."""
    guidance = plan.guidance
    if plan.sampler.jumps and not isinstance(denoiser, Jumping):
        raise ValueError(f"sampler {plan.sampler.kind} takes the steps of a few-step model, and this one was trained "
                         "to denoise: take --sampler dpmpp-2m, or teach a student with distill_denoiser")
    if student.steps and plan.steps not in student.steps:
        taught = " or ".join(map(str, student.steps))
        raise ValueError(f"this student was taught to draw in {taught} steps, not in {plan.steps}: give --steps "
                         f"{student.steps[-1]}, or draw with its teacher")
    if isinstance(guidance, Embedded) != student.embedded:
        raise ValueError(_other_guidance(student))
    if len(student.scales) == 1 and not (isinstance(guidance, Scaled) and guidance.scale == 1):
        raise ValueError(f"guidance at scale {student.scales[0]:g} is baked into this student, and a second one would "
                         "count twice: give --guidance-scale 1")
    if isinstance(guidance, Embedded) and not student.scales[0] <= guidance.scale <= student.scales[1]:
        low, high = student.scales
        raise ValueError(f"this student was taught guidance scales from {low:g} to {high:g}, not {guidance.scale:g}: "
                         f"give --guidance-scale {min(max(guidance.scale, low), high):g}")


def _other_guidance(student: Student) -> str:
    if student.embedded:
        return ("this student is told its guidance scale, and another guidance around it would count twice: give "
                "--guidance.kind embedded")
    return "only a student that was taught to be told its guidance scale takes guidance embedded: give --guidance-scale"


def check_negatives(student: Student, negatives: Sequence[str], also: bool) -> None:
    """Raises ValueError for negative prompts and further captions where they would do nothing, or the wrong thing."""
    if student.scales and any(negatives):
        raise ValueError("a negative prompt does nothing here: what this student moves away from was settled when it "
                         "was taught; leave it out, or draw with its teacher")
    if student.scales and also:
        raise ValueError("further captions are weighed against the empty one, and this student has taken its guidance "
                         "in: leave --also out, or draw with its teacher")
