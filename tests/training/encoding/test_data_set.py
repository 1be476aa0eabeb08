"""Latents are what the encoder gives, restartable by shard, and never of something else."""

from __future__ import annotations

import io
import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from threading import current_thread, main_thread
from threading import enumerate as enumerate_threads
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from autoencoder.images import to_unit
from autoencoder.kl import KLAutoencoder
from autoencoder.tiles import encode_tiled
from training.data.images import Images
from training.data.latents import Latents
from training.data.order import Slot
from training.encoding import data_set
from training.errors import UserError
from training.models.autoencoders import load_autoencoder
from training.shards.index import ShardInfo, read_index, write_index
from training.shards.indexing import index_folder
from training.shards.reading import ShardSet
from training.shards.remote import Remote
from training.shards.verifying import verify
from training.shards.writing import ShardWriter, write_shard

SLOTS = [Slot(i, 0, i) for i in range(12)]


def encode(autoencoder: Path, data: Path | str, output: Path, *words: object) -> tuple[object, ...]:
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


def test_hints_lie_beside_the_latents(tmp_path: Path) -> None:
    """Those of the pictures, as uint8 (C, H, W), and mirrored with --flip; other hints are other latents."""
    words = ("pack", "shapes", "--samples", 20, "--hint")
    tiny.call("make_shards", *words, "edges", "--output", tmp_path / "shapes")
    target = tmp_path / "latents"
    tiny.call("encode_latents", *encode(Path("demo"), tmp_path / "shapes", target, "--flip", "--num-workers", 0))
    assert verify(target).problems == ()
    stored, source = ShardSet(target), ShardSet(tmp_path / "shapes")
    assert stored.summary["hint"] == {"kind": "edges", "channels": 1, "of": "pixels"}
    for i in range(3):
        hint = np.asarray(Image.open(io.BytesIO(source.read_field(i, "hint.png"))))[None]
        for field, wanted in (("extra-image.npy", hint), ("mirror-image.npy", hint[..., ::-1])):
            found = np.load(io.BytesIO(stored.read_field(i, field)))
            assert found.dtype == np.uint8 and np.array_equal(found, wanted)
    seen = Latents(stored, flip=True).__getitems__(SLOTS).extras["image"]
    assert seen.shape == (12, 1, 32, 32) and set(seen.unique().tolist()) == {0.0, 1.0}
    # An index that is lost is made anew, hints and all.
    (target / "index.json").unlink()
    tiny.call("make_shards", "index", target)
    assert ShardSet(target).summary["hint"] == stored.summary["hint"]
    tiny.call("make_shards", *words, "mask", "--output", tmp_path / "masks")
    with pytest.raises(UserError, match="made from something else .*hint"):
        tiny.call("encode_latents", *encode(Path("demo"), tmp_path / "masks", target, "--flip"))


def test_a_picture_that_lost_its_hint_is_left_out(tmp_path: Path) -> None:
    tiny.call("make_shards", "pack", "shapes", "--samples", 4, "--hint", "edges", "--output", tmp_path / "shapes")
    source = ShardSet(tmp_path / "shapes")
    rows = [(source.key(i), dict(source.read(i))) for i in range(4)]
    del rows[1][1]["hint.png"]
    write_shard(tmp_path / "shapes", "train-000000", rows)
    index_folder(tmp_path / "shapes")
    words = encode(Path("demo"), tmp_path / "shapes", tmp_path / "latents", "--num-workers", 0)
    assert tiny.call("encode_latents", *words, "--on-bad-data", "skip") == 0
    assert len(ShardSet(tmp_path / "latents")) == 3
    summary = ShardSet(tmp_path / "latents").summary
    assert "hint that cannot be read" in str(summary["ledger"]["left out"])


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
    flags = " ".join(re.findall(r"--\S+ \w+", problem.hint)).split()  # the hint, followed: 1e6 is finite so
    assert tiny.call("encode_latents", *encode(autoencoder, shapes, tmp_path / "wide"), *flags) == 0


def test_workers_change_nothing(
    shapes: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read and decoded by this process or by others: the same bytes, and the same samples left out with their reasons.

    One has no picture, and one no captions, which is found after its picture was read ahead.
    """
    data, source = tmp_path / "data", ShardSet(shapes)
    data.mkdir()
    writer = ShardWriter(data, "train", 45)
    for i in range(300):  # a sample of another name each time
        fields = source.read(i % 96)
        spoilt = {7: {"png": b"?"}, 100: {"json": b"{"}}.get(i, {})
        writer.add(f"{i:04d}", fields | spoilt)
    write_index(data, writer.finish(), {})
    said = []
    for workers in (0, 1, 2):
        words = encode(autoencoder, data, tmp_path / str(workers), "--num-workers", workers, "--flip")
        words += ("--on-bad-data", "skip")
        assert tiny.call("encode_latents", *words) == 0
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: sample")])
        assert len(ShardSet(tmp_path / str(workers))) == 298
    assert [line.split()[4][:4] for line in said[0]] == ["0007", "0100"] and said[0] == said[1] == said[2]
    for path in (tmp_path / "0").glob("*.*"):
        assert path.read_bytes() == (tmp_path / "1" / path.name).read_bytes(), path
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path
    problem = tiny.refused("encode_latents", *encode(autoencoder, data, tmp_path / "x", "--num-workers", -1))
    assert problem.code == 2 and "--num-workers" in problem.what


def test_the_next_shard_is_fetched_while_this_one_is_encoded(
    shapes: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a thread of its own, unless the cache cannot hold two."""
    MemoryFileSystem().put(f"{shapes}/", "memory://encode/", recursive=True)
    fetch, asked = Remote.fetch, []

    def told(self: Remote, shard: ShardInfo) -> None:
        asked.append((current_thread() is main_thread(), shard.name))
        fetch(self, shard)

    monkeypatch.setattr(Remote, "fetch", told)
    infos = read_index(shapes)[1]
    for count, limit in ((3, sum(info.bytes for info in infos)), (1, max(info.bytes for info in infos))):
        asked.clear()
        target = tmp_path / str(count)
        words = ("--cache-dir", tmp_path / f"cache{count}", "--cache-size", limit / 1e9, "--num-workers", 0)
        assert tiny.call("encode_latents", *encode(autoencoder, "memory://encode", target, *words)) == 0
        for thread in (t for t in enumerate_threads() if t.name.endswith("(_fetch)")):
            thread.join()
        wanted = [after.name for info, after in pairwise(infos) if info.bytes + after.bytes <= limit]
        assert len(wanted) == count and [name for main, name in asked if not main] == wanted
        assert all((target / info.name).is_file() for info in infos)


def test_tiles(autoencoder: Path, tmp_path: Path) -> None:
    """Large pictures in overlapping tiles, as `encode_tiled` gives them; the index says so, and so does a restart."""
    data, target = tmp_path / "data", tmp_path / "latents"
    words = f"pack shapes --samples 6 --resolution 96 --val-fraction 0.4 --output {data}".split()
    assert tiny.call("make_shards", *words) == 0
    assert tiny.call("encode_latents", *encode(autoencoder, data, target, "--tile", 16, "--dtype", "float32")) == 0
    stored = ShardSet(target)
    assert stored.summary["tile"] == 16 and "tile" not in _summary(autoencoder, data, tmp_path / "whole")
    model, images = load_autoencoder(autoencoder), Images(ShardSet(data)).__getitems__(SLOTS[:2])
    wanted = encode_tiled(model, to_unit(images.data), tile=16, overlap=4)
    ours = torch.stack([torch.from_numpy(Latents(stored).moments(i).copy()) for i in range(2)])
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, model.encode(to_unit(images.data)), atol=1e-4)
    plan = json.loads((target / "encoding.json").read_text())
    problem = tiny.refused("encode_latents", *encode(autoencoder, data, target, "--dtype", "float32"))
    assert problem.code == 4 and "tile 16, now 0" in problem.what
    del plan["tile"]  # as a version without tiles wrote it
    (target / "encoding.json").write_text(json.dumps(plan))
    assert tiny.call("encode_latents", *encode(autoencoder, data, target, "--dtype", "float32")) == 0
    assert "--tile" in tiny.refused("encode_latents", *encode(autoencoder, data, tmp_path / "x", "--tile", 5)).what


@pytest.mark.parametrize(("reading", "encoding", "share"), [(1.0, 0.0, "100%"), (1.0, 28.75, "50%"), (0.0, 1.0, "0%")])
def test_the_time_spent_waiting_for_pictures_is_told(
    shapes: Path,
    autoencoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reading: float,
    encoding: float,
    share: str,
) -> None:
    """By a clock that only moves while one of the 115 pictures is read, or one of the 4 batches encoded."""
    clock, picture, whole = [0.0], Images.picture, KLAutoencoder.encode

    def slowly(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def done(*words: Any) -> Any:
            clock[0] += seconds
            return work(*words)

        return done

    monkeypatch.setattr("training.encoding.shard.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(Images, "picture", slowly(reading, picture))
    monkeypatch.setattr(KLAutoencoder, "encode", slowly(encoding, whole))
    words = encode(autoencoder, shapes, tmp_path / "latents", "--num-workers", 0)
    assert tiny.call("encode_latents", *words) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[-2].endswith(f"samples of 8x8x8), waiting for data {share}") and said[-1].startswith("next: ")


def test_of_several_processes_the_first_tells_its_share(
    shapes: Path, latents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = Namespace(num_workers=0, batch_size=8, on_bad_data=None)
    shards = read_index(shapes)[1]
    worker: Any = SimpleNamespace(total=sum(info.samples for info in shards))
    for own in (shards, shards[::2]):
        data_set._write(worker, shapes, latents, own, args, aloud=True)
    count, share = len(shards), len(shards[::2])
    assert capsys.readouterr().err.splitlines() == [
        f"kept: {count} of {count} shards, which are there",
        f"kept in the first process: {share} of {share} shards, which are there",
    ]


def _summary(autoencoder: Path, data: Path, target: Path) -> dict[str, object]:
    assert tiny.call("encode_latents", *encode(autoencoder, data, target)) == 0
    return ShardSet(target).summary


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
