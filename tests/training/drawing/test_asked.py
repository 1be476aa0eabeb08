"""What generate is asked for and cannot use as it is: told, counted, or refused before anything is drawn."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from training.drawing.requests import ask
from training.pictures import grids

PICTURE = "00000.png"


def words(run: Path, output: Path, *more: object) -> tuple[object, ...]:
    return ("--model", run, "--output", output, "--device", "cpu", *more)


def prompts_of(folder: Path) -> list[str]:
    return [grids.facts(path)["prompt"] for path in sorted(folder.glob("0*.png"))]


def test_lines_of_a_file_end_in_line_feeds_alone(denoiser: Path, tmp_path: Path) -> None:
    wanted = ["one\u2028two", "a\u0085b", "tab\x0bstop\x0cfeed", "old\rmac"]
    (tmp_path / "p.txt").write_bytes("\r\n".join(wanted[:2]).encode() + b"\n" + "\n".join(wanted[2:]).encode() + b"\n")
    assert tiny.call("generate", *words(denoiser, tmp_path / "out", "--prompts", tmp_path / "p.txt")) == 0
    assert prompts_of(tmp_path / "out") == wanted


def test_what_no_file_of_prompts_is(denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, data in {"utf-16": "a red circle\n".encode("utf-16"), "nul": b"a\0b\n", "latin-1": b"gr\xfcn\n"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "closed").write_text("a\n")
    read = Path.read_bytes

    def closed(path: Path) -> bytes:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", closed)
    for name, said in {
        "pipe": "not a regular file", "folder": "not a regular file", "utf-16": "not a UTF-8 text file (UTF-16)",
        "nul": "not a UTF-8 text file (byte 1 is 0)", "latin-1": "not a UTF-8 text file (byte 2)",
        "closed": "cannot be read (Permission denied)", "none": "no such file of prompts",
        "n" * 300: "cannot be read (File name too long)",
    }.items():  # fmt: skip
        problem = tiny.refused("generate", *words(denoiser, tmp_path / "out", "--prompts", tmp_path / name))
        assert problem.code == 3 and said in problem.what and "one prompt a line" in problem.hint, name
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--guidance-scale", "nan"], "--guidance-scale"),
        (["--guidance-scale", "inf"], "--guidance-scale"),
        (["--guidance.scale", "nan"], "guidance.scale: expected a finite number"),
        (["--guidance.rescale", "Infinity"], "guidance.rescale: expected a finite number"),
        (["--also", "nan", "x"], "--also nan 'x': the weight must be a finite number"),
        (["--also", "inf", "x"], "--also inf 'x'"),
        (["--batch-size", "0"], "--batch-size: must be at least 1"),
        (["--size", "30x48"], "size 30x48 (height x width) is not divisible by 8"),
    ],
)
def test_numbers_that_are_none(denoiser: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    problem = tiny.refused("generate", *words(denoiser, tmp_path / "out", "--prompt", "x", *flags))
    assert problem.code == 2 and said in problem.what
    assert not (tmp_path / "out").exists()


def test_the_sizes_proposed_are_drawn(denoiser: Path, tmp_path: Path) -> None:
    for asked in ("30x48", "1", "33"):
        problem = tiny.refused("generate", *words(denoiser, tmp_path / "no", "--prompt", "x", "--size", asked))
        assert "--size" in problem.hint
        for size in problem.what.partition("nearest ")[2].rstrip(".").split(" or "):
            output = tmp_path / asked / size
            assert tiny.call("generate", *words(denoiser, output, "--prompt", "x", "--size", size)) == 0
            height, width = (size.split("x") * 2)[:2]
            assert Image.open(output / PICTURE).size == (int(width), int(height))
    assert tiny.call("generate", *words(denoiser, tmp_path / "key", "--prompt", "x", "--sample.size", "24,16")) == 0
    assert Image.open(tmp_path / "key" / PICTURE).size == (16, 24)


def test_another_size_than_the_trained_one_is_told(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As height x width; not of the trained size itself, nor of windows of it."""

    def told(*flags: str) -> str:
        assert tiny.call("generate", *words(denoiser, tmp_path / "-".join(flags), "--prompt", "x", *flags)) == 0
        return capsys.readouterr().err

    assert "drawn at 16x48, while the model was trained at 32x32" in told("--size", "16x48")
    assert "trained at" not in told("--size", "32") + told("--size", "32x64", "--windows", "4")


def test_what_the_encoder_does_not_read_is_told(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["a red circle"] * 20)
    asked = [word for text in ("a red circle", "a zebra", "okapi quagga", long) for word in ("--prompt", text)]
    more = ("--negative-prompt", "a cross", "--guidance-scale", "1", "--weak-model", denoiser, "--invert-prompt", "x")
    assert tiny.call("generate", *words(denoiser, tmp_path / "out", *asked, *more)) == 0
    told = capsys.readouterr().err.splitlines()
    assert any(line.startswith("warning: only the first 30 of 60 tokens of 'a red circle a red") for line in told)
    assert "note: words of 'a zebra' that the model does not know: zebra" in told
    assert "warning: the model knows no word of 'okapi quagga' (okapi, quagga)" in told
    assert not any("of 'a red circle'" in line for line in told)
    end = told[next(i for i, line in enumerate(told) if line.startswith("wrote 4 pictures")) + 1 :]
    assert [line.split(":")[0] for line in end] == ["cut 1", "replaced 2", "replaced 4", "ignored 3"]
    assert "--negative-prompt: only guidance away" in end[-1] and "--weak-model: only --guidance.kind" in end[-1]
    assert "--invert-prompt: only --invert reads it" in end[-1]
    used = ("--prompt", "a red circle", "--negative-prompt", "a cross", "--guidance-scale", "2")
    assert tiny.call("generate", *words(denoiser, tmp_path / "used", *used)) == 0
    assert "ignored" not in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_of_a_picture(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def full(self: Image.Image, file: Any, *arguments: Any, **settings: Any) -> None:
        save(self, file, *arguments, **settings)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        problem = tiny.refused("generate", *words(denoiser, tmp_path / "out", "--prompt", "x"))
    assert problem.code == 6 and "No space left" in problem.what and "free disk space" in problem.hint
    assert list((tmp_path / "out").iterdir()) == []
    assert tiny.call("generate", *words(denoiser, tmp_path / "out", "--prompt", "x")) == 0  # the same command
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        assert tiny.refused("generate", *words(denoiser, output, "--prompt", "x")).code == 6


@pytest.fixture(scope="module")
def made(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made")
    assert tiny.call("generate", *words(denoiser, output, "--prompt", "a red circle", "--seed", 3)) == 0
    return output / PICTURE


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"size": [1 << 15, 1 << 15]}, "asks for 32768x32768 pixels"),
    "negative size": ({"size": [-32, 32]}, "does not say"),
    "three sides": ({"size": [32, 32, 32]}, "does not say"),
    "steps": ({"settings": {"sample": {"steps": 1 << 30}}}, "asks for 1073741824 steps"),
    "no number of steps": ({"settings": {"sample": {"steps": "many"}}}, "asks for many steps"),
    "batch": ({"batch": 4096, "size": [512, 512]}, "asks for batches of 4096 pictures"),
    "weight": ({"also": [["x", float("nan")]]}, "no finite numbers"),
    "captions": ({"also": [["x", 1.0]] * 1000}, "asks for 1000 further captions"),
    "tile": ({"tile": 1}, "--tile: must be 0 (off) or at least 16"),
    "text": ({"prompt": "x" * (1 << 20)}, "not a PNG that can be read"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_picture_fills_no_memory(case: str, made: Path, denoiser: Path, tmp_path: Path) -> None:
    changes, said = FORGED[case]
    info = PngInfo()
    info.add_itxt(grids.KEY, json.dumps({**grids.facts(made), **changes}))  # NaN, which is not written here, too
    grids.write(Image.open(made), tmp_path / "forged.png", info)
    problem = tiny.refused("generate", *words(denoiser, tmp_path / "out", "--like", tmp_path / "forged.png"))
    assert said in problem.what and not (tmp_path / "out").exists()


def test_like_takes_png_files_alone(made: Path, denoiser: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    Image.open(made).save(tmp_path / "a.jpg")
    for name in ("pipe.png", "a.jpg", "none.png"):
        problem = tiny.refused("generate", *words(denoiser, tmp_path / "out", "--like", tmp_path / name))
        assert problem.code == 3 and "not a PNG that can be read" in problem.what


def test_like_says_truly_what_differs(
    made: Path, denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Edited facts or pixels are no fault of the processor; without a seal nothing is known."""
    facts, picture = grids.facts(made), Image.open(made)

    def verdict(name: str, image: Image.Image, said: dict[str, Any], sealed: bool) -> str:
        path = tmp_path / f"{name}.png"
        grids.save(image, path, said)
        if not sealed:
            info = grids.PngInfo()
            info.add_itxt(grids.KEY, json.dumps(said, sort_keys=True))
            image.save(path, pnginfo=info)
        assert tiny.call("generate", *words(denoiser, tmp_path / name, "--like", path)) == 0
        return capsys.readouterr().err.splitlines()[-1]

    dark = Image.fromarray(np.asarray(picture) // 2)
    assert "the same pixels as" in verdict("same", picture, facts, sealed=True)
    assert "were changed after it was made" in verdict("seed", picture, {**facts, "seed": 4}, sealed=False)
    assert "were changed after it was made" in verdict("pixels", dark, facts, sealed=False)
    del facts[grids.SEAL]
    assert "the processor or its threads, or the picture or what it says" in verdict("old", dark, facts, sealed=False)
    told = verdict("torch", dark, {**facts, "versions": {"torch": "0.1"}}, sealed=True)
    assert "torch 0.1 then" in told and "processor" not in told and "None" not in told


def test_the_grid_is_written_whole(made: Path) -> None:
    assert Image.open(made.parent / "grid.png").format == "PNG"
    assert [path.name for path in made.parent.iterdir() if path.name.startswith(".")] == []
    assert grids.changed(made) is False


def test_seeds_of_any_size(denoiser: Path, tmp_path: Path) -> None:
    assert ask(["a"], 2, 1 << 63)[1].seed == (1 << 63) + 1
    assert tiny.call("generate", *words(denoiser, tmp_path / "out", "--prompt", "a", "--seed", 1 << 63)) == 0
    again = words(denoiser, tmp_path / "again", "--like", tmp_path / "out" / PICTURE)
    assert tiny.call("generate", *again) == 0
    shutil.rmtree(tmp_path / "again")


def test_the_hints_of_a_drawing_work_when_followed(
    denoiser: Path, made: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = words(denoiser, tmp_path / "out", "--prompt", "x")
    assert tiny.call("generate", *again) == 0
    assert "use --overwrite, or another --output" in tiny.refused("generate", *again).hint
    assert tiny.call("generate", *again, "--overwrite") == 0
    like = words(denoiser, tmp_path / "like", "--like", made)
    problem = tiny.refused("generate", *like, "--steps", 3)
    assert problem.what.endswith("leave out --steps") and tiny.call("generate", *like) == 0
    begun = words(denoiser, tmp_path / "begun", "--prompt", "x", "--sampler", "ddim", "--steps", 4, "--invert", made)
    assert tiny.call("generate", *begun) == 0
    like = words(denoiser, tmp_path / "back", "--like", tmp_path / "begun" / PICTURE)
    assert "give its file with --invert" in tiny.refused("generate", *like).hint
    assert tiny.call("generate", *like, "--invert", made) == 0
    weak = words(denoiser, tmp_path / "weak", "--prompt", "x", "--guidance-scale", "1", "--negative-prompt", "y")
    capsys.readouterr()
    assert tiny.call("generate", *weak) == 0 and "at another scale than 1" in capsys.readouterr().err
    assert tiny.call("generate", *weak[:-4], "--guidance-scale", "2", *weak[-2:], "--overwrite") == 0
    assert "ignored" not in capsys.readouterr().err
    assert "--obedience shapes" in tiny.refused("evaluate", "--model", denoiser).hint
    assert tiny.call("evaluate", "--model", denoiser, "--obedience", "shapes", "--count", 2, "--device", "cpu") == 0


def test_what_is_inverted_is_a_picture_of_its_own(denoiser: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "none.png", "n" * 300):
        asked = ("--prompt", "x", "--sampler", "ddim", "--invert", tmp_path / name)
        problem = tiny.refused("generate", *words(denoiser, tmp_path / "out", *asked))
        assert problem.code == 3 and problem.what.startswith("--invert ") and problem.hint, name
