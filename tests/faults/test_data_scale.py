"""What the start of a run costs on a large index, and a read from it. Ten million samples are simulated in the small:
500 shards stand for 5,000, and time and memory are held to a tenth of what those may take."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import tiny

from training.offsets import index_path
from training.shards import ShardInfo, ShardSet, write_index
from training.tars import END, make_index, member_bytes

SHARDS, ROWS = 500, 2000


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


def test_the_start_on_a_million_samples(tmp_path: Path) -> None:
    """CPU seconds and memory of opening a split of 1,000,000 samples in 500 shards, then reading 500 of them at random;
    no more files open than its cache may hold, where mapping every index would take 500."""
    simulated(tmp_path, SHARDS, ROWS)
    code = f"""
import os, random, resource, time
from training.order import DataOrder
from training.shards import OPEN_FILES, ShardSet
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
before, begun = peak(), time.process_time()
shards = ShardSet({str(tmp_path)!r})
slots = DataOrder(len(shards), 256, 0).at(0, 0, 256)
seconds = time.process_time() - begun
for i in random.Random(0).sample(range(len(shards)), 500):
    assert shards.read(i) == {{"txt": b"words"}} and shards.key(i) == f"{{i % {ROWS}:09d}}"
assert len(os.listdir("/proc/self/fd")) < OPEN_FILES + 50
print(len(shards), seconds, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tiny.ROOT, timeout=250)
    assert done.returncode == 0, done.stderr
    count, seconds, grown = map(float, done.stdout.split())
    assert count == SHARDS * ROWS
    assert seconds < 1 and grown < 60  # a permutation of 8 bytes a sample, and what numpy draws it with


def test_the_start_does_not_read_the_rows(tmp_path: Path) -> None:
    """Of each index only the header: the rest may be anything until it is asked for."""
    simulated(tmp_path, 3, 100)
    path = index_path(tmp_path / "train-000001.tar")
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-100] + bytes(100))
    assert len(ShardSet(tmp_path)) == 300
