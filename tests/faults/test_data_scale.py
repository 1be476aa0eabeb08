"""What the start of a run costs on a large index, and a read from it: ten million samples, simulated."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from peaks import told

from training.shards.index import ShardInfo, write_index
from training.shards.offset_index import index_path
from training.shards.reading import ShardSet
from training.shards.tars import END, make_index, member_bytes

SHARDS, ROWS = 5000, 2000


def simulated(folder: Path, shards: int, rows: int) -> Path:
    """Shards that differ in name alone: links to one tar and one index, which are read as files of their own."""
    tar, places = b"", {}
    for row in range(rows):
        member = member_bytes(f"{row:09d}.txt", b"words")
        places[f"{row:09d}"] = {"txt": (len(tar) + 512, 5)}
        tar += member
    (folder / "first.tar").write_bytes(tar + END)
    out = io.BytesIO()
    np.save(out, make_index(places))
    (folder / "first.npy").write_bytes(out.getvalue())
    infos = []
    for shard in range(shards):
        name = f"train-{shard:06d}.tar"
        (folder / name).hardlink_to(folder / "first.tar")
        index_path(folder / name).hardlink_to(folder / "first.npy")
        infos.append(ShardInfo(name, "train", rows, len(tar + END), ""))
    write_index(folder, infos, {})
    return folder


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
    assert held < 130_000 and grown - held < 10_000  # kB: a permutation of 8 bytes a sample, and rows of the shards


def test_the_start_does_not_read_the_rows(tmp_path: Path) -> None:
    """Of each index only the header: the rest may be anything until it is asked for."""
    simulated(tmp_path, 3, 100)
    path = index_path(tmp_path / "train-000001.tar")
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-100] + bytes(100))
    assert len(ShardSet(tmp_path)) == 300
