"""Pictures edited and restored from the command line: what is kept, what a PNG says of it, what is refused."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from training.drawing.starts import TOLD
from training.pictures import grids
from training.settings.families import kinds

FAST = ("--steps", 2, "--device", "cpu")


def picture(path: Path, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """A noisy picture of `size` (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path: Path, size: tuple[int, int] = (32, 32), box: tuple[int, int, int, int] = (8, 8, 20, 16)) -> Path:
    """White in `box` (left, top, right, bottom)."""
    image = Image.new("L", size, 0)
    image.paste(255, box)
    image.save(path)
    return path


def draw(run: Path, output: Path, *words: object) -> Path:
    assert tiny.call("generate", "--model", run, "--output", output, *FAST, *words) == 0
    return output / "00000.png"


def refused(run: Path, folder: Path, *words: object) -> Any:
    problem = tiny.refused("generate", "--model", run, "--output", folder / "refused", *FAST, *words)
    assert problem.hint and not (folder / "refused").exists()
    return problem


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_folder_goes_in_and_a_folder_comes_out(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each picture with its own caption and at its own size."""
    source = tmp_path / "in"
    source.mkdir()
    for index, (name, size) in enumerate({"cat": (32, 32), "dog": (32, 32), "wide": (45, 32)}.items()):
        picture(source / f"{name}.png", size, index)
        (source / f"{name}.txt").write_text(f"a {name}\n")
    draw(denoiser, tmp_path / "out", "--image", source, "--strength", 0.5)
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["00000-cat.png", "00001-dog.png", "00002-wide.png", "grid.png"]
    facts = grids.facts(tmp_path / "out" / "00002-wide.png")
    assert facts["prompt"] == "a wide" and facts["size"] == [32, 45]
    assert facts["image"]["strength"] == 0.5 and facts["image"]["name"] == "wide.png"
    said = capsys.readouterr().err
    assert "replaced 1: pictures drawn on a canvas that 8 divides, then cut back (45x32)" in said
    assert "guessed 1: drawn at another size than the trained 32x32" in said
    (source / "dog.txt").unlink()
    problem = refused(denoiser, tmp_path, "--image", source)
    assert problem.what == "dog.png has no caption" and "--prompt TEXT" in problem.hint
    draw(denoiser, tmp_path / "told", "--image", source, "--prompt", "a bird", "--num-images", 2)
    assert len(list((tmp_path / "told").glob("0*.png"))) == 6


def test_strength_one_is_the_prompt_alone_and_zero_the_picture(denoiser: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "source.png")
    plain = draw(denoiser, tmp_path / "plain", "--prompt", "a")
    for index, words in enumerate((("--strength", 1), ("--start-time", 1))):
        same = draw(denoiser, tmp_path / f"same{index}", "--prompt", "a", "--image", source, *words)
        assert np.array_equal(pixels(same), pixels(plain))
    zero = draw(denoiser, tmp_path / "zero", "--prompt", "a", "--image", source, "--strength", 0)
    other = draw(denoiser, tmp_path / "other", "--prompt", "b", "--seed", 3, "--image", source, "--strength", 0)
    assert np.array_equal(pixels(zero), pixels(other)) and not np.array_equal(pixels(zero), pixels(plain))


def test_pixels_outside_the_mask_are_those_of_the_file(denoiser: Path, tmp_path: Path) -> None:
    source, hole = picture(tmp_path / "source.png", (37, 30)), mask(tmp_path / "mask.png", (37, 30))
    inside = pixels(hole) > 127
    for index, words in enumerate(((), ("--feather", 2), ("--invert-mask",), ("--fill", "grey"), ("--strength", 0.5))):
        made = draw(denoiser, tmp_path / str(index), "--prompt", "a", "--image", source, "--mask", hole, *words)
        new = ~inside if "--invert-mask" in words else inside
        wide = torch.nn.functional.max_pool2d(torch.tensor(new)[None].float(), 5, stride=1, padding=2)[0].numpy() > 0
        near = wide if "--feather" in words else new
        assert np.array_equal(pixels(made)[~near], pixels(source)[~near]), words
        assert not np.array_equal(pixels(made)[new], pixels(source)[new])
    facts = grids.facts(made)["inpaint"]
    assert facts["mask_name"] == "mask.png" and len(facts["mask_sha256"]) == len(facts["sha256"]) == 64


def test_outpainting_keeps_the_picture_and_draws_around_it(denoiser: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "source.png")
    made = draw(denoiser, tmp_path / "out", "--prompt", "a", "--image", source, "--outpaint", "5,0,16,4")
    assert Image.open(made).size == (53, 36)
    assert np.array_equal(pixels(made)[:32, 5:37], pixels(source))
    wide = draw(denoiser, tmp_path / "wide", "--prompt", "a", "--size", "32x64", "--windows", 4)
    assert Image.open(wide).size == (64, 32) and grids.facts(wide)["canvas"] == {"windows": 4}


EDITS = {
    "image": ("--image", "source.png", "--strength", 0.6),
    "start time": ("--image", "source.png", "--start-time", 0.4, "--size", 16),
    "mask": ("--image", "source.png", "--mask", "mask.png", "--feather", 1, "--fill", "grey", "--invert-mask"),
    "repaint": ("--image", "source.png", "--mask", "mask.png", "--method", "repaint", "--posterior.jump", 1,
                "--posterior.resamples", 2),
    "outpaint": ("--image", "source.png", "--outpaint", "4,0,4,0", "--windows", 3),
    "windows": ("--size", "32x48", "--windows", 4),
    "invert": ("--invert", "source.png", "--invert-prompt", "b", "--invert-iterations", 2, "--sampler", "ddim"),
    "edit-friendly": ("--invert", "source.png", "--edit-friendly", "--strength", 0.8, "--sampler", "ddpm"),
    "style": ("--style", "source.png", "--coupling.depth", 0.2),
    "style of a picture": ("--style", "source.png", "--image", "other.png"),
    "masactrl": ("--coupling", "masactrl", "--source-prompt", "b", "--coupling.below", 0.5),
    "restore": ("--restore", "box", "--image", "source.png", "--operator.factor", 2, "--measurement.cg_steps", 3),
    "restore a file": ("--restore", "gaussian-blur", "--measurement", "source.png", "--sigma-y", 0.1),
    "restore a mask": ("--restore", "mask", "--measurement", "source.png", "--mask", "mask.png", "--method", "pigdm"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_like_repeats_an_edit_or_says_what_is_missing(kind: str, denoiser: Path, tmp_path: Path) -> None:
    picture(tmp_path / "source.png")
    picture(tmp_path / "other.png", seed=1)
    mask(tmp_path / "mask.png")
    asked = [tmp_path / word if str(word).endswith(".png") else word for word in EDITS[kind]]
    made = draw(denoiser, tmp_path / "made", "--prompt", "a", "--seed", 3, *asked)
    like = ("--model", denoiser, "--device", "cpu", "--like", made)
    files = [word for flag, value in pairwise(asked) if isinstance(value, Path)
             for word in (flag, value)]
    assert tiny.call("generate", *like, "--output", tmp_path / "again", *files) == 0
    assert (tmp_path / "again" / "00000.png").read_bytes() == made.read_bytes()
    if files:
        missing = tiny.refused("generate", *like, "--output", tmp_path / "no", *files[2:])
        assert missing.code == 3 and missing.hint == f"give its file with {files[0]}"
        picture(tmp_path / "another.png", seed=9)
        changed = [tmp_path / "another.png" if word == files[1] else word for word in files]
        if kind != "restore a mask":
            told = tiny.refused("generate", *like, "--output", tmp_path / "no", *changed)
            assert told.code == 4 and told.hint == f"give the same file with {files[0]}"


@pytest.mark.parametrize("method", kinds("measurement") + kinds("posterior"))
def test_every_method_restores_or_says_what_it_needs(method: str, denoiser: Path, tmp_path: Path) -> None:
    """In latents, where no operator is linear."""
    source = picture(tmp_path / "source.png")
    words = ("--prompt", "a", "--restore", "box", "--image", source, "--method", method)
    asked = ("--model", denoiser, "--output", tmp_path / "out", *FAST, *words)
    if method in ("ddrm", "repaint", "split-gibbs"):
        assert method in tiny.refused("generate", *asked).what
        return
    assert tiny.call("generate", *asked) == 0
    told = grids.facts(tmp_path / "out" / "00000.png")["restore"]["kinds"]
    assert told.get("measurement", told.get("posterior"))["kind"] == method


def test_a_measurement_may_be_numbers(denoiser: Path, tmp_path: Path) -> None:
    save_file({"y": torch.zeros(1, 3, 8, 8)}, tmp_path / "y.safetensors")
    draw(denoiser, tmp_path / "out", "--prompt", "a", "--restore", "box", "--measurement", tmp_path / "y.safetensors")
    save_file({"z": torch.zeros(1, 3, 8, 8)}, tmp_path / "z.safetensors")
    words = ("--prompt", "a", "--restore", "box", "--measurement", tmp_path / "z.safetensors")
    assert "no safetensors file with a tensor named y" in refused(denoiser, tmp_path, *words).what


WRONG = {
    "strength": (("--image", "source.png", "--strength", 1.2), "--strength: must lie in [0, 1] (got 1.2)"),
    "both": (("--image", "source.png", "--strength", 1, "--start-time", 1), "both say where the walk begins"),
    "mask alone": (("--mask", "mask.png"), "--mask needs the picture it is of"),
    "mask of another size": (("--image", "source.png", "--mask", "small.png"), "20x20 pixels, source.png 32x32"),
    "black mask": (("--image", "source.png", "--mask", "black.png"), "leaves nothing to draw"),
    "white mask": (("--image", "source.png", "--mask", "black.png", "--invert-mask"), "leaves nothing of source.png"),
    "no picture": (("--image", "none.png"), "--image "),
    "margins": (("--image", "source.png", "--outpaint", "1,2,3"), "expected four whole numbers L,T,R,B"),
    "no margins": (("--image", "source.png", "--outpaint", "0,0,0,0"), "at least one above"),
    "two starts": (("--image", "source.png", "--invert", "source.png"), "both say what to begin from"),
    "feather": (("--image", "source.png", "--mask", "mask.png", "--feather", -1), "--feather: must be at least 0"),
    "operator": (("--restore", "boxx", "--image", "source.png"), "unknown kind"),
    "operator's factor": (("--restore", "box", "--image", "source.png", "--operator.factor", 5), "by factor 5"),
    "method": (("--restore", "box", "--image", "source.png", "--method", "ddnn"), "did you mean 'ddnm'"),
    "nothing measured": (("--restore", "box"), "takes a measurement, or a picture that it measures first"),
    "mask of no mask": (("--restore", "box", "--image", "source.png", "--mask", "mask.png"), "not box"),
    "coupling of nothing": (("--coupling", "masactrl"), "nothing says what the picture beside shows"),
    "style by coupling": (("--coupling", "style", "--source-prompt", "b"), "is what --style FILE asks for"),
    "edit-friendly": (("--invert", "source.png", "--edit-friendly", "--sampler", "euler"), "one draw a step"),
    "method of a mask": (("--image", "source.png", "--mask", "mask.png", "--method", "ddnm"), "ddnm is for --restore"),
    "strength of repaint": (
        ("--image", "source.png", "--mask", "mask.png", "--method", "repaint", "--strength", 0.5), "from noise alone"
    ),
    "strength of inversion": (("--invert", "source.png", "--strength", 0.5), "--strength is for --image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_sentence(case: str, denoiser: Path, tmp_path: Path) -> None:
    picture(tmp_path / "source.png")
    mask(tmp_path / "mask.png")
    mask(tmp_path / "small.png", (20, 20))
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    words, said = WRONG[case]
    asked = [tmp_path / word if str(word).endswith(".png") else word for word in words]
    problem = tiny.refused("generate", "--model", denoiser, "--output", tmp_path / "no", *FAST, "--prompt", "a", *asked)
    assert said in problem.what and problem.hint, str(problem)


def test_every_start_says_what_it_is_under_a_key_of_its_own() -> None:
    assert len(TOLD) == len({start.kind for start in TOLD.values()}) == len(TOLD.values())
    for start in TOLD.values():
        assert not start.sound(dict.fromkeys(start.inputs, 3)) or not start.inputs
        assert start.sound(dict.fromkeys(start.inputs, "a" * 64) | {"stages": []})


def test_what_nothing_reads_is_told(denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = picture(tmp_path / "source.png")
    words = ("--prompt", "a", "--strength", 0.5, "--operator.factor", 2, "--coupling.depth", 0.5)
    draw(denoiser, tmp_path / "plain", *words, "--measurement", source, "--style-prompt", "b")
    said = capsys.readouterr().err
    for flag in ("strength", "measurement", "style-prompt", "operator.factor", "coupling.depth"):
        assert f"--{flag}: nothing of this drawing reads it" in said, flag
    draw(denoiser, tmp_path / "read", "--prompt", "a", "--image", source, "--strength", 0.5, "--windows", 4)
    assert "nothing of this drawing reads it" not in capsys.readouterr().err


def test_a_picture_of_no_step_has_no_strip(denoiser: Path, tmp_path: Path) -> None:
    source = picture(tmp_path / "source.png")
    draw(denoiser, tmp_path / "none", "--prompt", "a", "--strip", "--image", source, "--strength", 0)
    assert not (tmp_path / "none" / "strips").exists()


def test_masks_of_a_folder_belong_to_the_pictures_of_their_names(denoiser: Path, tmp_path: Path) -> None:
    for folder in ("in", "masks"):
        (tmp_path / folder).mkdir()
    for index, name in enumerate(("a", "b")):
        picture(tmp_path / "in" / f"{name}.png", seed=index)
        mask(tmp_path / "masks" / f"{name}.png", box=(8 * index, 0, 8 * index + 8, 8))
    words = ("--prompt", "a", "--image", tmp_path / "in", "--mask", tmp_path / "masks")
    draw(denoiser, tmp_path / "out", *words)
    for index, name in enumerate(("a", "b")):
        made, source = tmp_path / "out" / f"{index:05d}-{name}.png", tmp_path / "in" / f"{name}.png"
        changed = (pixels(made) != pixels(source)).any(-1)
        columns = slice(8 * index, 8 * index + 8)
        assert changed.any() and not changed[8:].any() and not np.delete(changed, columns, 1).any()
    draw(denoiser, tmp_path / "repaint", *words, "--method", "repaint", "--posterior.jump", 1)
    assert not np.array_equal(pixels(tmp_path / "repaint" / "00001-b.png"), pixels(made))
    assert np.array_equal(pixels(tmp_path / "repaint" / "00001-b.png")[:, :8], pixels(source)[:, :8])
    shutil.move(tmp_path / "masks" / "b.png", tmp_path / "masks" / "c.png")
    assert "none for b.png" in refused(denoiser, tmp_path, *words).what
