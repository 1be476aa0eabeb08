"""What the start of a run costs on a large index, and a read from it: ten million samples, simulated."""

from __future__ import annotations

from pathlib import Path

import pytest
from peaks import told

from training.benchmarks.order import simulated
from training.errors import UserError
from training.shards import reading
from training.shards.offset_index import index_path
from training.shards.reading import ShardSet
from training.shards.remote import open_address

SHARDS, ROWS = 5000, 2000


def test_the_start_on_ten_million_samples(tmp_path: Path) -> None:
    """CPU seconds and memory of opening a split of 10,000,000 samples in 5,000 shards and of drawing its first batch,
    then of reading 5,000 samples at random; no more files open than its cache may hold, where mapping every index would
    take 5,000."""
    simulated(tmp_path, SHARDS, ROWS)
    code = f"""
import os, random, resource, time
from training.data.order import DataOrder
from training.shards.reading import OPEN_FILES, ShardSet
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
before, begun = peak(), time.process_time()
shards = ShardSet({str(tmp_path)!r})
slots = DataOrder(len(shards), 256, 0).at(0, 0, 256)
print(len(shards), time.process_time() - begun, peak() - before)
for i in random.Random(0).sample(range(len(shards)), 5000):
    assert shards.read(i) == {{"txt": b"words"}} and shards.key(i) == f"{{i % {ROWS}:09d}}"
assert len(os.listdir("/proc/self/fd")) < OPEN_FILES + 50
print(len(shards), time.process_time() - begun, peak() - before)
"""
    (count, start, held), (_, seconds, grown) = [map(float, line.split()) for line in told(code, 250)]
    assert count == SHARDS * ROWS
    assert start < 4 and seconds < 5  # 0.8 and 0.9 on a slow core
    assert held < 30_000 and grown - held < 10_000  # kB: what index.json says of the shards, and rows of theirs


def test_the_start_does_not_read_the_rows(tmp_path: Path) -> None:
    """Of each index only the header: the rest may be anything until it is asked for."""
    simulated(tmp_path, 3, 100)
    path = index_path(tmp_path / "train-000001.tar")
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-100] + bytes(100))
    assert len(ShardSet(tmp_path)) == 300


def test_of_many_shards_an_index_is_opened_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage of one is told then, and no more of them are held than may be."""
    monkeypatch.setattr(reading, "AT_THE_START", 2)
    monkeypatch.setattr(reading, "HELD", 2)
    simulated(tmp_path, 4, 10)
    index_path(tmp_path / "train-000001.tar").unlink()
    shards = ShardSet(tmp_path)
    assert [shards.key(i) for i in (3, 25, 39)] == ["000000003", "000000005", "000000009"]
    with pytest.raises(UserError, match=r"train-000001\.index\.npy: the shard's offset index is missing") as caught:
        shards.read(10)
    assert caught.value.code == 3
    assert shards._found.cache_info()[1:] == (4, 2, 2)  # opened, the most, held
    monkeypatch.setattr(reading, "AT_THE_START", 4)
    with pytest.raises(UserError, match="offset index is missing"):
        ShardSet(tmp_path)


def test_of_many_shards_at_an_address_an_index_comes_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "AT_THE_START", 2)
    (source := tmp_path / "source").mkdir()
    simulated(source, 4, 10)
    shards = ShardSet(open_address(f"file://{source}", str(tmp_path / "cache")))
    assert not list(tmp_path.glob("cache/*/*.npy"))
    assert shards.read(17) == {"txt": b"words"} and shards.windows == ((10,) * 4, 16)
    assert [path.name for path in tmp_path.glob("cache/*/*.npy")] == ["train-000001.index.npy"]
