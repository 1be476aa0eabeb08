"""Hints of messages that no command line brings about here, followed by their own words."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hint_places import png

from training.data.images import Images
from training.data.latents import Latents
from training.data.order import Slot
from training.errors import UserError
from training.loop.watchdogs import explain
from training.packing.finding import UNPACKERS
from training.shards.index import write_index
from training.shards.reading import ShardSet
from training.shards.writing import ShardWriter


def shards_of(folder: Path, kind: Any, summary: dict[str, Any], *samples: dict[str, bytes]) -> ShardSet:
    folder.mkdir()
    writer = ShardWriter(folder, "train")
    for number, fields in enumerate(samples):
        writer.add(f"{number:04d}", fields)
    write_index(folder, writer.finish(), summary, kind)
    return ShardSet(folder)


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_verify_names_the_sample_that_training_could_not_read(kind: str, tmp_path: Path) -> None:
    """Whole by its bytes, so that the first who tells is who decodes it."""
    sound, caption = io.BytesIO(), {"json": json.dumps({"captions": ["red"]}).encode()}
    np.save(sound, np.zeros((4, 2, 2), "float16"))
    data: Any
    if kind == "images":
        samples = [{"png": png(0), "txt": b"red"}, {"png": b"no picture", "txt": b"red"}]
        data = Images(shards_of(tmp_path / "data", kind, {}, *samples), on_bad_data="error")
    else:
        samples = [{"moments.npy": moments, **caption} for moments in (sound.getvalue(), b"no numbers")]
        stored = {"latent": {"shape": [4, 2, 2], "dtype": "float16"}}
        data = Latents(shards_of(tmp_path / "data", kind, stored, *samples), on_bad_data="error")
    with pytest.raises(UserError) as caught:
        data.__getitems__([Slot(1, 0, 1)])
    words = shlex.split(caught.value.hint.removeprefix("run: "))
    assert Path(words[1]).name == "make_shards.py"
    problem = tiny.refused("make_shards", *words[2:])
    assert "0001" in problem.what and "0000:" not in problem.what and problem.hint


def test_what_a_failed_step_proposes_is_taken(shapes: Path) -> None:
    flags = [word for word in tiny.AUTOENCODER if word != "--batch-size" and word != "32"]
    words = ("--data", shapes, *flags, "--batch-size", 64, "--dry-run")
    told = explain(torch.OutOfMemoryError("CUDA out of memory. Tried"), 3, 16, 64)
    assert isinstance(told, UserError)
    flag, half, alternative = re.findall(r"--[\w-]+|(?<= )\d+(?=,)|auto", told.hint)[:3]
    for way in (half, alternative):  # bf16 is another scenario's: Accelerate keeps one precision per process
        assert tiny.call("train_autoencoder", *words, flag, way) == 0
    failure = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})("no compiler")
    told = explain(failure, 3, 16, 64)
    assert isinstance(told, UserError)
    assert tiny.call("train_autoencoder", *words, *told.hint.removeprefix("use ").split()) == 0


@pytest.mark.parametrize("suffix", UNPACKERS)
def test_what_unpacks_an_archive_works(suffix: str, tmp_path: Path) -> None:
    """With a blank in the names; a tool that is not here is not asked for."""
    tools = {".zst": "zstd", ".lz4": "lz4", ".gz": "gzip", ".7z": "7z", ".rar": "unrar"}
    if not shutil.which(tools[suffix]):
        pytest.skip(f"no {tools[suffix]}")
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.png").write_bytes(png(ord(name)))
    source, whole = tmp_path / f"my data.tar{suffix}", tmp_path / "my data.tar"
    with tarfile.open(whole, "w") as archive:
        archive.add(tmp_path / "in", "in")
    if suffix == ".gz":  # a tar in it is read in place, one picture is not
        source, whole = tmp_path / "my data.png.gz", tmp_path / "my data.png"
        whole.write_bytes(png(1))
    made = {".7z": ["7z", "a", source, tmp_path / "in"], ".lz4": ["lz4", whole, source], ".gz": ["gzip", whole]}
    subprocess.run([str(word) for word in made.get(suffix, ["zstd", "-q", whole])], check=True, capture_output=True)
    words = ("--output", tmp_path / "out", "--resolution", 16, "--missing-caption", "empty", "--val-fraction", 0)
    problem = tiny.refused("make_shards", "pack", source, *words)
    command, folder = problem.hint.removeprefix("unpack it: ").split("; then pack ")
    subprocess.run(command, shell=True, check=True)
    assert tiny.call("make_shards", "pack", *shlex.split(folder), *words) == 0
