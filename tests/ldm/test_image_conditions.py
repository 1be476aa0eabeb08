"""Image conditions: each alone, and what all of them are held to."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Conditional
from ldm.diffusion import Denoised
from ldm.guidance import ClassifierFree
from ldm.image_conditions import IMAGE_CONDITIONS, ImageCondition
from ldm.image_conditions.base import without
from ldm.image_conditions.hint import Hint
from ldm.image_conditions.low_res import LowRes
from ldm.image_conditions.masked import Masked
from ldm.image_conditions.source import ImageGuided, Source
from ldm.noise import Noise
from ldm.schedules import Flow, NoiseSchedule

READ = [kind() for kind in IMAGE_CONDITIONS if kind.kind != "none"]
SEEDS = [3, 1 << 40, -7, 11, 12]


def data(batch: int = len(SEEDS)) -> tuple[Tensor, dict[str, Tensor], Noise]:
    """Latents of 4 x 8 x 6, and stored images that every kind can be made of."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(SEEDS), 4, 8, 6, generator=generator)
    stored = torch.rand(len(SEEDS), 4, 8, 6, generator=generator)
    return latents[:batch], {"image": stored[:batch], "other": stored[:batch]}, Noise.from_seeds(SEEDS[:batch])


@pytest.mark.parametrize("condition", READ, ids=lambda condition: condition.kind)
def test_every_kind_gives_what_it_says(condition: ImageCondition) -> None:
    latents, stored, noise = data()
    extras = condition.extras(latents, stored, noise)
    assert extras["image"].shape == (len(SEEDS), condition.channels(4, 4), 8, 6)
    assert extras["image"].dtype == latents.dtype and extras["image"].isfinite().all()
    assert torch.equal(extras["other"], stored["other"]) and ("image_level" in extras) == condition.told
    assert condition.inputs(4, 4) == {"image_channels": condition.channels(4, 4), "image_level": condition.told}
    if condition.told:
        assert extras["image_level"].shape == (len(SEEDS),)
        assert 0 <= extras["image_level"].min() <= extras["image_level"].max() <= 1


@pytest.mark.parametrize("condition", READ, ids=lambda condition: condition.kind)
def test_a_sample_s_image_is_its_own_and_the_same_again(condition: ImageCondition) -> None:
    latents, stored, noise = data()
    whole = condition.extras(latents, stored, noise)
    again = condition.extras(latents, stored, noise)
    for name, extra in whole.items():
        assert torch.equal(extra, again[name])
        for i in range(len(SEEDS)):
            one = slice(i, i + 1)
            own = {key: part[one] for key, part in stored.items()}
            alone = condition.extras(latents[one], own, noise[one])[name]
            torch.testing.assert_close(alone, extra[one], rtol=0, atol=0)


@pytest.mark.parametrize("condition", READ, ids=lambda condition: condition.kind)
def test_what_is_not_stored_is_asked_for(condition: ImageCondition) -> None:
    latents, stored, noise = data()
    del stored["image"]
    if not condition.stored:
        assert condition.extras(latents, stored, noise)["image"].shape[0] == len(SEEDS)
        return
    with pytest.raises(ValueError, match=f"{condition.kind} is made of extra-image.npy") as found:
        condition.extras(latents, stored, noise)
    assert condition.stored in str(found.value)


@pytest.mark.parametrize("condition", READ, ids=lambda condition: condition.kind)
def test_a_config_comes_back_from_its_own_words(condition: ImageCondition) -> None:
    settings = json.loads(json.dumps(asdict(condition)))
    (kind,) = [kind for kind in IMAGE_CONDITIONS if kind.kind == settings["kind"]]
    assert kind(**settings) == condition


@pytest.mark.parametrize(("kind", "settings", "words"), [
    (LowRes, {"factor": 1}, "low-res factor must be in"), (LowRes, {"augment": 1.5}, "augment must be in"),
    (LowRes, {"augment": 0.1}, r"level must be in \[0, augment\], got 0.2"),
    (Masked, {"whole": 0.7, "strokes": 0.4}, "must not exceed 1 together"),
    (Masked, {"smallest": 0.5, "largest": 0.4}, "largest must be in"), (Source, {"both_dropout": -1}, "both_dropout"),
    (Hint, {"hint_channels": -1}, "hint_channels"),
])
def test_settings_that_cannot_be_are_refused(kind: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(**settings)


def test_augmentation_leaves_the_picture_at_0_and_nothing_of_it_at_1() -> None:
    _, stored, noise = data()
    small, size, condition = 2 * stored["image"] - 1, (8, 6), LowRes()
    none = condition.shown(small, size, torch.zeros(len(SEEDS)), noise)
    assert torch.equal(none["image"], small)
    ones = torch.ones(len(SEEDS))
    all_of_it = condition.shown(small, size, ones, noise)["image"]
    assert torch.equal(all_of_it, condition.shown(-3 * small, size, ones, noise)["image"])
    assert torch.equal(all_of_it, noise.normal(small.shape[1:], "image-noise"))
    half = condition.shown(small, size, ones / 2, noise)
    torch.testing.assert_close(half["image"], (small + all_of_it) / 2)
    assert torch.equal(half["image_level"], ones / 2)
    drawn = condition.drawn(torch.zeros(len(SEEDS), 1, *size), stored, noise)
    assert torch.equal(drawn["image_level"], ones * 0.2)
    torch.testing.assert_close(drawn["image"], 0.8 * small + 0.2 * all_of_it)


def test_augmentation_in_training_is_uniform_and_told() -> None:
    count = 4000
    noise, latents = Noise(torch.arange(count)), torch.zeros(count, 1, 2, 2)
    extras = LowRes(augment=0.5, level=0.1).extras(latents, {"image": torch.full((count, 1, 2, 2), 0.5)}, noise)
    u = extras["image_level"]
    assert u.max() <= 0.5 and u.mean() == pytest.approx(0.25, abs=0.01) and u.std() == pytest.approx(0.1443, abs=0.01)
    torch.testing.assert_close(extras["image"], u[:, None, None, None] * noise.normal((1, 2, 2), "image-noise"))
    own = noise.uniform((1,), "image-level")[:, 0] / 2
    torch.testing.assert_close(u.double(), own, rtol=0, atol=1e-7)


def test_a_small_picture_is_enlarged_as_pil_enlarges() -> None:
    from PIL import Image

    pixels = torch.arange(16, dtype=torch.float32).view(4, 4).sin()
    shown = LowRes().shown(pixels[None, None], (16, 16), torch.zeros(1), Noise.from_seeds([0]))["image"]
    picture = Image.fromarray(pixels.numpy()).resize((16, 16), Image.Resampling.BICUBIC)
    wanted = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.float32).view(16, 16)
    torch.testing.assert_close(shown[0, 0], wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="4x4 would lose pixels in latents of 2x2"):
        LowRes().shown(pixels[None, None], (2, 2), torch.zeros(1), Noise.from_seeds([0]))


def test_a_mask_stands_before_the_latents_that_it_leaves() -> None:
    latents, _, noise = data()
    condition = Masked()
    image, hole = condition.extras(latents, {}, noise)["image"], condition.holes(noise, 8, 6)
    assert torch.equal(image[:, :1], hole.float()) and torch.equal(image[:, 1:], torch.where(hole, 0, latents))
    shown = condition.shown(latents, hole[:1])["image"]
    assert shown.shape == image.shape and torch.equal(shown[:, 0], hole[0].expand(len(SEEDS), 8, 6).float())


def test_the_shares_of_masks_are_those_of_the_config() -> None:
    count = 6000
    noise = Noise(torch.arange(count))

    def whole(**settings: float) -> float:
        return Masked(**settings).holes(noise, 8, 8).flatten(1).all(1).float().mean().item()

    assert whole(whole=0.25, strokes=0.0) == pytest.approx(0.25, abs=0.02)
    assert whole(whole=1.0, strokes=0.0) == 1 and whole(whole=0.0, strokes=0.0) == 0
    only = {"boxes": Masked(whole=0, strokes=0), "strokes": Masked(whole=0, strokes=1), "all": Masked(whole=0.25)}
    drawn = {name: condition.holes(noise, 8, 8) for name, condition in only.items()}
    assert all(holes.flatten(1).any(1).all() for holes in drawn.values())
    stroked = (drawn["all"] == drawn["strokes"]).flatten(1).all(1)
    boxed = (drawn["all"] == drawn["boxes"]).flatten(1).all(1)
    shares = stroked.float().mean().item(), boxed.float().mean().item()
    assert shares == pytest.approx((0.25, 0.5), abs=0.02)


def test_a_box_is_a_box_of_the_sizes_asked_for() -> None:
    holes = Masked(whole=0, strokes=0, smallest=0.25, largest=0.5).holes(Noise(torch.arange(500)), 16, 32)[:, 0]
    rows, columns = holes.any(2), holes.any(1)
    assert torch.equal(holes, rows[:, :, None] & columns[:, None])
    for side, count in ((rows, 16), (columns, 32)):
        length, first = side.sum(1), side.long().argmax(1)
        last = count - side.flip(1).long().argmax(1)
        assert torch.equal(last - first, length)  # no gap
        assert length.min() >= count / 4 and length.max() <= count / 2 + 2  # cells that it only touches are in it
        assert first.min() == 0 and last.max() == count


def test_sources_are_left_out_as_often_as_said_and_captions_with_them() -> None:
    noise, condition = Noise(torch.arange(20_000)), Source(image_dropout=0.05, both_dropout=0.1)
    image, both = condition.left_out(noise)
    assert image.float().mean() == pytest.approx(0.15, abs=0.01) and both.float().mean() == pytest.approx(0.1, abs=0.01)
    assert not (both & ~image).any()
    assert Masked().left_out(noise) is None
    latents, stored, noise = data()
    lost = torch.tensor([True, False, False, True, False])
    kept = without(stored, lost)
    assert not kept["image"][lost].any() and torch.equal(kept["image"][~lost], stored["image"][~lost])
    assert kept["other"] is stored["other"]
    with pytest.raises(ValueError, match=r"extra-image.npy is 4x8x6, latents are 4x4x3: .*--encode-hint"):
        Source().extras(latents[..., ::2, ::2], stored, noise)


def test_the_channels_of_a_hint_are_those_of_the_data() -> None:
    one = Hint(hint_channels=1)
    assert Hint().settled(1) == one == one.settled(1) == one.settled(0)
    assert Hint().settled(0).channels(4, 3) == 3 and Masked().settled(1) == Masked()
    with pytest.raises(ValueError, match="image.hint_channels is 3, the hints of these latents have 1"):
        Hint(hint_channels=3).settled(1)


def test_a_line_of_one_pixel_stays_in_a_hint() -> None:
    hint = torch.zeros(1, 3, 32, 32)
    hint[..., 13, :] = 1
    image = Hint().shown(hint, (8, 8))["image"]
    assert torch.equal(image[0, 0], torch.eye(8)[3][:, None].expand(8, 8)) and Hint(hint_channels=1).channels(4, 3) == 1


class Told(Conditional):
    """x0 = a x + words + picture + words x picture: no two of the answers of InstructPix2Pix are alike."""

    calls: list[int]

    def __init__(self) -> None:
        self.calls = []

    @property
    def schedule(self) -> NoiseSchedule:
        return Flow()

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        self.calls.append(len(x))
        words, image = cond.context.mean((1, 2))[:, None, None, None], cond.extras["image"]
        x0 = 0.3 * x + words + image.sin() + words * image
        return Denoised(x0, (x - (1 - t) * x0) / t)


def test_two_scales_are_the_three_terms_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, t, image = draw(3, 2, 4, 4), torch.tensor(0.6, dtype=torch.float64), draw(3, 2, 4, 4)
    mask = torch.ones(3, 5, dtype=torch.bool)
    cond = Cond(draw(3, 5, 8), mask, extras={"image": image})
    null = Cond(draw(1, 5, 8), mask[:1])
    plain, (s_image, s_text) = Told(), (1.7, 5.0)
    guided = ClassifierFree(scale=s_text)(ImageGuided(plain, null, s_image), cond, null)(x, t)
    blank = cond.absence(null)._replace(extras={"image": torch.zeros_like(image)})
    nothing, of_image, both = (plain(x, t, c) for c in (blank, cond.absence(null), cond))
    for got, e, e_image, e_both in zip(guided[:2], nothing[:2], of_image[:2], both[:2], strict=True):
        wanted = e + s_image * (e_image - e) + s_text * (e_both - e_image)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close((1 - t) * guided.x0 + t * guided.eps, x, rtol=0, atol=1e-12)


def test_an_image_scale_of_1_is_the_denoiser_and_costs_nothing() -> None:
    x, t = torch.ones(2, 2, 4, 4), torch.tensor(0.5)
    cond = Cond(torch.ones(2, 1, 8), torch.ones(2, 1, dtype=torch.bool), extras={"image": torch.ones(2, 2, 4, 4)})
    plain = Told()
    wrapped = ImageGuided(plain, cond.select(slice(1))._replace(extras={}), 1.0)
    assert torch.equal(wrapped(x, t, cond).x0, plain(x, t, cond).x0) and plain.calls == [2, 2]
    with pytest.raises(ValueError, match="image_scale .* 'image', and none is given"):
        replace(wrapped, scale=2.0)(x, t, cond._replace(extras={}))
    replace(wrapped, scale=2.0)(x, t, cond)
    assert plain.calls[2:] == [6] and wrapped.schedule == plain.schedule
