"""Small folders and tars of captioned pictures, packed through the command line, and what came of them; latents told
anew."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.doors.make_shards import main
from training.errors import UserError
from training.shards.index import write_index
from training.shards.reading import ShardSet
from training.shards.writing import ShardWriter

SMALL = ("--resolution", "8", "--val-fraction", "0")


def png(seed: int, form: str = "PNG") -> bytes:
    """A picture of noise, another for each seed."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    """A folder of the files named."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def tar(path: Path, files: dict[str, bytes | str], mode: str = "w") -> Path:
    """A tar of the files named, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            content = data.encode() if isinstance(data, str) else data
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


class Packed:
    """What a packing came to: captions and further facts by key, keys by split, and the ledger."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        self.ledger: dict[str, Any] = index["summary"]["ledger"]
        self.captions: dict[str, list[str]] = {}
        self.meta: dict[str, dict[str, Any]] = {}
        self.splits: dict[str, set[str]] = {}
        for split in index["summary"]["counts"]:
            shards = ShardSet(folder, split)
            self.splits[split] = {shards.key(i) for i in range(len(shards))}
            for i in range(len(shards)):
                self.meta[shards.key(i)] = meta = json.loads(shards.read_field(i, "json"))
                self.captions[shards.key(i)] = meta.pop("captions")

    def counts(self, effect: str) -> dict[str, int]:
        """How many of each kind have an effect in the ledger."""
        return {kind: entry["count"] for kind, entry in self.ledger.get(effect, {}).items()}


def words(source: object, output: Path, flags: tuple[str, ...]) -> list[str]:
    """The command line that packs a source, or several in a list."""
    sources = source if isinstance(source, list) else [source]
    return ["pack", *map(str, sources), "--output", str(output), *SMALL, *flags]


def pack(source: object, output: Path, *flags: str) -> Packed:
    """Packs a source that must come through."""
    main(words(source, output, flags))
    return Packed(output)


def refused(source: object, output: Path, *flags: str) -> UserError:
    """The error of a source that must not, of which nothing is left as if it were whole."""
    with pytest.raises(UserError) as caught:
        main(words(source, output, flags))
    assert not (output / "index.json").exists()
    return caught.value


def retold(latents: Path, folder: Path, caption: Callable[[str], str]) -> Path:
    """The same latents, each of one caption, made of its first."""
    shutil.copytree(latents / "autoencoder", folder / "autoencoder")
    infos = []
    for name in ("train", "val"):
        source, writer = ShardSet(latents, name), ShardWriter(folder, name)
        for i in range(len(source)):
            fields = source.read(i)
            notes = json.loads(fields["json"])
            notes["captions"] = [caption(notes["captions"][0])]
            writer.add(source.key(i), fields | {"json": json.dumps(notes).encode()})
        infos += writer.finish()
    write_index(folder, infos, source.summary, "latents")
    return folder
