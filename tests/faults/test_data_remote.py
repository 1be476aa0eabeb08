"""Shards at an address: the samples of the local folder, a cache that keeps its bound, and every way it can fail."""

from __future__ import annotations

import errno
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fsspec.implementations.memory import MemoryFileSystem

from training.commands import door
from training.data.images import Images
from training.data.loader import stream
from training.data.order import Batches, DataOrder
from training.data.prefetch import prefetching
from training.errors import Unreachable, UserError
from training.machine import faults
from training.shards import remote as remotes
from training.shards.addresses import redact, repeat_command
from training.shards.index import write_index
from training.shards.reading import ShardSet
from training.shards.remote import Remote, open_address
from training.shards.writing import ShardWriter

MEMORY = MemoryFileSystem()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remotes, "PAUSE", 0.0)
    yield
    MEMORY.store.clear()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Eight shards of five samples."""
    folder = tmp_path / "packed"
    folder.mkdir()
    writer = ShardWriter(folder, "train", 5)
    for i in range(40):
        writer.add(f"{i:04d}", {"txt": f"caption {i}".encode(), "bin": bytes([i]) * 3000})
    write_index(folder, writer.finish(), {})
    return folder


def upload(folder: Path, address: str = "memory://bucket/data") -> str:
    MEMORY.put(str(folder) + "/", address + "/", recursive=True)
    return address


def gigabytes_of(folder: Path, shards: int) -> float:
    return shards * max(info.bytes for info in ShardSet(folder).shards) / 1e9


def placed(address: str, cache: Path, **given: Any) -> Remote:
    place = open_address(address, str(cache), **given)
    assert isinstance(place, Remote)
    return place


def tars(cache: Path) -> list[str]:
    return sorted(tar.name for tar in cache.glob("*/*.tar"))


@pytest.mark.parametrize("kind", ["memory", "file", "http"])
def test_the_samples_are_those_of_the_folder(packed: Path, tmp_path: Path, kind: str) -> None:
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(packed)))  # type: ignore[arg-type]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if kind == "http":
        pytest.importorskip("aiohttp")
    address = {"file": f"file://{packed}", "http": f"http://127.0.0.1:{server.server_port}/?token=hidden"}.get(kind)
    try:
        here, there = ShardSet(packed), ShardSet(placed(address or upload(packed), tmp_path / "cache"))
        assert tars(tmp_path / "cache") == []  # nothing is fetched before it is read
        again = pickle.loads(pickle.dumps(there))
        for i in (39, 0, 7, 20):
            assert there.key(i) == here.key(i) and there.read(i) == here.read(i) == again.read(i)
        assert len(tars(tmp_path / "cache")) == 4
    finally:
        server.shutdown()
        server.server_close()


def test_the_cache_keeps_its_bound_and_the_last_read(packed: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    remote = placed(upload(packed), cache, cache_size=gigabytes_of(packed, 3))
    shards, here = ShardSet(remote), ShardSet(packed)
    for i in (0, 5, 10, 0, 15):  # shards 0 1 2 0 3: 1 is the one not read for longest
        assert shards.read(i) == here.read(i)
        assert sum(tar.stat().st_size for tar in cache.glob("*/*.tar")) <= remote.limit
    assert tars(cache) == [f"train-{n:06d}.tar" for n in (0, 2, 3)]
    with pytest.raises(UserError, match="does not fit into a cache") as caught:
        ShardSet(replace(remote, limit=1000)).read(39)
    assert caught.value.code == 6 and "--cache-size" in caught.value.hint
    (dead := shards.directory / ".train-000007.tar.partial").write_bytes(bytes(remote.limit))
    assert shards.read(20) == here.read(20) and not dead.exists()  # what a killed process left takes no room


def test_a_lost_connection_is_tried_again(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, opened = upload(packed, "memory://me:hidden@bucket/data"), MemoryFileSystem._open
    place = placed(address, tmp_path / "cache")
    shards, here = ShardSet(place), ShardSet(packed)
    fails = remotes.ATTEMPTS - 1

    def unsteady(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal fails
        fails -= 1
        if fails >= 0:
            raise ConnectionResetError("reset by peer at memory://me:hidden@bucket/data")
        return opened(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "_open", unsteady)
    assert shards.read(3) == here.read(3) and fails == -1
    fails = 10**6
    with pytest.raises(Unreachable, match=r"train-000003.tar could not be read in 5 attempts.*reset by peer") as caught:
        shards.read(15)
    assert "hidden" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.parametrize("change", ["byte", "cut", "longer", "gone"])
def test_a_shard_that_was_changed_is_found(packed: Path, tmp_path: Path, change: str) -> None:
    address = upload(packed)
    shards = ShardSet(placed(address, tmp_path / "cache"))
    tar = f"{address}/train-000001.tar"
    data = MEMORY.cat(tar)
    if change == "gone":
        MEMORY.rm(tar)
    else:
        other = {"byte": data[:600] + b"?" + data[601:], "cut": data[:-512], "longer": data + b"?" * 512}[change]
        MEMORY.pipe(tar, other)
    with pytest.raises(Unreachable, match="is not there" if change == "gone" else "changed after indexing") as caught:
        shards.read(5)
    assert caught.value.code == 3 and tars(tmp_path / "cache") == []
    MEMORY.pipe(tar, data)
    assert shards.read(5) == ShardSet(packed).read(5)


def test_too_long_an_answer_leaves_nothing(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = upload(packed)
    shards, tar = ShardSet(placed(address, tmp_path / "cache")), f"{address}/train-000001.tar"
    data = MEMORY.cat(tar)
    MEMORY.pipe(tar, data + bytes(512))
    monkeypatch.setattr(remotes.time, "sleep", lambda _: MEMORY.pipe(tar, data))  # mended before the second attempt
    assert shards.read(5) == ShardSet(packed).read(5)
    assert (shards.directory / "train-000001.tar").read_bytes() == data


def test_models_beside_latents_come_too(packed: Path, tmp_path: Path) -> None:
    names = ["autoencoder/config.json", "autoencoder/model.safetensors", "text_encoder/a/b.json", remotes.NULL]
    for name in names:
        (packed / name).parent.mkdir(parents=True, exist_ok=True)
        (packed / name).write_text(name)
    remote = placed(upload(packed), tmp_path / "cache")
    remote.bring_models(text=False)
    assert not (remote.folder / "text_encoder").exists()
    remote.bring_models(text=True)
    assert [(remote.folder / name).read_text() for name in names] == names
    MEMORY.rm(f"memory://bucket/data/{remotes.NULL}")
    with pytest.raises(UserError, match="not that of the empty caption") as caught:
        remote.bring_models(text=True)
    assert caught.value.code == 4 and "encode_latents" in caught.value.hint


def test_a_cached_shard_cut_short_is_fetched_again(packed: Path, tmp_path: Path) -> None:
    shards = ShardSet(placed(upload(packed), tmp_path / "cache"))
    wanted = shards.read(0)
    tar = shards.directory / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:1000])
    assert shards.read(0) == wanted


def test_a_full_disk_is_one_sentence(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(placed(upload(packed), tmp_path / "cache"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remotes.os, "fsync", full)
    with pytest.raises(UserError, match="No space left") as caught:
        shards.read(0)
    assert caught.value.code == 6 and "--cache-dir" in caught.value.hint and tars(tmp_path / "cache") == []


def test_another_index_has_a_folder_of_its_own(packed: Path, tmp_path: Path) -> None:
    address = upload(packed)
    first = placed(address, tmp_path / "cache")
    assert placed(address, tmp_path / "cache").folder == first.folder
    MEMORY.pipe(f"{address}/index.json", (packed / "index.json").read_bytes() + b"\n")
    assert placed(address, tmp_path / "cache").folder != first.folder


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("pipe:cat x.tar", "refused"),
        ("zip://a::memory://b", "refused"),
        ("nosuch://x", "nosuch"),
        ("memory://empty", "index.json is not there"),
    ],
)
def test_addresses_that_are_refused(address: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        open_address(address, str(tmp_path))


def test_no_secret_is_shown() -> None:
    assert redact("https://me:word@host:80/a/b?token=1#x") == "https://host:80/a/b"
    assert redact("s3://bucket/data") == "s3://bucket/data"


def test_a_command_to_repeat_hides_what_may_be_secret() -> None:
    plain = ["train.py", "--data", "s3://bucket/a b", "--output", "runs/x"]
    assert repeat_command(plain) == "train.py --data 's3://bucket/a b' --output runs/x"
    for address in (
        "https://me:w@rd@host:80/a?token=1#x",
        "--data=https://me@host:80/a?x",
        "https://:word@host:80/a#x",
    ):
        command, note = repeat_command(["train.py", address, "--resume", "auto"]).splitlines()
        assert command.endswith("https://HIDDEN@host:80/a?HIDDEN' --resume auto"), command
        assert note.startswith("note: put user, password or query of the address back where HIDDEN stands")
    assert "HIDDEN" not in repeat_command(["a@b", "x?y", "c:/d"])


def windows(packed: Path, cache: Path, shards: int, steps: int) -> tuple[Remote, ShardSet, Batches]:
    remote = placed(upload(packed), cache, cache_size=gigabytes_of(packed, shards), window=2)
    split = ShardSet(remote)
    return remote, split, Batches(DataOrder(40, 4, 3, (0, 0), *split.windows), 4, 1, 0, 1, 0, steps)


def test_two_windows_are_enough(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs read with room for two windows of two: each shard comes from the address once an epoch."""
    came: list[str] = []
    copy = Remote._copy
    monkeypatch.setattr(Remote, "_copy", lambda self, shard, file: (came.append(shard.name), copy(self, shard, file)))
    remote, shards, batches = windows(packed, tmp_path / "cache", 4, 20)
    here, seen = ShardSet(packed), []
    for slots in prefetching(batches, shards):
        assert len({i.index // 5 for i in slots}) <= 2 * 2
        seen += [s.index for s in slots]
        assert all(shards.read(s.index) == here.read(s.index) for s in slots)
        assert len(tars(tmp_path / "cache")) <= 4
    assert sorted(seen) == sorted([*range(40)] * 2) and len(came) <= 2 * 8 + 4  # and what is ahead of the end
    with pytest.raises(UserError, match="two windows of 2 shards") as caught:
        prefetching(batches, ShardSet(replace(remote, limit=remote.limit - 1)))
    assert caught.value.code == 6 and "--train.window_shards" in caught.value.hint


def test_readers_share_a_cache(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[str] = []
    copy = Remote._copy
    monkeypatch.setattr(Remote, "_copy", lambda self, shard, file: (came.append(shard.name), copy(self, shard, file)))
    shards, here = ShardSet(placed(upload(packed), tmp_path / "cache")), ShardSet(packed)
    found: list[list[dict[str, bytes]]] = []
    readers = [threading.Thread(target=lambda: found.append([shards.read(i) for i in range(40)])) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert found == [[here.read(i) for i in range(40)]] * 4 and len(came) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(shapes: Path, tmp_path: Path, workers: int) -> None:
    remote = placed(upload(shapes), tmp_path / "cache", window=2)
    images, here = Images(ShardSet(remote), flip=True), Images(ShardSet(shapes), flip=True)
    batches = Batches(DataOrder(96, 16, 0, (0, 0), *images.shards.windows), 16, 1, 0, 1, 0, 7)
    assert images.shards.windows == ((40, 40, 16), 2) and here.shards.windows == ((), 0)
    read = list(stream(images, batches, workers))
    assert len(read) == 7
    for batch, slots in zip(read, batches, strict=True):
        assert torch.equal(batch.data, here.__getitems__(slots).data)


@pytest.mark.parametrize(
    ("summary", "warned"),
    [({}, True), ({"order": "source"}, True), ({"order": "mixed"}, False), ({"source": "shapes"}, False)],
)
def test_shards_in_the_order_of_their_source_are_warned_of(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], summary: dict[str, str], warned: bool
) -> None:
    """Once, and only where a window is a part of them."""
    write_index(packed, ShardSet(packed).shards, summary)
    remote = placed(upload(packed, f"memory://bucket/{tmp_path.name}"), tmp_path / "cache", window=2, prefetch=False)
    shards = ShardSet(remote)
    batches = Batches(DataOrder(40, 8, 0, (0, 0), *shards.windows), 8, 1, 0, 1, 0, 1)
    for _ in range(2):
        assert prefetching(batches, shards) is batches
    said = capsys.readouterr().err
    assert said.count("packed in the order of its source; a window of 2 shards") == warned
    wide = ShardSet(placed(f"memory://bucket/{tmp_path.name}", tmp_path / "cache", window=8, prefetch=False))
    prefetching(batches, wide), prefetching(batches, ShardSet(packed))
    assert capsys.readouterr().err == ""


def test_an_unreachable_shard_is_no_bad_sample(shapes: Path, tmp_path: Path) -> None:
    """`--on-bad-data skip` replaces samples; a lost connection must stop the run, or it would learn from other data."""
    address = upload(shapes)
    images = Images(ShardSet(placed(address, tmp_path / "cache")), on_bad_data="skip")
    MEMORY.rm(f"{address}/train-000000.tar")
    order = DataOrder(96, 96, 0, (0, 0), *images.shards.windows)
    with pytest.raises(Unreachable):
        list(stream(images, Batches(order, 96, 1, 0, 1, 0, 1), 0))


def test_training_from_an_address_resumes_exactly(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = upload(shapes, "memory://me:hidden@bucket/data")
    caught: list[str] = []
    words = ["--data", address, "--cache-dir", tmp_path / "cache", *tiny.AUTOENCODER]
    words += ["--train.window_shards", 1, "--resume", "auto", "--max-steps", 5, "--save-every", 2]
    for run, fault in (("straight", ""), ("broken", "step:2=term"), ("broken", "")):
        monkeypatch.setenv("LDM_FAULT", fault)
        faults.visits.clear()
        assert tiny.call("train_autoencoder", *words, "--output", tmp_path / run) == (143 if fault else 0)
        caught.append(capsys.readouterr().err)
    for name in ("final/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    texts = [path for path in (tmp_path / "straight").rglob("*.json*") if path.is_file()]
    assert texts and not any("hidden" in path.read_text() for path in texts)
    assert "--data memory://HIDDEN@bucket/data --cache-dir" in caught[1] and "note: put user, password" in caught[1]
    assert not any("hidden" in said for said in caught)


def test_an_encoding_that_is_refused_tells_no_secret(autoencoder: Path, shapes: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "packed").mkdir()
    source, writer = ShardSet(shapes), ShardWriter(folder, "train")
    for i in range(50):
        writer.add(source.key(i), {"png": b"?"} if i in (3, 7) else source.read(i))
    write_index(folder, writer.finish(), {})
    words = ("--autoencoder", autoencoder, "--data", upload(folder, "memory://me:hidden@bucket/data"))
    problem = tiny.refused("encode_latents", *words, "--output", tmp_path / "out", "--cache-dir", tmp_path / "cache")
    assert problem.code == 3 and "2 of 50 samples" in problem.what
    assert problem.hint == f"run: {door('make_shards verify', 'memory://bucket/data')}"


def test_both_stages_go_by_address(shapes: Path, autoencoder: Path, latents: Path, tmp_path: Path) -> None:
    """Pictures at an address are encoded to the same latents; a denoiser finds models and samples at one."""
    cache = ("--cache-dir", tmp_path / "cache")
    words = ("--autoencoder", autoencoder, "--data", upload(shapes), "--output", tmp_path / "latents", "--flip")
    assert tiny.call("encode_latents", *words, *cache, "--device", "cpu") == 0
    tars_here = sorted(latents.glob("*.tar"))
    assert tars_here and all((tmp_path / "latents" / t.name).read_bytes() == t.read_bytes() for t in tars_here)
    words = ("--latents", upload(latents, "memory://bucket/latents"), "--output", tmp_path / "run")
    assert tiny.call("train_denoiser", *words, *cache, *tiny.DENOISER, "--max-steps", 2) == 0
    assert (tmp_path / "run" / "final" / "autoencoder" / "model.safetensors").is_file()
