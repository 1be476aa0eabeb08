"""Pictures made larger from the command line, and cascades: what comes out, what a PNG says of it, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ldm.upscaling import residual, upscaling
from training.drawing.given import given
from training.drawing.requests import Request
from training.drawing.upscale import Upscaler
from training.errors import UserError
from training.ledger import Ledger
from training.models.assembly import load_pipeline
from training.pictures import grids
from training.pictures.depths import ROUNDED

FAST = ("--steps", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def base(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser of 8 px, in pixels."""
    root = tmp_path_factory.mktemp("base")
    (root / "in").mkdir()
    for number in range(24):
        Image.new("RGB", (8, 8), (10 * number, 99, 0)).save(root / "in" / f"{number:02d}.png")
        (root / "in" / f"{number:02d}.txt").write_text("a red circle at the top")
    pack = ("pack", root / "in", "--output", root / "data", "--resolution", 8, "--val-fraction", 0.3)
    assert tiny.call("make_shards", *pack) == 0
    identity = ("--config", "identity", "--device", "cpu", "--data", root / "data", "--output", root / "pixels")
    assert tiny.call("train_autoencoder", *identity) == 0
    encode = ("--autoencoder", root / "pixels", "--data", root / "data", "--output", root / "latents")
    assert tiny.call("encode_latents", *encode, "--device", "cpu") == 0
    train = ("--latents", root / "latents", "--output", root / "run", "--batch-size", 8, "--max-steps", 2)
    assert tiny.call("train_denoiser", *tiny.DENOISER, *train) == 0
    tiny.shake(root / "run" / "final")
    return root / "run"


@pytest.fixture(scope="module")
def hinted(base: Path) -> Path:
    """The latents of that base, with edges beside them."""
    root = base.parent
    pack = ("pack", root / "in", "--output", root / "edges", "--resolution", 8, "--val-fraction", 0.3)
    assert tiny.call("make_shards", *pack, "--hint", "edges") == 0
    encode = ("--autoencoder", root / "pixels", "--data", root / "edges", "--output", root / "hinted")
    assert tiny.call("encode_latents", *encode, "--device", "cpu") == 0
    return root / "hinted"


def small(path: Path, size: tuple[int, int] = (8, 8), seed: int = 0, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(seed).integers(40, 216, (size[1], size[0], len(mode)), dtype=np.uint8)
    Image.fromarray(pixels if len(mode) > 1 else pixels[..., 0]).save(path)
    return path


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)[None]


def upscale(run: Path, source: Path, output: Path, *words: object) -> Path:
    assert tiny.call("upscale", source, "--model", run, "--output", output, *FAST, *words) == 0
    return output


def test_a_folder_of_any_sizes_goes_in(
    upscaler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four times as large comes out, each with its own caption; what was not used as it was given is told."""
    (source := tmp_path / "in").mkdir()
    small(source / "cat.png")
    small(source / "odd.png", (5, 11), 1)
    small(source / "seen.png", (8, 8), 2, "RGBA")
    small(source / "grey.png", (3, 1), 3, "L")
    (source / "cat.txt").write_text("a red circle\na blue one\n")
    out = upscale(upscaler, source, tmp_path / "out")
    made = {path.name: Image.open(path).size for path in sorted(out.glob("*.png"))}
    assert made == {"00000-cat.png": (32, 32), "00001-grey.png": (12, 4), "00002-odd.png": (20, 44),
                    "00003-seen.png": (32, 32)}
    facts = grids.facts(out / "00000-cat.png")
    assert facts["prompt"] == "a red circle" and facts["seed"] == 0 and facts["upscale"]["level"] == 0
    said, heard = capsys.readouterr()
    assert "replaced 2: pictures continued by their reflection to a canvas that fits, then cut back" in heard
    assert "(3x1 to 8x8, 5x11 to 8x12)" in heard and "guessed 3: picture without a caption" in heard
    assert "ignored 1: captions after a picture's first (cat.png)" in heard
    assert "replaced 1: transparency, laid on the background" in heard
    told = json.loads((out / "upscaled.json").read_text())
    for name, row in told["pictures"].items():
        wanted = residual(pixels(out / name), pixels(source / row["picture"]), 4).item()
        if row["picture"] != "seen.png":  # which was laid on white
            assert row["residual"] == pytest.approx(wanted, abs=1e-3) == grids.facts(out / name)["upscale"]["residual"]
        assert f"{name} {row['size'][1]}x{row['size'][0]}: means over squares {row['residual']:.2f}/255" in said
    assert "upscaled.json" in {path.name for path in out.iterdir()}


def test_it_is_the_task_of_the_pipeline(upscaler: Path, tmp_path: Path) -> None:
    """And draws are averaged, seed by seed."""
    source = small(tmp_path / "x.png")
    pipe = load_pipeline(upscaler, "cpu")
    task = upscaling(pipe, pixels(source), level=0.25)
    plan = {"sampling": type(pipe.sampling)(sampler=pipe.sampling.sampler, grid=pipe.sampling.grid,
                                            guidance=pipe.sampling.guidance, steps=2)}
    each = [next(pipe.pixels(["a red circle"], seed, task=task, **plan)) for seed in (5, 6, 7)]
    words = ("--prompt", "a red circle", "--seed", 5, "--level", 0.25)
    one = upscale(upscaler, source, tmp_path / "one", *words)
    assert torch.equal(pixels(one / "00000.png"), each[0])
    mean = upscale(upscaler, source, tmp_path / "mean", *words, "--samples", 3)
    assert torch.equal(pixels(mean / "00000.png"), torch.stack(each).float().mean(0).round().byte())
    facts = grids.facts(mean / "00000.png")
    assert facts["samples"] == 3 and facts["upscale"]["level"] == 0.25 and facts["size"] == [32, 32]
    assert not torch.equal(each[0], each[1])


def test_a_consistent_picture_says_what_the_small_one_says(upscaler: Path, tmp_path: Path) -> None:
    source = small(tmp_path / "x.png", (9, 7))
    free = upscale(upscaler, source, tmp_path / "free", "--samples", 2)
    bound = upscale(upscaler, source, tmp_path / "bound", "--samples", 2, "--consistent")
    off = [json.loads((folder / "upscaled.json").read_text())["residual"] for folder in (free, bound)]
    assert off[1] == 0 < 0.5 < off[0]


def test_nothing_is_replaced_unless_asked(upscaler: Path, tmp_path: Path) -> None:
    source = small(tmp_path / "x.png")
    upscale(upscaler, source, tmp_path / "out")
    words = (source, "--model", upscaler, "--output", tmp_path / "out", *FAST, "--seed", 1)
    assert "--overwrite" in tiny.refused("upscale", *words).hint
    assert tiny.call("upscale", *words, "--overwrite") == 0


def folder_of_three(where: Path) -> Path:
    """Two pictures, and between them a file that is none."""
    where.mkdir()
    small(where / "a.png")
    (where / "b.png").write_bytes(b"no picture")
    small(where / "c.png", (9, 8), 1)
    return where


def test_a_bad_file_stops_it_before_anything_is_drawn(
    upscaler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them are named at once, with what helps here: not with flags of packing."""
    source = folder_of_three(tmp_path / "in")
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(source / "d.tif")
    Image.new("RGBA", (8, 8)).save(source / "e.png")
    monkeypatch.setattr("training.drawing.upscale.LARGEST_PICTURE", 1024)  # which c.png is once it is enlarged
    words = (source, "--model", upscaler, "--output", tmp_path / "out", *FAST)
    problem = tiny.refused("upscale", *words, "--batch-size", 1)
    assert problem.code == 3 and problem.what.startswith("4 samples cannot be used:\n  b.png: not an image of a known")
    for said in ("c.png: picture of more than 1,024 pixels once it is enlarged (9x8)", "d.tif: nothing says what",
                 "e.png: fully transparent image"):
        assert said in problem.what
    assert "save it with 8 or 16 bits" in problem.hint and "save it without transparency" in problem.hint
    assert "--range" not in problem.hint and "--ignore-alpha" not in problem.hint
    assert "--on-bad-data skip leaves such samples out" in problem.hint and not (tmp_path / "out").exists()
    single = tiny.refused("upscale", source / "d.tif", "--model", upscaler, "--output", tmp_path / "out", *FAST)
    assert single.what.startswith("FILE|DIR d.tif: nothing says") and single.hint.startswith("save it with 8 or 16")


def test_bad_files_are_left_out_and_named(
    upscaler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others keep their numbers, so that they are known when the file is mended."""
    source = folder_of_three(tmp_path / "in")
    skip = ("--on-bad-data", "skip", "--batch-size", 1)
    out = upscale(upscaler, source, tmp_path / "out", *skip)
    assert "left out 1: not an image of a known format (b.png)" in capsys.readouterr().err
    told = json.loads((out / "upscaled.json").read_text())
    assert list(told["pictures"]) == ["00000-a.png", "00002-c.png"] and told["ledger"]["left out"]
    first = (out / "00000-a.png").stat().st_mtime_ns
    small(source / "b.png")
    upscale(upscaler, source, out)
    assert "wrote 1 pictures" in (said := capsys.readouterr().err) and "kept 2 that were there" in said
    assert (out / "00000-a.png").stat().st_mtime_ns == first
    assert list(json.loads((out / "upscaled.json").read_text())["pictures"]) == [
        "00000-a.png", "00001-b.png", "00002-c.png"]
    for file in ("a.png", "c.png"):
        (source / file).write_bytes(b"no picture")
    (source / "b.png").unlink()
    nothing = tiny.refused("upscale", source, "--model", upscaler, "--output", tmp_path / "no", *FAST, *skip)
    assert "no picture is left" in nothing.what


def test_the_same_command_goes_on_where_it_was_stopped(
    upscaler: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the pictures and the summary that it gives in one go; other pictures in their place are no reason to go on.
    """
    (source := tmp_path / "in").mkdir()
    for number in range(3):
        small(source / f"{number}.png", seed=number)
    whole = upscale(upscaler, source, tmp_path / "whole", "--batch-size", 1)
    out, draw = tmp_path / "out", Upscaler.draw

    def stopped(self: Upscaler, requests: list[Request], *rest: Any) -> Any:
        if requests[0].number == 2:
            raise UserError("the disk is full", code=6)
        return draw(self, requests, *rest)

    words = (source, "--model", upscaler, "--output", out, *FAST, "--batch-size", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Upscaler, "draw", stopped)
        tiny.refused("upscale", *words)
    assert len(list(out.glob("0*.png"))) == 2 and not (out / "upscaled.json").exists()
    assert tiny.call("upscale", *words) == 0
    assert "wrote 1 pictures" in capsys.readouterr().err
    assert json.loads((out / "upscaled.json").read_text()) == json.loads((whole / "upscaled.json").read_text())
    for file in whole.glob("0*.png"):
        assert torch.equal(pixels(out / file.name), pixels(file))
    small(source / "1.png", seed=9)
    assert "--overwrite" in tiny.refused("upscale", *words).hint


def test_what_a_grey_model_and_eight_bits_do_not_keep_is_told(tmp_path: Path) -> None:
    (source := tmp_path / "in").mkdir()
    ledger = Ledger()
    small(source / "colour.png")
    small(source / "grey.png", mode="L")
    Image.open(source / "grey.png").convert("RGB").save(source / "same.png")
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(source / "deep.png")
    for one in given("FILE|DIR", str(source), ledger):
        assert one.decoded(1, ledger).mode == "L"
    assert ledger.lines() == [
        f"cut 1: {ROUNDED} (deep.png)",
        "replaced 1: colours, by their brightness: the model is of grey pictures (colour.png)",
    ]


def test_what_cannot_be_made_larger_is_refused(upscaler: Path, denoiser: Path, tmp_path: Path) -> None:
    source = small(tmp_path / "x.png")
    words = (source, "--output", tmp_path / "none", *FAST)
    assert "image.kind low-res" in tiny.refused("upscale", *words, "--model", denoiser).what
    assert "must lie in [0, 1]" in tiny.refused("upscale", *words, "--model", upscaler, "--level", 2).what
    assert "--samples" in tiny.refused("upscale", *words, "--model", upscaler, "--samples", 0).what
    problem = tiny.refused("generate", "--model", upscaler, "--output", tmp_path / "again", "--device", "cpu", "--like",
                           upscale(upscaler, source, tmp_path / "made") / "00000.png")
    assert "upscale" in problem.what


def cascaded(base: Path, upscaler: Path, output: Path, *words: object) -> Path:
    asked = ("--cascade", base, "--cascade", upscaler, "--output", output, *FAST, *words)
    assert tiny.call("generate", *asked) == 0
    return output


def test_a_cascade_draws_by_all_its_models(base: Path, upscaler: Path, tmp_path: Path) -> None:
    """The first draws what it draws alone; a PNG tells of both, and --like repeats it."""
    prompt = ("--prompt", "a red circle at the top", "--seed", 3)
    made = cascaded(base, upscaler, tmp_path / "out", *prompt, "--level", 0.3) / "00000.png"
    assert tiny.call("generate", "--model", base, "--output", tmp_path / "small", "--device", "cpu", *prompt) == 0
    facts, alone = grids.facts(made), grids.facts(tmp_path / "small" / "00000.png")
    assert facts["cascade"]["level"] == 0.3 and facts["size"] == [32, 32]
    assert facts["cascade"]["stages"][0]["hashes"] == alone["hashes"] != facts["hashes"]
    assert facts["cascade"]["stages"][0]["settings"] == alone["settings"]
    again = ("--model", base, "--cascade", upscaler, "--device", "cpu", "--like", made)
    assert tiny.call("generate", *again, "--output", tmp_path / "again") == 0
    assert torch.equal(pixels(tmp_path / "again" / "00000.png"), pixels(made))
    other = cascaded(base, upscaler, tmp_path / "other", *prompt, "--level", 0.0) / "00000.png"
    assert not torch.equal(pixels(other), pixels(made))
    told = tiny.refused("generate", "--model", upscaler, "--device", "cpu", "--like", made, "--output", tmp_path / "no")
    assert "was drawn by a cascade (" in told.what and "--cascade" in told.hint
    pipe, low = load_pipeline(upscaler, "cpu"), pixels(tmp_path / "small" / "00000.png")
    from ldm.cascade import stage_seeds

    task, plan = upscaling(pipe, low, level=0.3), pipe.sampling
    plan = type(plan)(sampler=plan.sampler, grid=plan.grid, guidance=plan.guidance, steps=2)
    wanted = next(pipe.pixels(["a red circle at the top"], stage_seeds([3], 1), task=task, sampling=plan))
    assert torch.equal(pixels(made), wanted)


@pytest.mark.parametrize(("models", "said"), [
    ("u", "names one model"), ("uu", "draws from captions alone"), ("dd", "give one of image.kind low-res"),
    ("du", "makes 32x32 pixels of 8x8, and the stage before it draws 32x32"), ("", "--model"),
])
def test_models_that_make_no_cascade_are_refused(
    models: str, said: str, upscaler: Path, denoiser: Path, tmp_path: Path
) -> None:
    named = [word for model in models for word in ("--cascade", {"u": upscaler, "d": denoiser}[model])]
    problem = tiny.refused("generate", *named, "--prompt", "x", "--output", tmp_path / "none", *FAST)
    assert said in problem.what and problem.hint and not (tmp_path / "none").exists()


def test_a_cascade_has_the_size_of_its_last_model(base: Path, upscaler: Path, tmp_path: Path) -> None:
    words = ("--cascade", base, "--cascade", upscaler, "--prompt", "x", "--output", tmp_path / "none", *FAST)
    assert "--size" in tiny.refused("generate", *words, "--size", 64).what
    assert "--level" in tiny.refused("generate", *words, "--level", 1.5).what


def test_a_level_beyond_what_was_trained_is_refused_for_what_it_is(
    base: Path, upscaler: Path, tmp_path: Path
) -> None:
    """The order of the models is not the trouble."""
    timid = shutil.copytree(upscaler, tmp_path / "timid")
    for home in (timid, timid / "final"):
        values = json.loads((home / "config.json").read_text())
        values["image"] |= {"augment": 0.1, "level": 0.1}
        (home / "config.json").write_text(json.dumps(values))
    words = ("--cascade", base, "--cascade", timid, "--prompt", "x", "--output", tmp_path / "out", *FAST, "--level")
    problem = tiny.refused("generate", *words, 0.15)
    assert "must lie in [0, 0.1]" in problem.what and problem.hint.startswith("give a --level within it")
    assert tiny.call("generate", *words, 0.1) == 0


def test_a_control_makes_no_cascade(base: Path, upscaler: Path, hinted: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    learn = ("--base", base, "--config", "controlnet", "--latents", hinted, "--output", control, "--max-steps", 1)
    assert tiny.call("train_denoiser", *learn, "--batch-size", 8, "--device", "cpu", "--sample.steps", 2) == 0
    words = ("--cascade", upscaler, "--prompt", "x", "--output", tmp_path / "none", *FAST)
    problem = tiny.refused("generate", "--cascade", control, *words)
    assert "is a control, which is shown a hint" in problem.what and "give its base in its place" in problem.hint
    assert tiny.call("generate", "--cascade", base, *words) == 0
    alone = ("--model", base, "--control", control, "--hint", control / "final" / "hint.png", "--prompt", "x", *FAST)
    assert tiny.call("generate", *alone, "--output", tmp_path / "alone") == 0
    upscale(upscaler, tmp_path / "alone" / "00000.png", tmp_path / "large")


def test_the_size_is_that_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures are not packed to be enlarged."""
    problem = tiny.refused("upscale", "x.png", "--model", "m", "--output", "o", "--size", 64)
    assert "--size; here: pictures become as many times larger" in problem.what and "make_shards" not in problem.what
