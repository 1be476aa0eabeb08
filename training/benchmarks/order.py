"""What a run's start costs on very many samples, simulated, and the order of a batch: seconds and memory.

Two files a shard are linked in the folder of temporary files: quickest where that lies in memory (TMPDIR=/dev/shm).
"""

from __future__ import annotations

import io
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from training.settings.flags import Parser

LINKS = 10_000  # to one file; a filesystem allows some 60,000
BATCHES = (64, 256)
START = """
import sys, time
begun = time.perf_counter()
from training.data.order import DataOrder
from training.shards.reading import ShardSet
def told(what):
    with open("/proc/self/status") as status:  # of Linux: the most that the process has held
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    taken = time.perf_counter() - begun, time.process_time()
    print(f"{what:<42} {taken[0]:6.2f} s, of CPU {taken[1]:6.2f} s {peak / 1000:6.0f} MB", flush=True)
shards = ShardSet(sys.argv[1])
told(f"{len(shards):,} samples, {len(shards.shards):,} shards open")
slots = DataOrder(len(shards), 256, 0).at(0, 0, 256)
told("slots of a batch of 256, mixed as one")
sizes = tuple(info.samples for info in shards.shards)
windows = DataOrder(len(shards), 256, 0, shards=sizes, window=16).at(0, 0, 256)
told("slots of a batch of 256, windows of 16")
assert all(shards.read(slot.index) for slot in slots + windows)
told("512 samples read")
"""


def simulated(folder: Path, shards: int, rows: int) -> Path:
    """Shards that differ in name alone: links to one tar and one index, which are read as files of their own."""
    import numpy as np

    from training.shards.index import ShardInfo, write_index
    from training.shards.offset_index import index_path
    from training.shards.tars import END, make_index, member_bytes

    tar, places = bytearray(), {}
    for row in range(rows):
        places[f"{row:09d}"] = {"txt": (len(tar) + 512, 5)}
        tar += member_bytes(f"{row:09d}.txt", b"words")
    tar, out, infos = tar + END, io.BytesIO(), []
    digest = sha256(tar).hexdigest()
    np.save(out, make_index(places))
    for shard in range(shards):
        path = folder / f"train-{shard:06d}.tar"
        if shard % LINKS == 0:
            first = path
            first.write_bytes(tar)
            index_path(first).write_bytes(out.getvalue())
        else:
            path.hardlink_to(first)
            index_path(path).hardlink_to(index_path(first))
        infos.append(ShardInfo(path.name, "train", rows, len(tar), digest))
    write_index(folder, infos, {})
    return folder


def batch_seconds(rule: int, samples: int, batch: int) -> tuple[float, float]:
    """(mean over an epoch, most) CPU seconds that the slots of a batch take, what an epoch begins with included."""
    from training.data.order import DataOrder

    order, taken = DataOrder(samples, batch, 0, rule=rule), []
    for step in range(samples // batch):
        begun = time.process_time()
        order.at(step, 0, batch)
        taken.append(time.process_time() - begun)
    return sum(taken) / len(taken), max(taken)


def flags(parser: Parser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--shards", type=int, default=100_000, help="how many to simulate")
    add("--rows", type=int, default=10_000, help="samples of each")
    add("--samples", type=int, default=60_000, help="of the epoch whose batches are timed")
    parser.machine(device="")


def run(args: argparse.Namespace) -> None:
    """Print seconds and memory of a start, in a process of its own, and the cost of a batch by each rule."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        simulated(Path(folder), args.shards, args.rows)
        subprocess.run([sys.executable, "-c", START, folder], check=True)
    print(f"CPU milliseconds for the slots of a batch, {args.samples:,} samples: mean of an epoch, most")
    for batch in BATCHES:
        for rule, name in ((1, "drawn whole"), (2, "place by place")):
            best = min(batch_seconds(rule, args.samples, batch) for _ in range(3))
            mean, most = (1000 * seconds for seconds in best)
            print(f"batch of {batch:>3}, order {name:<14} {mean:6.3f} {most:6.2f}")
