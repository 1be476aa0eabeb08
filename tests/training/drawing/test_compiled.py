"""`generate --compile`: the same pictures, said to be compiled, and refused where that would end in a failure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from torch._dynamo.utils import counters

from training.pictures import grids

pytestmark = pytest.mark.usefixtures("captured_only")
WORDS = ("--prompt", "a red circle", "--num-images", "3", "--batch-size", "2", "--steps", "2", "--device", "cpu")


def kernels(picture: Path) -> str:
    return str(grids.facts(picture)["versions"]["kernels"])


def apart(one: Path, other: Path) -> int:
    pixels = [np.asarray(Image.open(path)).astype(int) for path in (one, other)]
    return int(np.abs(pixels[0] - pixels[1]).max())


def test_compiled_pictures_are_the_same(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two graphs for all of them, the network's and the decoder's; the last, smaller batch is not compiled for."""
    model = ("--model", denoiser)
    for name, words in {"plain": (), "compiled": ("--compile",)}.items():
        assert tiny.call("generate", *model, "--output", tmp_path / name, *WORDS, *words) == 0
    places = [f"{number:05d}.png" for number in range(3)]
    assert [kernels(tmp_path / "plain" / place) for place in places] == ["plain"] * 3
    assert [kernels(tmp_path / "compiled" / place) for place in places] == ["compiled", "compiled", "plain"]
    assert max(apart(tmp_path / "plain" / place, tmp_path / "compiled" / place) for place in places) <= 1
    assert not counters["graph_break"]
    assert counters["frames"] == {"total": 2, "ok": 2}
    capsys.readouterr()
    original = tmp_path / "compiled" / "00000.png"
    again = ("--like", original, "--device", "cpu", "--output")
    assert tiny.call("generate", *model, *again, tmp_path / "again", "--compile") == 0
    assert f"the same pixels as {original}" in capsys.readouterr().err
    assert kernels(tmp_path / "again" / "00000.png") == "compiled"


def test_like_says_that_kernels_differ(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where pixels do, of a picture that was drawn compiled."""
    assert tiny.call("generate", "--model", denoiser, "--output", tmp_path / "made", *WORDS, "--compile") == 0
    picture = tmp_path / "made" / "00000.png"
    facts = grids.facts(picture)
    grids.save(Image.fromarray(np.asarray(Image.open(picture)) ^ 1), picture, facts)
    capsys.readouterr()
    words = ("--like", picture, "--device", "cpu", "--output", tmp_path / "again")
    assert tiny.call("generate", "--model", denoiser, *words) == 0
    assert "what differs: kernels compiled then, plain now" in capsys.readouterr().err


def test_compiling_is_refused_where_it_would_fail(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    asked = ("generate", "--model", denoiser, "--output", tmp_path / "out", *WORDS, "--compile")
    problem = tiny.refused(*asked, "--restore", "box", "--image", picture)
    assert problem.code == 2 and "second derivative" in problem.what and problem.hint == "leave --compile out"

    def lacking() -> str:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lacking)
    problem = tiny.refused(*asked)
    assert "no C++ compiler" in problem.what and problem.hint.startswith("leave --compile out")
    assert not (tmp_path / "out").exists()
