"""Tiny data and runs, made once for all tests of training and scripts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))  # importlib mode alone would not find `tiny`

import tiny


def pytest_collection_finish() -> None:
    tiny.keep()


@pytest.fixture(autouse=True)
def full_floats() -> None:
    """A training started in this process turns denormal numbers off for all of it; here every test has them back."""
    torch.set_flush_denormal(False)


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
