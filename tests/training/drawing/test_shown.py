"""Drawing with models that are shown an image: what they are given, what is said of it, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from autoencoder.images import to_unit
from ldm.conditioning import Cond
from ldm.image_tasks import encoded
from training.models.assembly import load_pipeline
from training.pictures import grids

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, another of its size, and a mask with a hole."""
    folder, numbers = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    hole = np.zeros((32, 32), dtype=np.uint8)
    hole[8:20, 4:16] = 255
    Image.fromarray(hole).save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def masked(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("masked") / "run"
    words = ["--latents", latents, "--output", run, *tiny.DENOISER, "--image.kind", "masked", "--max-steps", 2]
    assert tiny.call("train_denoiser", *words) == 0
    return run


@pytest.fixture(scope="module")
def source(masked: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser of sources, of latents whose sources are pictures of the same scenes, drawn otherwise."""
    root = tmp_path_factory.mktemp("source")
    numbers = np.random.default_rng(1)
    for folder in ("after", "before"):
        (root / folder).mkdir()
        for i in range(12):
            pixels = numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    pack = ["--hint", "picture", "--hint-files", root / "before", "--missing-caption", "filename", "--resolution", 32]
    packed = (root / "after", "--output", root / "packed", *pack, "--val-fraction", 0.3, "--num-workers", 1)
    assert tiny.call("make_shards", "pack", *packed) == 0
    encode = ["--autoencoder", latents / "autoencoder", "--data", root / "packed", "--output", root / "latents"]
    assert tiny.call("encode_latents", *encode, "--encode-hint", "--device", "cpu", "--num-workers", 0) == 0
    words = ["--latents", root / "latents", "--output", root / "run", *tiny.DENOISER, "--batch-size", 4]
    assert tiny.call("train_denoiser", *words, "--image.kind", "source", "--max-steps", 2) == 0
    return root / "run"


def draw(model: Path, output: Path, *words: object) -> tuple[list[Image.Image], dict[str, Any]]:
    common = ["--model", model, "--output", output, "--device", "cpu", "--prompt", "a red circle"]
    assert tiny.call("generate", *common, *words) == 0
    files = sorted(output.glob("0*.png"))
    return [Image.open(file).copy() for file in files], grids.facts(files[0])


def shown(run: Path) -> tuple[Any, list[Cond]]:
    """A pipeline of the run, and what its backbone is shown."""
    pipeline, seen = load_pipeline(run, "cpu"), list[Cond]()
    pipeline.denoiser.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[2]))  # type: ignore[attr-defined]
    return pipeline, seen


def pixels(file: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None]


def test_a_hole_is_filled_by_a_model_that_is_shown_it(masked: Path, pictures: Path, tmp_path: Path) -> None:
    hole = ("--image", pictures / "one.png", "--mask", pictures / "mask.png")
    (made,), facts = draw(masked, tmp_path / "one", *hole)
    inside = np.array(Image.open(pictures / "mask.png")) > 0
    source = np.array(Image.open(pictures / "one.png"))
    assert np.array_equal(np.array(made)[~inside], source[~inside]) and facts["inpaint"]["mask_sha256"]
    assert tiny.call("generate", "--like", tmp_path / "one" / "00000.png", *hole, "--model", masked, "--device", "cpu",
                     "--output", tmp_path / "again") == 0
    assert (tmp_path / "again" / "00000.png").read_bytes() == (tmp_path / "one" / "00000.png").read_bytes()


def test_what_the_model_is_shown_is_the_mask_and_the_latents_around_it(masked: Path, pictures: Path) -> None:
    from ldm.editing import filled, hole_in_latents
    from ldm.image_tasks import inpainting

    pipeline, seen = shown(masked)
    mask = torch.from_numpy(np.array(Image.open(pictures / "mask.png")) > 0)[None, None]
    one = Image.open(pictures / "one.png")
    list(pipeline.pixels(["a red circle"] * 2, task=inpainting(pipeline, [one], mask)))
    image = seen[0].extras["image"]
    assert len(image) == 4 and all(torch.equal(image[0], other) for other in image[1:])  # null and condition alike
    free = hole_in_latents(mask, 4, 1)
    known = encoded(pipeline, filled(to_unit(pixels(pictures / "one.png")), mask))
    assert torch.equal(image[:1, :1], free.float()) and torch.equal(image[:1, 1:], torch.where(free, 0, known))


def test_a_canvas_is_extended_whole_and_never_in_windows(masked: Path, pictures: Path, tmp_path: Path) -> None:
    (made,), _ = draw(masked, tmp_path / "wide", "--image", pictures / "one.png", "--outpaint", "0,0,16,0")
    assert made.size == (48, 32)
    hole = ("--image", pictures / "one.png", "--mask", pictures / "mask.png", "--windows", 4)
    words = ("--model", masked, "--output", tmp_path / "no", "--prompt", "x", "--device", "cpu")
    problem = tiny.refused("generate", *words, *hole)
    assert "draws no windows" in problem.what


def test_a_picture_is_changed_as_the_prompt_says(source: Path, pictures: Path, tmp_path: Path) -> None:
    words = ("--image", pictures / "one.png", "--guidance-scale", 3)
    (one,), facts = draw(source, tmp_path / "one", *words)
    assert facts["instruct"]["strength"] == 1 and facts["instruct"]["sha256"] and facts["image"] is None
    (scaled,), own = draw(source, tmp_path / "scaled", *words, "--image-guidance-scale", 1.5)
    assert own["settings"]["sample"]["image_scale"] == 1.5
    again = ("--like", tmp_path / "scaled" / "00000.png", "--image", pictures / "one.png", "--model", source)
    assert tiny.call("generate", *again, "--output", tmp_path / "again", "--device", "cpu") == 0
    assert np.array_equal(np.array(Image.open(tmp_path / "again" / "00000.png")), np.array(scaled))
    assert one.size == (32, 32)


def test_both_scales_reach_the_network_and_the_picture_its_input(source: Path, pictures: Path) -> None:
    from dataclasses import replace

    from ldm.shown_tasks import instructed

    pipeline, seen = shown(source)
    one = Image.open(pictures / "one.png")
    list(pipeline.pixels(["make it red"], task=instructed(pipeline, [one])))
    latents = encoded(pipeline, to_unit(pixels(pictures / "one.png")))
    assert torch.equal(seen[0].extras["image"], latents.expand(2, -1, -1, -1))
    seen.clear()
    plan = replace(pipeline.sampling, image_scale=1.5)
    list(pipeline.pixels(["make it red"], sampling=plan, task=instructed(pipeline, [one])))
    blank = seen[0].extras["image"].flatten(1).any(1).tolist()
    assert blank == [True] * 4 + [False] * 2


def test_without_an_image_it_is_refused_with_what_gives_one(
    masked: Path, source: Path, denoiser: Path, shapes: Path, pictures: Path, tmp_path: Path
) -> None:
    for run, kind, flags in ((masked, "masked", "--image FILE --mask FILE"), (source, "source", "--image FILE")):
        asked = ["generate", "--model", run, "--output", tmp_path / "no", "--device", "cpu", "--prompt", "x"]
        problem = tiny.refused(*asked)
        assert f"image.kind {kind}" in problem.what and problem.hint.endswith(flags)
        measured = tiny.refused("evaluate", "--model", run, "--data", shapes, "--device", "cpu")
        assert measured.what == problem.what
    wrong = ["generate", "--model", masked, "--output", tmp_path / "no", "--device", "cpu", "--image"]
    assert "image.kind masked" in tiny.refused(*wrong, pictures / "one.png", "--prompt", "x").what
    plain = ["generate", "--model", denoiser, "--output", tmp_path / "no", "--device", "cpu", "--prompt", "x"]
    assert "image_scale" in tiny.refused(*plain, "--image-guidance-scale", 2).what
