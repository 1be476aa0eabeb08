"""What a pipeline takes, and what it refuses before it draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from autoencoder.identity import Identity, IdentityAutoencoder
from autoencoder.norm import LatentNorm
from ldm.conditioning import Cond
from ldm.coupling import MasaCtrl
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.grids import Uniform
from ldm.guidance import Autoguidance, ByClassifier, ClassifierFree
from ldm.noise import Noise
from ldm.pipeline import Pipeline, Sampling
from ldm.predictions import Velocity
from ldm.samplers import Euler
from ldm.schedules import Flow
from ldm.tasks import Reference, Task
from ldm.thresholding import thresholded

DRAWN: list[int] = []
PLAN = Sampling(sampler=Euler(), grid=Uniform(), guidance=ClassifierFree(scale=2.0), steps=2)


class Backbone:
    multiple = 2

    def __call__(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        DRAWN.append(len(x))
        return x - cond.context[:, :1, :1, None]


class Autoencoder(torch.nn.Module):
    factor, latent_channels = 4, 3

    def __init__(self) -> None:
        super().__init__()
        self.norm = LatentNorm(3)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(latents, scale_factor=4.0) / 4


def text(captions: Sequence[str]) -> Cond:
    assert isinstance(captions, list)
    lengths = torch.tensor([float(len(caption)) for caption in captions])
    return Cond(lengths[:, None, None] / 10, torch.ones(len(captions), 1, dtype=torch.bool))


def pipeline() -> Pipeline:
    DRAWN.clear()
    denoiser: Any = Denoiser(Backbone(), Diffusion(schedule=Flow(), prediction=Velocity()))
    return Pipeline(Autoencoder(), denoiser, text, PLAN, (16, 24))  # type: ignore[arg-type]


def test_one_string_is_one_picture() -> None:
    (alone,) = pipeline().pixels("a red circle", seeds=7)
    (listed,) = pipeline().pixels(["a red circle"], seeds=7)
    assert alone.shape == (1, 3, 16, 24) and torch.equal(alone, listed)
    guided = pipeline().guided("a red circle")
    assert guided(torch.zeros(1, 3, 4, 6), torch.tensor(0.5, dtype=torch.float64)).x0.shape == (1, 3, 4, 6)


def test_seeds_may_be_any_whole_numbers_and_no_captions_are_no_pictures() -> None:
    wanted = torch.cat(list(pipeline().pixels(["a", "b"], [4, 5])))
    for seeds in (4, torch.tensor([4, 5]), torch.tensor(4), numpy.int64(4), numpy.array([4, 5]), (4, 5)):
        assert torch.equal(torch.cat(list(pipeline().pixels(iter(["a", "b"]), seeds))), wanted)  # type: ignore[arg-type]
    assert pipeline()([]) == []


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "fewer seeds": ({"seeds": [1, 2]}, "3 captions but 2 seeds"),
    "fewer negatives": ({"negative": ["x", "y"]}, "3 captions but 2 negative"),
    "more negatives": ({"negative": ["x"] * 4}, "3 captions but 4 negative"),
    "also without weights": ({"also": ["red"]}, "caption and its weight"),
    "a batch of none": ({"batch_size": 0}, "at least 1"),
    "a size off the factor": ({"size": (16, 30)}, r"size 16x30 \(height x width\) is .* by 8.* nearest 16x24 or 16x32"),
    "a size off the backbone's multiple": ({"size": (20, 24)}, "size 20x24 .* divisible by 8.* nearest 16x24 or 24"),
    "a size of nothing": ({"size": (0, -8)}, "size 0x-8 .* nearest 8"),
    "a side alone": ({"size": 16}, r"size must be \(height, width\)"),
    "captions that are no texts": ({"captions": [1, 2, 3]}, "captions and prompts are texts, got 1"),
    "negatives that are no texts": ({"negative": ["a", None, "b"]}, "texts, got None"),
    "seeds that are no numbers": ({"seeds": [1, 2.5, 3]}, "whole numbers"),
    "a seed that is none": ({"seeds": 1.5}, "whole numbers"),
    "a weight that is none": ({"also": [("red", float("nan"))]}, "finite weight"),
    "fewer extras": ({"extras": {"image": torch.zeros(2, 1, 16, 24)}}, "3 captions but 2 of the extra 'image'"),
    "an extra of another size": ({"extras": {"image": torch.zeros(1, 1, 24, 16)}},
                                 r"'image' is of 24x16 .* pictures of 16x24 from latents of 4x6"),
    "an extra of whole numbers": ({"extras": {"image": torch.zeros(1, 1, 16, 24, dtype=torch.uint8)}}, "in .0, 1."),
    "an extra that is none": ({"extras": {"image": "edges.png"}}, "must be a tensor"),
    "no grid of so many steps": ({"sampling": replace(PLAN, steps=0)}, "at least 1 step"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_at_the_call(case: str) -> None:
    """Not when the first batch is asked for, and not in a later batch."""
    asked, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        pipeline().pixels(**{"captions": ["a", "b", "c"], "batch_size": 2, **asked})
    assert DRAWN == []


def test_what_is_given_per_caption_goes_to_its_caption() -> None:
    captions, starts = ["a", "bb", "ccc"], torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    how = {"negative": ["", "x", "yy"], "task": lambda part: Task(start=starts[part]), "batch_size": 2}
    whole = torch.cat(list(pipeline().pixels(captions, [4, 5, 6], **how)))  # type: ignore[arg-type]
    last = {"task": lambda part: Task(start=starts[2:])}
    alone = pipeline().pixels("ccc", [6], negative=["yy"], **last)
    assert torch.equal(next(alone), whole[2:])
    assert not torch.equal(next(pipeline().pixels("ccc", [6], negative="", **last)), whole[2:])


def test_the_weaker_model_and_the_judge_reach_the_guidance_that_asks_for_them() -> None:
    """Autoguidance by the same denoiser changes nothing, by half of it something; a judge is asked of decoded pictures
    and of their own captions."""
    whole, asked = pipeline(), list[tuple[tuple[int, ...], list[str]]]()
    half: Any = Denoiser(lambda x, level, cond: 0.5 * (x - cond.context[:, :1, :1, None]), whole.denoiser.diffusion)

    def judge(images: Tensor, captions: Sequence[str]) -> Tensor:
        asked.append((tuple(images.shape), list(captions)))
        return images.flatten(1).sum(1)

    def drawn(guidance: Any, **parts: Any) -> Tensor:
        plan = replace(whole.sampling, guidance=guidance)
        return torch.cat(list(replace(whole, **parts).pixels(["a", "bb"], 3, sampling=plan)))

    plain = drawn(ClassifierFree(scale=1.0))
    assert torch.equal(drawn(Autoguidance(scale=3.0), weak=whole.denoiser), plain)
    assert not torch.equal(drawn(Autoguidance(scale=3.0), weak=half), plain)
    assert not torch.equal(drawn(ByClassifier(strength=3.0), judge=judge), plain)
    assert set(map(str, asked)) == {str(((2, 3, 16, 24), ["a", "bb"]))}
    for guidance in (Autoguidance(scale=3.0), ByClassifier()):
        with pytest.raises(ValueError, match="beside the denoiser"):
            drawn(guidance)


def test_the_fields_words_draw_the_same_pictures_bit_for_bit() -> None:
    drawn = pipeline()
    plan = replace(PLAN, steps=3, guidance=replace(PLAN.guidance, scale=5.0))
    ours = drawn(["a", "a", "bb", "bb"], [7, 8, 7, 8], negative="x", sampling=plan, size=(8, 16))
    theirs = drawn(prompt=["a", "bb"], seed=7, negative_prompt="x", num_inference_steps=3, guidance_scale=5.0,
                   height=8, width=16, num_images_per_prompt=2)  # fmt: skip
    assert [picture.size for picture in theirs] == [(16, 8)] * 4
    assert [picture.tobytes() for picture in ours] == [picture.tobytes() for picture in theirs]
    assert len({picture.tobytes() for picture in theirs}) == 4  # all of it has its effect
    (alone,) = drawn("bb", seed=8, negative_prompt="x", num_inference_steps=3, guidance_scale=5.0, height=8, width=16)
    assert alone.tobytes() == theirs[3].tobytes()
    assert alone.tobytes() != drawn("bb", seed=8, height=8, width=16)[0].tobytes()


def test_only_pixels_are_thresholded() -> None:
    """Latents have no range. In pixels what guidance is thresholded, in a plan as in the pipeline's own."""
    bounded = replace(PLAN, dynamic_threshold=0.995)
    with pytest.raises(ValueError, match="these are latents, which have none: leave it out"):
        replace(pipeline(), sampling=bounded)
    with pytest.raises(ValueError, match="these are latents"):
        pipeline().pixels(["a"], sampling=bounded)
    own = replace(pipeline(), autoencoder=IdentityAutoencoder(Identity()), sampling=bounded, size=(4, 4))
    x, t = 9 * torch.ones(1, 3, 4, 4), torch.tensor(0.5, dtype=torch.float64)
    free, held = (own.guided(["a"], plan=plan)(x, t).x0 for plan in (PLAN, None))
    assert free.abs().max() > 1 and torch.equal(held, thresholded(free, 0.995))
    other = own.guided(["a"], also=[("b", 2.0)])(x, t).x0
    assert other.abs().max() <= 1


def test_what_is_shown_goes_with_every_caption() -> None:
    """One picture for all or one each, with negative and further captions too, and in pairs; by the noise of each."""
    seen: list[Tensor] = []

    class Shown(Backbone):
        shares = frozenset({"own", "cross"})

        def __call__(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
            seen.append(cond.extras["image"][:, 0, 0, 0])
            return super().__call__(x, level, cond)

    own = pipeline()
    own = replace(own, denoiser=replace(own.denoiser, backbone=Shown()))
    one, each = torch.full((1, 1, 4, 6), 5.0), torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 4, 6)
    noises: list[Noise] = []

    def extras(noise: Noise) -> dict[str, Tensor]:
        noises.append(noise)
        return {"image": one if len(noise) == 1 else each[: len(noise)]}

    def drawn(captions: list[str], **how: Any) -> list[list[float]]:
        seen.clear()
        list(own.pixels(captions, seeds=7, **({"task": lambda part: Task(extras=extras)} | how)))
        return [shown.tolist() for shown in seen]

    assert drawn(["a"]) == [[5.0] * 2] * 2 and noises[-1].seeds.tolist() == [7]
    assert drawn(["a", "b", "c"]) == [[0, 1, 2, 0, 1, 2]] * 2
    assert drawn(["a", "b"], also=[("c", 0.5)])[0] == [0, 1] * 3
    pairs = Task(extras=extras, reference=Reference(MasaCtrl(), ["x"]))
    assert drawn(["a", "b", "c"], task=lambda part: pairs)[0][:6] == [0, 0, 1, 1, 2, 2]
