"""Downloads of img2dataset in each of its formats, as its writers lay them out: what is packed, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import packs
import pytest

Row = dict[str, Any]
KINDS = ("webdataset", "files", "parquet")
FAILED = {"failed_to_download": "HTTP Error 404: Not Found", "failed_to_resize": "image decoding error"}


def row(shard: int, number: int) -> Row:
    """A row of img2dataset's tables, by its columns: of six the third cannot be downloaded, the fifth be resized."""
    status = {2: "failed_to_download", 4: "failed_to_resize"}.get(number, "success")
    sides = {"width": 9, "height": 9, "original_width": 1024, "original_height": 768}
    return {
        "url": f"https://example.org/{shard}/{number}.jpg", "caption": f"picture {number},\nof shard {shard}",
        "key": f"{shard:05d}{number:04d}", "status": status, "error_message": FAILED.get(status),
        **(sides if status == "success" else dict.fromkeys(sides)), "exif": "{}", "sha256": f"{number:064d}",
    }  # fmt: skip


def download(
    folder: Path, kind: str, shards: int = 2, captions: bool = True, finished: tuple[int, ...] = (0, 1)
) -> Path:
    """What `img2dataset --output_format KIND` leaves. Its pictures come in no order, of which this is one."""
    folder.mkdir()
    for shard in range(shards):
        rows = [row(shard, number) for number in (1, 0, 2, 5, 4, 3)]
        rows = rows if captions else [{**one, "caption": None} for one in rows]
        good = [one for one in rows if one["status"] == "success"]
        name, files = f"{shard:05d}", dict[str, bytes | str]()
        for one in good:
            files[f"{one['key']}.jpg"] = packs.png(int(one["key"]), "JPEG")
            files[f"{one['key']}.json"] = json.dumps(one, indent=4)
            files[f"{one['key']}.txt"] = one["caption"] or ""
        if kind == "webdataset":
            packs.tar(folder / f"{name}.tar", files)
        elif kind == "files":
            packs.write(folder / name, files)
        elif kind == "tfrecord":
            packs.write(folder, {f"{name}.tfrecord": b"record"})
        pictures = [{"jpg": files.get(f"{one['key']}.jpg"), "txt": one["caption"]} for one in rows]
        table(folder / f"{name}.parquet", [one | more for one, more in zip(rows, pictures, strict=True)]
              if kind == "parquet" else rows)  # fmt: skip
        if shard in finished:
            counts = {"count": 6, "successes": 4, "failed_to_download": 1, "failed_to_resize": 1, "duration": 0.5}
            status_dict = {"success": 4, **dict.fromkeys(FAILED.values(), 1)}
            (folder / f"{name}_stats.json").write_text(json.dumps({**counts, "status_dict": status_dict}, indent=4))
    return folder


def table(path: Path, rows: list[Row]) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_download_is_packed_as_it_lies(kind: str, tmp_path: Path) -> None:
    """A caption of two lines is one; the row stays with its picture; rows without one are counted, and stop nothing."""
    packed = packs.pack(download(tmp_path / "in", kind), tmp_path / "out", "--samples-per-shard", "3")
    good = [(shard, number) for shard in range(2) for number in (0, 1, 3, 5)]
    assert len(packed.captions) == 8 and {split: len(keys) for split, keys in packed.splits.items()} == {"train": 8}
    facts = {meta["key"]: (packed.captions[key], meta) for key, meta in packed.meta.items()}
    for shard, number in good:
        captions, meta = facts[f"{shard:05d}{number:04d}"]
        wanted = {name: value for name, value in row(shard, number).items() if name != "caption"}
        assert captions == [f"picture {number}, of shard {shard}"]
        assert {name: meta[name] for name in wanted} == wanted
    assert packed.counts("ignored") == {f"row without a picture, img2dataset says {status}": 2 for status in FAILED}
    assert not packed.counts("left out") and not packed.counts("guessed")


@pytest.mark.parametrize("kind", KINDS)
def test_without_captions_the_rows_are_kept(kind: str, tmp_path: Path) -> None:
    source = download(tmp_path / "in", kind, captions=False)
    assert "no caption" in packs.refused(source, tmp_path / "out").what
    packed = packs.pack(source, tmp_path / "out", "--missing-caption", "empty")
    assert {meta["url"] for meta in packed.meta.values()} == {row(s, n)["url"] for s in range(2) for n in (0, 1, 3, 5)}
    assert packed.counts("ignored").keys() == {f"row without a picture, img2dataset says {status}" for status in FAILED}


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_was_not_finished(kind: str, tmp_path: Path) -> None:
    """It has no counts, or half of a file of them: not a picture of it is taken, and it is named."""
    source = download(tmp_path / "in", kind, shards=3)
    for number in range(2):
        problem = packs.refused(source, tmp_path / f"out-{number}")
        assert problem.code == 3 and "00002: shard that img2dataset did not finish" in problem.what
        (source / "00002_stats.json").write_text('{"count": 6, "succ')
    packed = packs.pack(source, tmp_path / "out", "--on-bad-data", "skip")
    assert len(packed.captions) == 8
    (left,) = packed.counts("left out").items()
    assert left == ("shard that img2dataset did not finish, and does when it is started again", 1)


def test_no_shard_that_was_finished(tmp_path: Path) -> None:
    source = download(tmp_path / "in", "webdataset", finished=())
    (source / "00000_stats.json").write_text("")
    problem = packs.refused(source, tmp_path / "out")
    assert problem.code == 3 and problem.what.endswith("no shard that img2dataset finished")


def test_tfrecord_is_refused_by_name(tmp_path: Path) -> None:
    problem = packs.refused(download(tmp_path / "in", "tfrecord"), tmp_path / "out")
    assert problem.code == 3 and problem.what.endswith("img2dataset wrote tfrecord files, which are not read")
    assert problem.hint == "let img2dataset download in its format webdataset, files or parquet"


def test_another_state_is_another_packing(tmp_path: Path) -> None:
    """More rows that failed, of the same pictures."""
    source = download(tmp_path / "in", "webdataset")
    packs.pack(source, tmp_path / "out")
    counts = json.loads((source / "00001_stats.json").read_text())
    (source / "00001_stats.json").write_text(json.dumps(counts | {"failed_to_download": 5}))
    with pytest.raises(Exception, match="holds another packing"):
        packs.pack(source, tmp_path / "out")


def test_folders_of_numbers_are_no_download(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"00000/a.png": packs.png(0), "00000/a.txt": "one", "12_stats.json": "{}"}
    packed = packs.pack(packs.write(tmp_path / "in", files), tmp_path / "out")
    assert packed.captions == {"00000/a": ["one"]}
