"""Latents are what the encoder gives, restartable by shard, and never of something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from autoencoder.images import to_unit
from autoencoder.kl import KLAutoencoder
from training.data import Images, Latents
from training.order import Slot
from training.runs import load_autoencoder
from training.shard_checks import verify
from training.shards import ShardSet

SLOTS = [Slot(i, 0, i) for i in range(12)]


def encode(autoencoder: Path, data: Path, output: Path, *words: object) -> tuple[object, ...]:
    return ("--autoencoder", autoencoder, "--data", data, "--output", output, "--device", "cpu", *words)


@pytest.mark.parametrize("split", ["train", "val"])
def test_moments_equal_the_models(latents: Path, shapes: Path, autoencoder: Path, split: str) -> None:
    model = load_autoencoder(autoencoder)
    pixels = Images(ShardSet(shapes, split)).__getitems__(SLOTS).data
    stored = ShardSet(latents, split)
    data = Latents(stored)
    for field, images in (("moments.npy", pixels), ("mirror.npy", pixels.flip(-1))):
        ours = np.stack([data.moments(i, field) for i in range(12)]).astype(np.float32)
        theirs = model.encode(to_unit(images)).numpy()
        assert np.allclose(ours, theirs, rtol=2e-3, atol=2e-3)
    for i in range(12):
        source = ShardSet(shapes, split)
        assert stored.key(i) == source.key(i) and stored.read_field(i, "txt") == source.read_field(i, "txt")
        assert data.captions(i) == json.loads(source.read_field(i, "json"))["captions"]


def test_the_index(latents: Path, autoencoder: Path) -> None:
    summary = ShardSet(latents).summary
    record = json.loads((autoencoder / "run.json").read_text())
    assert summary["encoder"] == record["hashes"]["encoder"] and summary["text_encoder"] is None
    assert summary["latent"] == {"shape": [8, 8, 8], "dtype": "float16", "picture": [32, 32], "factor": 4}
    assert summary["mirrored"] and verify(latents).problems == ()
    again = load_autoencoder(latents / "autoencoder")
    theirs = load_autoencoder(autoencoder).state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in again.state_dict().items())


def test_a_restart_keeps_sound_shards(
    shapes: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, calls, whole = tmp_path / "latents", [0], KLAutoencoder.encode

    def fail_third(self: KLAutoencoder, images: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise SystemError
        return whole(self, images)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(KLAutoencoder, "encode", fail_third)
        tiny.call("encode_latents", *encode(autoencoder, shapes, target))
    kept = {path: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert len(kept) == 2 and not (target / "index.json").exists()
    damaged = max(kept)
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    (target / ".train-000002.tar.99.partial").write_bytes(b"half")
    assert tiny.call("encode_latents", *encode(autoencoder, shapes, target)) == 0
    assert min(kept).stat().st_mtime_ns == kept[min(kept)] and damaged.stat().st_mtime_ns != kept[damaged]
    assert verify(target).problems == () and not list(target.glob(".*"))
    straight = tmp_path / "straight"
    assert tiny.call("encode_latents", *encode(autoencoder, shapes, straight, "--batch-size", 64)) == 0
    for path in straight.glob("train-*.tar"):
        assert (target / path.name).read_bytes() == path.read_bytes()


def test_what_is_refused(shapes: Path, autoencoder: Path, latents: Path, denoiser: Path, tmp_path: Path) -> None:
    problem = tiny.refused("encode_latents", *encode(autoencoder, shapes, latents, "--dtype", "float32"))
    assert problem.code == 4 and "flip" in problem.what and "latent" in problem.what
    problem = tiny.refused("encode_latents", *encode(autoencoder, shapes, autoencoder))
    assert problem.code == 4 and "holds no latents" in problem.what
    problem = tiny.refused("encode_latents", *encode(denoiser, shapes, tmp_path / "a"))
    assert problem.code == 4 and "expected autoencoder" in problem.what
    problem = tiny.refused("encode_latents", *encode(tmp_path / "none", shapes, tmp_path / "a"))
    assert problem.code == 4 and "no such run" in problem.what
    problem = tiny.refused("encode_latents", *encode(autoencoder, tmp_path, tmp_path / "a"))
    assert problem.code == 3 and "index.json" in problem.what
    unfinished = tmp_path / "unfinished"
    shutil.copytree(autoencoder, unfinished)
    shutil.rmtree(unfinished / "final")
    problem = tiny.refused("encode_latents", *encode(unfinished, shapes, tmp_path / "a"))
    assert problem.code == 4 and "not finished" in problem.what
    assert not (tmp_path / "a").exists()


def test_non_finite_latents_are_refused(
    shapes: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = KLAutoencoder.encode
    for value in (float("nan"), 1e6):  # the second is finite, but not as float16
        monkeypatch.setattr(KLAutoencoder, "encode", lambda self, x, v=value: whole(self, x).index_fill(0, TWO, v))
        problem = tiny.refused("encode_latents", *encode(autoencoder, shapes, tmp_path / str(value)))
        assert problem.code == 5 and ShardSet(shapes).key(2) in problem.what and "--dtype float32" in problem.hint
        assert not list((tmp_path / str(value)).glob("*.tar"))


TWO = torch.tensor([2])


def test_pictures_the_factor_does_not_divide(autoencoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "odd"
    words = f"pack shapes --samples 8 --resolution 38 --val-fraction 0.2 --output {data}".split()
    tiny.call("make_shards", *words)
    problem = tiny.refused("encode_latents", *encode(autoencoder, data, tmp_path / "out"))
    assert problem.code == 3 and "divisible by the autoencoder's factor 4" in problem.what
    problem = tiny.refused("train_autoencoder", "--data", data, "--output", tmp_path / "run", *tiny.AUTOENCODER)
    assert problem.code == 2 and "38x38" in problem.what and "--resolution 36 or 40" in problem.hint


def test_latents_beside_another_autoencoder(latents: Path, shapes: Path, tmp_path: Path) -> None:
    """The autoencoder retrained in place under the same path: refused with both hashes."""
    other, copy = tmp_path / "other", tmp_path / "latents"
    flags = [*tiny.AUTOENCODER, "--max-steps", "1", "--seed", "9"]
    assert tiny.call("train_autoencoder", "--data", shapes, "--output", other, *flags) == 0
    shutil.copytree(latents, copy)
    shutil.copytree(other / "final", copy / "autoencoder", dirs_exist_ok=True)
    problem = tiny.refused("train_denoiser", "--latents", copy, "--output", tmp_path / "run", *tiny.DENOISER)
    assert problem.code == 4 and "latents were made by autoencoder" in problem.what
