"""Tiny data and runs, made once for all tests of training and scripts."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "support"))  # importlib mode alone would not find `tiny`

import students
import tiny

from training.messages import hush
from training.next_step import SCRIPTED

os.environ.pop(SCRIPTED, None)  # scripts/test.sh sets it as all scripts do: tests look at the next step, too


def pytest_collection_finish() -> None:
    tiny.keep()


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    """What a step started in this process leaves for all of it: denormal numbers turned off, and --quiet."""
    torch.set_flush_denormal(False)
    hush(False)


@pytest.fixture
def captured_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is compiled is captured as it would be, and then run operation by operation: no C++, no minutes."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    reset()
    counters.clear()
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled(self, **{"backend": "eager", **how}))
    yield
    reset()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 packed training scenes of 32 px in three shards, and 20 held-out ones."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    words = f"pack shapes --samples 96 --val-fraction 0.2 --samples-per-shard 40 --output {folder}".split()
    assert tiny.call("make_shards", *words) == 0
    return folder


@pytest.fixture(scope="session")
def autoencoder(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage-one run of six steps."""
    run = tmp_path_factory.mktemp("autoencoder") / "run"
    assert tiny.call("train_autoencoder", "--data", shapes, "--output", run, *tiny.AUTOENCODER) == 0
    tiny.keep()
    return run


@pytest.fixture(scope="session")
def latents(shapes: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes encoded, mirrored too."""
    folder = tmp_path_factory.mktemp("latents") / "shapes"
    words = ("--autoencoder", autoencoder, "--data", shapes, "--output", folder, "--flip", "--device", "cpu")
    assert tiny.call("encode_latents", *words) == 0
    return folder


@pytest.fixture(scope="session")
def denoiser(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage-two run of six steps."""
    run = tmp_path_factory.mktemp("denoiser") / "run"
    assert tiny.call("train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER) == 0
    tiny.keep()
    return run


@pytest.fixture(scope="session")
def taught(denoiser: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a `teacher` that hears captions, and of students of one step: `baked` its guidance of scale 2 in it,
    and `told` a scale from 1 to 8."""
    root = tmp_path_factory.mktemp("taught")
    tiny.shake(Path(shutil.copytree(denoiser, root / "teacher")) / "final")
    students.student(root / "teacher", latents, root / "baked")
    students.student(root / "teacher", latents, root / "told", "--student.guidance_scale", "1,8")
    tiny.keep()
    return root


@pytest.fixture(scope="session")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey noise of 16 x 16, packed as data; the identity as pixels, latents, and a denoiser of two steps as run."""
    root = tmp_path_factory.mktemp("pixels")
    (root / "in").mkdir()
    for i in range(40):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(noise).save(root / "in" / f"{i:02d}.png")
        (root / "in" / f"{i:02d}.txt").write_text(f"noise {'odd' if i % 2 else 'even'}")
    pack = ["--output", root / "data", "--resolution", 16, "--channels", 1, "--val-fraction", 0.2]
    assert tiny.call("make_shards", "pack", root / "in", *pack) == 0
    identity = ["--config", "identity", "--device", "cpu"]
    assert tiny.call("train_autoencoder", *identity, "--data", root / "data", "--output", root / "pixels") == 0
    encode = ["--autoencoder", root / "pixels", "--data", root / "data", "--output", root / "latents"]
    assert tiny.call("encode_latents", *encode, "--device", "cpu", "--num-workers", 0) == 0
    train = ["--latents", root / "latents", "--output", root / "run", "--batch-size", 16, "--max-steps", 2]
    assert tiny.call("train_denoiser", *tiny.DENOISER, *train) == 0
    tiny.keep()
    return root


@pytest.fixture(scope="session")
def upscaler(shapes: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser of 32 px that is shown 8 px, after a few steps."""
    root = tmp_path_factory.mktemp("upscaler")
    words = ("--autoencoder", autoencoder, "--data", shapes, "--output", root / "latents", "--low-res", 4)
    assert tiny.call("encode_latents", *words, "--device", "cpu") == 0
    words = ("--latents", root / "latents", "--output", root / "run", "--image.kind", "low-res")
    assert tiny.call("train_denoiser", *words, *tiny.DENOISER) == 0
    tiny.shake(root / "run" / "final")
    tiny.keep()
    return root / "run"
