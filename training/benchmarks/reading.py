"""Samples a second: reading by index, in order and shuffled, against the webdataset package on the same shards."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from training.settings.flags import Parser
    from training.shards.reading import ShardSet


def make(folder: Path, samples: int, shape: tuple[int, int, int] = (8, 8, 8)) -> None:
    """Made-up latents as encode_latents stores them: moments of `shape` in float16, a caption, metadata."""
    import io
    import json

    import numpy as np

    from training.shards.index import write_index
    from training.shards.writing import ShardWriter

    writer, random = ShardWriter(folder, "train"), np.random.default_rng(0)
    for i in range(samples):
        out = io.BytesIO()
        np.save(out, random.standard_normal(shape).astype(np.float16))
        caption = f"a red square left of circle {i}"
        notes = json.dumps({"captions": [caption]}).encode()
        writer.add(f"{i:08d}", {"moments.npy": out.getvalue(), "txt": caption.encode(), "json": notes})
    summary = {"latent": {"shape": list(shape), "dtype": "float16"}}
    write_index(folder, writer.finish(), summary, "latents")


def readers(shards: ShardSet) -> dict[str, Callable[[], int]]:
    """Each reads every sample's fields once, as bytes, and says how many they were."""
    import numpy as np
    import webdataset

    order = np.random.default_rng(0).permutation(len(shards)).tolist()
    tars = [str(shards.directory / info.name) for info in shards.shards]
    return {
        "by index, in order": lambda: sum(1 for i in range(len(shards)) if shards.read(i)),
        "by index, shuffled": lambda: sum(1 for i in order if shards.read(i)),
        "webdataset, in order": lambda: sum(1 for _ in webdataset.WebDataset(tars, shardshuffle=False)),
    }


def flags(parser: Parser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--data", metavar="DIR", type=Path, help="shards to read; small made-up latents when not given")
    add("--samples", type=int, default=20_000, help="how many to make up")
    add("--rounds", type=int, default=5, help="of all readers in turn; the best of each counts")
    parser.machine(device="")


def run(args: argparse.Namespace) -> None:
    """Read with every reader in turn and print the rates."""
    from tempfile import TemporaryDirectory

    from training.shards.reading import ShardSet

    with TemporaryDirectory() as made:
        if args.data is None:
            make(Path(made), args.samples)
        shards = ShardSet(args.data or made)
        best: dict[str, float] = {}
        for number in range(args.rounds):
            for name, read in readers(shards).items():
                begun = time.perf_counter()
                count = read()
                rate = count / (time.perf_counter() - begun)
                assert count == len(shards), f"{name} read {count} of {len(shards)} samples"
                best[name] = max(best.get(name, 0), rate)
                print(f"round {number + 1}: {name:<21} {rate:>9,.0f} samples/s", flush=True)
    print(f"\nbest of {args.rounds} rounds, {len(shards):,} samples in {len(shards.shards)} shards, one process:")
    for name, rate in best.items():
        print(f"{name:<21} {rate:>9,.0f} samples/s")
