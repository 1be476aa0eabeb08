"""Cascades: every stage reads the caption and has noise of its own, and sizes are checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoencoder.identity import Identity
from autoencoder.images import to_unit
from ldm.cascade import Cascade, Stage, stage_seeds
from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.grids import Uniform
from ldm.guidance import ClassifierFree
from ldm.image_conditions import ImageCondition, NoImage
from ldm.image_conditions.low_res import LowRes
from ldm.jumps import Jumping
from ldm.noise import Noise
from ldm.pipeline import Pipeline, Sampling
from ldm.predictions import X0
from ldm.samplers import DDIM, JumpSampler
from ldm.schedules import Flow
from ldm.students import Student
from ldm.upscaling import upscaling

CALLS: list[tuple[tuple[int, ...], float]] = []


class Backbone(nn.Module):
    """x0 is the caption's length, the picture that it is shown, if any, and a tenth of x."""

    multiple = 1

    def forward(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        CALLS.append((tuple(x.shape), cond.context[0, 0, 0].item()))
        shown = cond.image if cond.image is not None else 0
        return cond.context[:, :1, :1, None] + 0.5 * shown + 0.1 * x


def text(captions: Sequence[str]) -> Cond:
    lengths = torch.tensor([float(len(caption)) for caption in captions])
    return Cond(lengths[:, None, None] / 40, torch.ones(len(captions), 1, dtype=torch.bool))


def pipeline(side: int, image: ImageCondition = NoImage(), channels: int = 3) -> Pipeline:  # noqa: B008
    denoiser = Denoiser(Backbone(), Diffusion(schedule=Flow(), prediction=X0()))
    plan = Sampling(sampler=DDIM(), grid=Uniform(), guidance=ClassifierFree(scale=1.0), steps=3)
    CALLS.clear()
    return Pipeline(Identity(image_channels=channels).build(), denoiser, text, plan, (side, side),  # type: ignore[arg-type]
                    image=image)


def stages() -> list[Stage]:
    return [Stage(pipeline(4)), Stage(pipeline(8, LowRes(factor=2, level=0.1))),
            Stage(pipeline(32, LowRes(factor=4, level=0.3)), 0.2)]


def test_a_cascade_is_its_stages_one_after_the_other() -> None:
    """The first with the seeds as they are, which is what it draws alone; captions reach all of them."""
    captions, seeds = ["a", "bbb", "cc"], [5, 6, 7]
    one, two, three = stages()
    drawn = [torch.cat(part) for part in zip(*Cascade([one, two, three]).pixels(captions, seeds, batch_size=2),
                                            strict=True)]
    assert [tuple(part.shape) for part in drawn] == [(3, 3, 4, 4), (3, 3, 8, 8), (3, 3, 32, 32)]
    assert {round(said * 40) for _, said in CALLS} >= {1, 2}
    first = torch.cat(list(one.pipeline.pixels(captions, seeds)))
    assert torch.equal(drawn[0], first)
    task: Any = upscaling(two.pipeline, first, level=0.1)
    second = torch.cat(list(two.pipeline.pixels(captions, stage_seeds(seeds, 1), task=task)))
    assert torch.equal(drawn[1], second)
    task = upscaling(three.pipeline, second, level=0.2)
    assert torch.equal(drawn[2], torch.cat(list(three.pipeline.pixels(captions, stage_seeds(seeds, 2), task=task))))


def test_the_last_stage_can_be_drawn_by_others() -> None:
    whole = Cascade(stages())
    small = whole.before_last(["a", "bbb"], [5, 6])
    shown = whole.last(small)(slice(0, 2)).extras
    assert shown is not None and small.shape == (2, 3, 8, 8)
    assert shown(Noise.from_seeds([1, 2]))["image_level"].tolist() == pytest.approx([0.2, 0.2])
    assert torch.equal(next(iter(whole.pixels(["a", "bbb"], [5, 6])))[1], small)
    bare = Cascade([stages()[0], replace(stages()[1], level=0.0)]).last(small[..., :4, :4])(slice(0, 2)).extras
    assert bare is not None
    assert bare(Noise.from_seeds([1, 2]))["image"].mean().item() == pytest.approx(
        to_unit(small[..., :4, :4]).mean().item(), abs=0.05)


def test_no_two_stages_begin_from_the_same_noise() -> None:
    seeds = [0, 1, 2]
    each = [stage_seeds(seeds, number) for number in range(3)]
    assert each[0] == seeds and len({seed for own in each for seed in own}) == 9
    assert stage_seeds([1], 2) == [each[2][1]]


@pytest.mark.parametrize(("changed", "said"), [
    (lambda s: s[:1], "at least 2 stages, got 1"),
    (lambda s: s[1:], "draws from captions alone, and this one is shown an image of kind low-res"),
    (lambda s: [s[0], Stage(pipeline(8))], "image.kind none, and enlarges no pictures: give one of image.kind low-res"),
    (lambda s: [s[0], s[2]], "stage 2 of the cascade makes 32x32 pixels of 8x8, and the stage before it draws 4x4: "
                             "give one that draws 8x8, or an upscaler to 16x16"),
    (lambda s: [s[0], Stage(pipeline(8, LowRes(factor=2), 1))], "of 1 channels, .* before it draws 3"),
    (lambda s: [s[0], Stage(pipeline(8, LowRes(factor=2, augment=0.4)), 0.5)], r"must lie in \[0, 0.4\], which"),
])
def test_stages_that_cannot_follow_each_other_are_refused(changed: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Cascade(changed(stages()))
    assert not CALLS


def test_a_stage_that_is_a_student_jumps_and_takes_no_negative_prompt() -> None:
    """One call of each stage of one step; what the others could do is not asked of it."""
    first, *others = stages()[:2]
    plan = Sampling(sampler=JumpSampler(), grid=Uniform(), guidance=ClassifierFree(scale=1.0), steps=1)
    jumps = Jumping(first.pipeline.denoiser.backbone, first.pipeline.denoiser.diffusion, aim="next")
    student = Student(steps=(1,), guidance_scale=3.0)
    one = Stage(replace(first.pipeline, denoiser=jumps, sampling=plan, student=student))
    CALLS.clear()
    small, _ = next(iter(Cascade([one, *others]).pixels("a red circle", 3)))
    assert torch.equal(small, next(one.pipeline.pixels("a red circle", 3))) and len(CALLS) == 1 + 3 + 1
    with pytest.raises(ValueError, match="a negative prompt does nothing here"):
        next(iter(Cascade([one, *others]).pixels("a red circle", 3, negative="blue")))
