"""A folder that img2dataset downloaded into, as it lies: shards 00000, 00001, … of tars, folders or parquet, each with
the counts of its download beside it (00000_stats.json) and, but for parquet, a table of all its rows (00000.parquet).

Rows that failed have no picture and stand in the tables alone. Layout: what the writers of img2dataset 1.47 do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from training.errors import DATA, UserError
from training.guarding import read_record
from training.packing.arrow import Arrow
from training.packing.folder import Folder
from training.packing.sources import Reading, Remark, Sample, Source
from training.packing.tar_source import Tars
from training.packing.texts import failed
from training.packing.trees import Directory

SHARD = re.compile(r"(\d+)(\.tar|\.tfrecord|\.parquet|)")
STATS = "_stats.json"
COUNTS = dict.fromkeys(("successes", "failed_to_download", "failed_to_resize"), int)
UNFINISHED = "shard that img2dataset did not finish, and does when it is started again"


def shards_of(folder: Path) -> dict[str, dict[str, Path]]:
    """The files and folders of each shard, by what they end in; none where the folder is not of img2dataset."""
    shards: dict[str, dict[str, Path]] = {}
    for path in folder.iterdir():
        if (match := SHARD.fullmatch(path.name)) and (match[2] or path.is_dir()):
            shards.setdefault(match[1], {})[match[2]] = path
    shards = dict(sorted(shards.items()))
    return shards if any((folder / f"{stem}{STATS}").is_file() for stem in shards) else {}


class Img2Dataset(Source):
    """The shards of a download, read as tars, a folder or parquet files are; a caption file is one caption.

    Failed rows are counted as ignored, by the counts beside the shards or, in parquet, row by row; shards without
    counts are left out: those that a download was stopped in. Raises UserError(code 3) for tfrecord.
    """

    def __init__(self, folder: Path, shards: dict[str, dict[str, Path]], reading: Reading) -> None:
        self.name, reading = str(folder), replace(reading, caption_lines="join")
        kinds = {kind for paths in shards.values() for kind in paths}
        self.kind = next(kind for kind in (".tfrecord", ".tar", "", ".parquet") if kind in kinds)
        if self.kind == ".tfrecord":
            hint = "let img2dataset download in its format webdataset, files or parquet"
            raise UserError(f"{folder}: img2dataset wrote tfrecord files, which are not read", hint=hint, code=DATA)
        self.counts: dict[str, dict[str, int]] = {}
        for stem in shards:
            try:
                self.counts[stem] = read_record(folder / f"{stem}{STATS}", COUNTS)
            except UserError:  # not there, or cut off while it was written: the last that is written of a shard
                continue
        self.unfinished = sorted(shards.keys() - self.counts.keys())
        paths = [parts[self.kind] for stem, parts in shards.items() if stem in self.counts and self.kind in parts]
        if not paths:
            raise UserError(f"{folder}: no shard that img2dataset finished", hint="let it go on first", code=DATA)
        self.total = sum(counts["successes"] for counts in self.counts.values())
        self.source: Source = Tars(paths, reading) if self.kind == ".tar" else (
            Arrow(paths, reading) if self.kind else Folder(self._folders(folder), reading))  # fmt: skip

    def _folders(self, folder: Path) -> Directory:
        """The folders of finished shards, without what lies beside them."""
        tree = Directory(folder)
        tree.files = {name: size for name, size in tree.files.items() if name.partition("/")[0] in self.counts}
        return tree

    def state(self) -> str:
        """That of the shards and their counts."""
        return hashlib.sha256(repr((self.source.state(), self.counts, self.unfinished)).encode()).hexdigest()

    def samples(self) -> Iterator[Sample | Remark]:
        """The samples of finished shards; then what has no picture."""
        yield from self.source.samples()
        for stem in self.unfinished:
            yield Remark(stem, UNFINISHED)
        if self.kind != ".parquet":  # whose rows say it themselves
            for stem, counts in self.counts.items():
                for status in ("failed_to_download", "failed_to_resize"):
                    if counts[status]:
                        yield Remark(stem, failed(status), "ignored", counts[status])
