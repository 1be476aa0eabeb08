from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training.shapes.checker import check, read
from training.shapes.rendering import render  # fmt: skip
from training.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNT_WEIGHTS,
    HELD_OUT,
    INVERSE,
    POSITIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    scene,
)
from training.shapes.wording import captions, choose_captions, held_out_prompts, parse

SEEDS = range(400)


def soil(image: np.ndarray, seed: int) -> np.ndarray:
    """A 3x3 box blur and Gaussian noise of 8/255, as a small autoencoder leaves them."""
    padded = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    side = len(image)
    blurred = sum(padded[i : i + side, j : j + side] for i in range(3) for j in range(3)) / 9
    noise = np.random.default_rng(seed).normal(0, 8, image.shape)
    return np.clip(blurred + noise, 0, 255).astype(np.uint8)


def wrong_scene(drawn: Scene, seed: int) -> Scene:
    """The scene with one attribute that captions must say changed."""
    rng = np.random.default_rng(seed)
    item = drawn.objects[int(rng.integers(len(drawn.objects)))]
    kind = ("shape", "colour", "place")[seed % 3]
    if kind == "place" and drawn.relation:
        others = [relation for relation in INVERSE if relation != drawn.relation]
        return replace(drawn, relation=others[int(rng.integers(3))])
    name, options = {
        "shape": ("shape", SHAPES),
        "colour": ("colour", tuple(COLOURS)),
        "place": ("position", POSITIONS),
    }[kind]
    others = [option for option in options if option != getattr(item, name)]
    changed = replace(item, **{name: others[int(rng.integers(len(others)))]})
    return replace(drawn, objects=tuple(changed if other is item else other for other in drawn.objects))


@pytest.mark.parametrize("resolution", [32, 64])
def test_pictures_obey_every_caption(resolution: int) -> None:
    for seed in SEEDS:
        drawn = scene(seed)
        image = render(drawn, resolution)
        said = captions(drawn)
        for caption in (said[0], *choose_captions(drawn, 2, seed)):
            assert all(check(image, caption).values()), (seed, caption)


def test_soiled_pictures_obey() -> None:
    failures = sum(
        not all(check(soil(render(s), seed), captions(s)[0]).values()) for seed in SEEDS if (s := scene(seed))
    )
    assert failures <= 0.02 * len(SEEDS)


def test_wrong_captions_are_refused() -> None:
    accepted = 0
    for seed in SEEDS:
        drawn = scene(seed)
        accepted += check(soil(render(drawn), seed), captions(wrong_scene(drawn, seed))[0])["obeyed"]
    assert accepted <= 0.01 * len(SEEDS)


@pytest.mark.parametrize("said", ["size", "background"])
def test_wrong_size_or_background_is_seen(said: str) -> None:
    for seed in range(100):
        drawn = scene(seed, objects=1)
        item = drawn.objects[0]
        if said == "size":
            other = replace(drawn, objects=(replace(item, size=next(size for size in SIZES if size != item.size)),))
        else:
            other = replace(drawn, background=next(name for name in BACKGROUNDS if name != drawn.background))
        result = check(render(drawn), captions(other)[0])
        assert not result[said] and result["obeyed"]


def test_missing_and_extra_objects_are_refused() -> None:
    for seed in range(60):
        drawn = scene(seed, objects=3)
        fewer = render(replace(drawn, objects=drawn.objects[:2]))
        assert not check(fewer, captions(drawn)[0])["obeyed"]
        one = captions(replace(drawn, objects=drawn.objects[:1]))[0]
        result = check(render(drawn), one)
        assert not result["count"] and result["shape"] and not result["obeyed"]


@pytest.mark.parametrize("level", [0, 128, 255])
def test_empty_and_noise_pictures_are_refused(level: int) -> None:
    caption = captions(scene(1, objects=2))[0]
    assert not check(np.full((32, 32, 3), level, np.uint8), caption)["obeyed"]
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert not check(noise, caption)["obeyed"]


def test_a_disc_cut_in_half_is_no_circle() -> None:
    drawn = scene(0, objects=1)
    whole = replace(
        drawn,
        background="white",
        objects=(replace(drawn.objects[0], shape="circle", colour="red", x=0.5, y=0.5, extent=0.4),),
    )
    image = render(whole)
    assert read(image)[0].shape == "circle"
    image[:, 16:] = 255
    assert [seen.shape for seen in read(image)] != ["circle"]


def test_held_out_pairs() -> None:
    assert sorted(shape for _, shape in HELD_OUT) == sorted(SHAPES)
    assert len({colour for colour, _ in HELD_OUT}) == len(HELD_OUT)
    for seed in range(3000):
        assert not any((item.colour, item.shape) in HELD_OUT for item in scene(seed).objects)
    for count in (1, 2, 3):
        prompts = held_out_prompts(40, count)
        assert prompts == held_out_prompts(40, count) and len(set(prompts)) == 40
        assert prompts != held_out_prompts(40, count, seed=1)
        for prompt in prompts:
            wanted = parse(prompt).objects
            assert len(wanted) == count and sum((item.colour, item.shape) in HELD_OUT for item in wanted) == 1


def test_held_out_prompts_end_where_there_are_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        caption
        for colour, shape in HELD_OUT
        for position in POSITIONS
        for size in SIZES
        for background in BACKGROUNDS
        for caption in captions(Scene((Object(shape, colour, size, position, 0.5, 0.5, 0.4),), background))
    }
    assert len(said) == 2376
    assert set(held_out_prompts(2376, 1)) == said
    monkeypatch.setattr("training.shapes.wording.PATIENCE", 100)
    with pytest.raises(ValueError, match="2377 held-out captions of 1 objects asked for, there are"):
        held_out_prompts(2377, 1)


def test_parse_inverts_every_template() -> None:
    for seed in range(150):
        drawn = scene(seed)
        said = captions(drawn)
        assert len(set(said)) == len(said)
        for caption in said:
            assert caption == caption.lower()
            spec = parse(caption)
            objects = drawn.objects if spec.relation == drawn.relation else drawn.objects[::-1]
            assert [(o.shape, o.colour, o.position) for o in spec.objects] == [
                (o.shape, o.colour, o.position) for o in objects
            ]
            assert [o.size for o in spec.objects] in ([o.size for o in objects], [None] * len(objects))
            assert (spec.background is None) == (drawn.background not in caption.replace(" in ", " "))
        assert parse(said[0]).background == drawn.background


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a photo of a dress",
        "a red circle",
        "a red circle at the middle",
        "A red circle at the top",
        # fmt: skip
        "a red circle at the top and a blue square at the left",
        "a red circle near a blue square",
    ],
)
def test_foreign_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse(caption)


def test_scenes_are_determined_and_well_mixed() -> None:
    drawn = [scene(seed) for seed in range(3000)]
    assert drawn[:50] == [scene(seed) for seed in range(50)]
    assert np.array_equal(render(drawn[7]), render(scene(7)))
    shares = [np.mean([len(s.objects) == count for s in drawn]) for count in (1, 2, 3)]
    assert np.allclose(shares, COUNT_WEIGHTS, atol=0.03)
    seen = {(o.position, o.size) for s in drawn for o in s.objects if len(s.objects) == 1}
    assert len(seen) == len(POSITIONS) * len(SIZES)


def test_objects_keep_their_distance() -> None:
    for seed in range(500):
        items = scene(seed).objects
        for i, a in enumerate(items):
            assert a.extent / 2 <= a.x <= 1 - a.extent / 2 and a.extent / 2 <= a.y <= 1 - a.extent / 2
            for b in items[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) - (a.extent + b.extent) / 2 >= 2 / 32 - 1e-5


def test_too_small_a_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        render(scene(0), 16)
    with pytest.raises(ValueError, match="1, 2 or 3"):
        scene(0, objects=4)
