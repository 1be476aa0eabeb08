"""Extras of a condition stay with their picture through all that joins, drops and mixes conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from algebra import F64, normal
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from autoencoder.norm import LatentNorm
from ldm.composition import beside, composed, two_scale
from ldm.conditioning import Cond
from ldm.coupling import MasaCtrl, paired
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.diffusion_classifier import DiffusionClassifier, best
from ldm.grids import Uniform
from ldm.guidance import GUIDANCES, Autoguidance, ByClassifier, ClassifierFree
from ldm.guiding import Guided, Helpers
from ldm.image_tasks import edit_friendly_inversion, inverted
from ldm.noise import Noise
from ldm.pipeline import Pipeline, Sampling
from ldm.predictions import Velocity
from ldm.samplers import DDPM, Euler
from ldm.schedules import Flow
from ldm.tasks import Reference, Task

HALF = torch.tensor(0.5, dtype=F64)
PLAN = Sampling(sampler=Euler(), grid=Uniform(), guidance=ClassifierFree(scale=3.0), steps=3)


class Shown:
    """A network that every part of its condition moves, sample by sample; it notes what images it was called with."""

    multiple, shares = 1, frozenset({"own", "cross"})

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def __call__(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        assert cond.image is not None and len(cond.image) == len(x)
        self.images.append(cond.image)
        words = (cond.context * cond.mask[..., None]).sum((1, 2))[:, None, None, None]
        image = adaptive_avg_pool2d(cond.image.to(x.dtype), x.shape[-2:])
        return torch.sin(x * (1 + words)) + torch.tanh(image * (2 + words) + x)


def denoiser() -> Denoiser:
    network: Any = Shown()
    return Denoiser(network, Diffusion(schedule=Flow(), prediction=Velocity()))


def told(seed: int, batch: int = 3, image: int | None = None) -> Cond:
    cond = Cond(normal(batch, 4, 2, seed=seed), torch.ones(batch, 4, dtype=torch.bool))
    return cond if image is None else cond._replace(extras={"image": normal(batch, 1, 8, 8, seed=image)})


X = normal(3, 2, 4, 4, seed=9)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_guidance_in_one_call_is_two_separate_calls() -> None:
    """With the extra in both halves: guidance removes the words and keeps the hint."""
    model, cond, null = denoiser(), told(1, image=5), told(2, batch=1)
    found = ClassifierFree(scale=3.0)(model, cond, null)(X, HALF)
    calls: Any = model.backbone
    assert len(calls.images) == 1 and torch.equal(calls.images[0], torch.cat([cond.extras["image"]] * 2))
    with_words = model(X, HALF, cond)
    without = model(X, HALF, null.expand(3)._replace(extras=cond.extras))
    for ours, a, b in zip(found[:2], with_words[:2], without[:2], strict=True):
        assert ours is not None and a is not None and b is not None
        close(ours, b + 3 * (a - b))


@pytest.mark.parametrize("kind", GUIDANCES, ids=lambda kind: kind.kind)
def test_every_guidance_shows_the_hint_in_every_call(kind: Any) -> None:
    model, weak = denoiser(), denoiser()
    cond, null = told(1, image=5), told(2, batch=1)
    seen: list[Cond] = []

    def judge(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append(cond)
        return x.flatten(1).sum(1)

    kind()(model, cond, null, Helpers(weak, judge))(X, HALF)
    calls: Any = [*model.backbone.images, *weak.backbone.images]  # type: ignore[union-attr]
    assert calls and all(torch.equal(part, cond.extras["image"]) for call in calls for part in call.split(3))
    assert bool(seen) == (kind is ByClassifier) and all(torch.equal(c.extras["image"], cond.extras["image"])
                                                      for c in seen)
    assert len(weak.backbone.images) == (kind is Autoguidance)  # type: ignore[union-attr]
    # A guidance inside of another keeps it, too.
    guided = Guided(ClassifierFree(scale=2.0), model, null)
    close(guided(X, HALF, cond).x0, ClassifierFree(scale=2.0)(model, cond, null)(X, HALF).x0)


def test_composition_keeps_it_and_drops_it_where_a_condition_has_one_of_its_own() -> None:
    model, cond, other, null = denoiser(), told(1, image=5), told(3, image=5), told(2, batch=1)
    bare = null.expand(3)._replace(extras=cond.extras)
    found = beside(ClassifierFree(scale=2.0), model, cond, [(other, 1.5)], null)(X, HALF).x0
    a, b, n = (model(X, HALF, c).x0 for c in (cond, other, bare))
    close(found, n + 2 * (a - n) + 1.5 * (b - n))
    blank = bare._replace(extras={"image": torch.zeros(3, 1, 8, 8, dtype=F64)})
    e = model(X, HALF, blank).x0
    close(two_scale(model, cond, bare, blank, 4.0, 2.0)(X, HALF).x0, e + 2 * (n - e) + 4 * (a - n))
    with pytest.raises(ValueError, match="same extras"):
        composed(model, [(cond, 1.0), (told(3), 1.0)], null)


def test_pairs_and_a_classifier_keep_it() -> None:
    both = paired(told(1, image=5), told(2, image=6))
    assert torch.equal(both.extras["image"][::2], told(1, image=5).extras["image"])
    assert torch.equal(both.extras["image"][1::2], told(2, image=6).extras["image"])
    model, cond = denoiser(), told(1, image=5)
    ask = DiffusionClassifier(denoiser=model, diffusion=model.diffusion, draws=2)
    scores = ask(lambda noise: X, Noise.from_seeds([1, 2, 3], "cpu"), cond)
    one = ask(lambda noise: X, Noise.from_seeds([1, 2, 3], "cpu"), cond.select(slice(1, 2)))
    close(scores[:, :, 1:2], one)
    assert best(scores, 1).sum() == 3


class Autoencoder(torch.nn.Module):
    factor, latent_channels, image_channels = 2, 2, 2

    def __init__(self) -> None:
        super().__init__()
        self.norm = LatentNorm(2)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2) / 4

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([adaptive_avg_pool2d(images, (images.shape[-2] // 2, images.shape[-1] // 2))] * 2, 1)


def text(captions: Sequence[str]) -> Cond:
    lengths = torch.tensor([float(len(caption)) for caption in captions])
    return Cond(lengths[:, None, None] / 10, torch.ones(len(captions), 1, dtype=torch.bool))


def pipeline() -> Pipeline:
    return Pipeline(Autoencoder(), denoiser(), text, PLAN, (8, 8))  # type: ignore[arg-type]


def images(count: int, seed: int = 4) -> Tensor:
    return normal(count, 1, 8, 8, seed=seed).float().abs()


def drawn(*args: Any, **how: Any) -> Tensor:
    return torch.cat(list(pipeline().pixels(*args, **how)))


@pytest.mark.parametrize("how", [{}, {"negative": "dull"}, {"also": [("more", 0.5)]}], ids=str)
def test_an_extra_goes_to_its_picture_whatever_the_batch(how: dict[str, Any]) -> None:
    captions, hints = ["a", "bb", "ccc"], images(3)
    whole = drawn(captions, 7, extras={"image": hints}, **how)
    assert torch.equal(drawn(captions, 7, extras={"image": hints}, batch_size=2, **how), whole)
    for i, caption in enumerate(captions):
        assert torch.equal(drawn(caption, [7 + i], extras={"image": hints[i : i + 1]}, **how), whole[i : i + 1])
    assert not torch.equal(drawn(captions, 7, extras={"image": hints.flip(0)}, **how), whole)
    one = drawn(captions, 7, extras={"image": hints[:1]}, **how)
    assert torch.equal(one, drawn(captions, 7, extras={"image": hints[:1].expand(3, -1, -1, -1)}, **how))
    latent_sized = {"image": hints[..., ::2, ::2]}
    assert drawn(captions, 7, extras=latent_sized, **how).shape == whole.shape


def test_a_reference_is_shown_what_its_picture_is_shown() -> None:
    hints, whole = images(3), pipeline()
    reference = Reference(MasaCtrl(below=0.0), ["other"])
    made = list(whole.pixels(["a", "bb", "ccc"], 7, extras={"image": hints}, batch_size=2,
                             task=lambda part: Task(reference=reference)))
    calls: Any = whole.denoiser.backbone
    assert torch.equal(calls.images[0][:4], hints[[0, 0, 1, 1]])  # of both halves of guidance
    assert torch.equal(calls.images[-1], hints[[2, 2, 2, 2]])
    assert torch.equal(torch.cat(made), drawn(["a", "bb", "ccc"], 7, extras={"image": hints}))


def test_a_task_of_another_size_asks_for_extras_of_its_size() -> None:
    task = lambda part: Task(shape=(2, 6, 4))  # noqa: E731
    assert drawn("a", 1, task=task, extras={"image": torch.zeros(1, 1, 12, 8)}).shape == (1, 2, 12, 8)
    with pytest.raises(ValueError, match="of 8x8 .* for pictures of 12x8 from latents of 6x4"):
        drawn("a", 1, task=task, extras={"image": torch.zeros(1, 1, 8, 8)})


def test_what_a_task_shows_is_not_given_besides() -> None:
    """A control's hint under the name of the image that the model is shown: one of them would be lost."""
    task = lambda part: Task(extras=lambda noise: {"image": images(1)})  # noqa: E731
    assert len(drawn("a", 1, task=task)) == 1
    with pytest.raises(ValueError, match="the task shows the extra 'image' itself"):
        drawn("a", 1, task=task, extras={"image": images(1)})


def test_copies_of_a_caption_have_its_extra() -> None:
    hints, whole = images(2), pipeline()
    made = whole(["a", "bb"], num_images_per_prompt=2, seed=3, extras={"image": hints}, batch_size=4)
    assert len(made) == 4
    calls: Any = whole.denoiser.backbone
    assert torch.equal(calls.images[0][:4], hints[[0, 0, 1, 1]])


def test_inversions_are_told_it() -> None:
    whole, hints = pipeline(), {"image": images(1)}
    picture = torch.full((1, 2, 8, 8), 99, dtype=torch.uint8)
    found = inverted(whole, picture.float() / 127.5 - 1, "a", extras=hints)
    other = inverted(whole, picture.float() / 127.5 - 1, "a", extras={"image": images(1, 5)})
    assert found.shape == (1, 2, 4, 4) and not torch.equal(found, other)
    plan = replace(PLAN, sampler=DDPM())
    task = edit_friendly_inversion(whole, picture, "a", strength=1.0, sampling=plan, extras=hints)
    (again,) = whole.pixels("a", 5, task=task, sampling=plan, extras=hints)
    (edited,) = whole.pixels("a", 5, task=task, sampling=plan, extras={"image": images(1, 5)})
    wanted = Autoencoder().decode(whole.autoencoder.norm.mean_latents(
        whole.encode(picture.float() / 127.5 - 1))).clamp(-1, 1)
    assert (again.float() / 127.5 - 1 - wanted).abs().max() < 0.02 and not torch.equal(again, edited)
