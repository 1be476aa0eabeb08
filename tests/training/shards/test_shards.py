from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from training.commands import door
from training.errors import UserError
from training.shards.index import FORMAT, write_index
from training.shards.indexing import index_folder
from training.shards.reading import ShardSet
from training.shards.tars import index_tar, stands_before
from training.shards.verifying import verify
from training.shards.writing import ShardWriter, sound_shard, write_shard


def make(folder: Path, samples: int = 25, per_shard: int = 10) -> ShardSet:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, "train", per_shard)
    for i in range(samples):
        fields = {"png": bytes([i]) * (37 * i), "txt": f"caption {i}".encode(), "json": b"{}"}
        writer.add(f"a/{i:04d}", fields if i % 2 else {name: fields[name] for name in ("png", "txt")})
    write_index(folder, writer.finish(), {"resolution": 32})
    return ShardSet(folder)


def test_round_trip(tmp_path: Path) -> None:
    shards = make(tmp_path)
    assert len(shards) == 25 and shards.fields == ("json", "png", "txt") and len(shards.shards) == 3
    assert shards.summary == {"counts": {"train": 25}, "resolution": 32} and shards.kind == "images"
    again = pickle.loads(pickle.dumps(shards))
    for i in (0, 9, 10, 24):
        assert shards.key(i) == f"a/{i:04d}" and again.read(i) == shards.read(i)
        assert shards.read(i)["png"] == shards.read_field(i, "png") == bytes([i]) * (37 * i)
        assert ("json" in shards.read(i)) == bool(i % 2)
    with pytest.raises(UserError, match="has no json"):
        shards.read_field(0, "json")
    for i in (-1, 25):
        with pytest.raises(IndexError):
            shards.read(i)
    assert verify(tmp_path, contents=False).problems == ()


def test_webdataset_reads_ours(tmp_path: Path) -> None:
    shards = make(tmp_path)
    urls = [str(tmp_path / info.name) for info in shards.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [shards.key(i) for i in range(25)]
    assert all(sample[name] == data for i, sample in enumerate(read) for name, data in shards.read(i).items())


def test_we_read_webdatasets(tmp_path: Path) -> None:
    keys = ["000", "l" * 180, "dir.with.dots/b", "ünïcode é"]
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as tar:
        for i, key in enumerate(keys):
            tar.write({"__key__": key, "jpg": b"picture" * i, "txt": f"words {i}", "json": {"i": i}})
    assert [info.split for info in index_folder(tmp_path)] == ["train"]
    shards = ShardSet(tmp_path)
    assert [shards.key(i) for i in range(len(shards))] == keys
    assert json.loads(shards.read_field(3, "json")) == {"i": 3} and shards.read_field(2, "txt") == b"words 2"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar(tmp_path: Path, form: int) -> None:
    path = tmp_path / "x.tar"
    name = "d" * 90 + "/" + "k" * 90
    with tarfile.open(path, "w", format=form) as tar:
        for member, data in ((f"./{name}.txt", b"hello"), ("b.cls.txt", b"1"), (".hidden", b""), ("README", b"x")):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = index_tar(path)
    assert [key.decode() for key in index["key"]] == [name, "b"]
    offset, size = index["txt"][0].item()
    assert path.read_bytes()[offset : offset + size] == b"hello" and index["cls.txt"][1]["size"] == 1


def test_bytes_are_determined(tmp_path: Path) -> None:
    make(tmp_path / "a"), make(tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    one = write_shard(tmp_path, "train-000000", [("k", {"txt": b"1", "png": b"2"})])
    assert one == write_shard(tmp_path, "train-000000", [("k", {"png": b"2", "txt": b"1"})])


@pytest.mark.parametrize("samples", [[("a.b", {"txt": b""})], [("a", {"TXT": b""})], [("a", {})],
                                     [("../a", {"txt": b""})], [("a", {"txt": b""})] * 2, []])  # fmt: skip
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, samples: list) -> None:
    with pytest.raises(ValueError):
        write_shard(tmp_path, "train-000000", samples)
    assert list(tmp_path.glob("*.tar")) == []


def test_resuming_by_shard(tmp_path: Path) -> None:
    info = write_shard(tmp_path, "train-000003", [("k", {"txt": b"1"})])
    assert sound_shard(tmp_path, "train-000003") == info and info.split == "train"
    assert sound_shard(tmp_path, "train-000004") is None
    tar = tmp_path / info.name
    tar.write_bytes(tar.read_bytes()[:-1024])
    assert sound_shard(tmp_path, "train-000003") is None


def damage(path: Path, what: str) -> str:
    """Harms a shard of 10 samples; returns what the message must say."""
    data = bytearray(path.read_bytes())
    if what == "cut data":
        path.write_bytes(data[: int(index_tar(path)["png"]["offset"][5]) + 10])
        return r"damaged at byte [\d,]+ \(member .*\): unexpected end of data"
    if what == "cut header":
        path.write_bytes(data[: 512 * 2 + 100])
        return "cut inside a header|unexpected end"
    if what == "cut between members":
        path.write_bytes(data[: 512 * 4])
        return "end-of-archive"
    if what == "checksum":
        data[1024 + 5] ^= 1
        path.write_bytes(data)
        return "bad header checksum"
    if what == "zero block":
        data[1024:1536] = bytes(512)
        path.write_bytes(data)
        return "zero block in the middle"
    texts = {
        "empty": b"",
        "zeros": bytes(10240),
        "html": b"<html><body>not found" * 50,
        "gzip": b"\x1f\x8b\x08" + bytes(600),
    }
    path.write_bytes(texts[what])
    return {
        "empty": "is empty",
        "zeros": "only zeros",
        "html": 'not a tar archive .starts with "<html',
        "gzip": "gzip",
    }[what]


DAMAGES = ["cut data", "cut header", "cut between members", "checksum", "zero block", "empty", "zeros", "html", "gzip"]


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_named(tmp_path: Path, what: str) -> None:
    make(tmp_path)
    message = damage(tmp_path / "train-000001.tar", what)
    with pytest.raises(UserError, match=message) as caught:
        index_tar(tmp_path / "train-000001.tar")
    assert caught.value.code == 3 and "train-000001.tar" in caught.value.what
    problems = verify(tmp_path, contents=False).problems
    assert problems and all("train-000001" in problem for problem in problems)


@pytest.mark.parametrize("name", ["../x.txt", "/etc/x.txt", "a/../../b.txt", "a\\b.txt", "new\nline.txt"])
def test_unsafe_names(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match="unsafe member"):
        index_tar(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a.txt")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(UserError, match="unsafe member 'a.txt': it is a"):
        index_tar(tmp_path / "x.tar")


def test_forged_size(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    info.size = 10 * 2**30
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(UserError, match="claims 10,737,418,240 bytes"):
        index_tar(tmp_path / "x.tar")


def test_duplicate_keys(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("k.txt"))
        tar.addfile(tarfile.TarInfo("k.txt"))
    with pytest.raises(UserError, match="duplicate sample key k"):
        index_tar(tmp_path / "a.tar")
    (tmp_path / "a.tar").unlink()
    for name in ("00000.tar", "00001.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.addfile(tarfile.TarInfo("k.txt"))
    with pytest.raises(UserError, match=r"duplicate sample key k \(00000.tar, 00001.tar\)"):
        index_folder(tmp_path)


def test_members_apart_are_grouped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.jpg", "b.jpg", "a.txt", "b.txt"):
            tar.addfile(tarfile.TarInfo(name))
    assert index_tar(tmp_path / "a.tar")["key"].tolist() == [b"a", b"b"]


def test_replaced_shards_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    tar = tmp_path / "train-000000.tar"
    tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(UserError, match="its index says") as caught:
        ShardSet(tmp_path)
    assert caught.value.code == 3 and caught.value.hint == f"run: {door('make_shards index', tmp_path)}"
    index_folder(tmp_path)
    assert ShardSet(tmp_path).summary["resolution"] == 32
    tar.unlink()
    with pytest.raises(UserError, match="not there"):
        ShardSet(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"format": 1, "kind": "images", "shards": [{"name": "x"}]}',
        "not json",
        # fmt: skip
        '{"format":1,"kind":"images","shards":[{"name":"../x","split":"train","samples":1,"bytes":1,"sha256":""}]}',
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match="is not an index of shards"):
        ShardSet(tmp_path)


def test_missing_newer_and_other_splits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no index.json"):
        ShardSet(tmp_path)
    make(tmp_path)
    with pytest.raises(UserError, match=r"no split 'val' \(it has: train\)"):
        ShardSet(tmp_path, "val")
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match="newer than this program"):
        ShardSet(tmp_path)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 511), value=st.integers(0, 255), cut=st.integers(0, 4096))
def test_a_fuzzed_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("k" * 150 + ".txt")
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("b.txt"))
    data = bytearray(path.read_bytes())
    data[512 + position] = value  # inside the extended header's records, which no checksum guards
    path.write_bytes(data[: len(data) - cut])
    try:
        assert isinstance(index_tar(path), np.ndarray)
    except UserError as error:
        assert error.code == 3


def test_a_header_is_of_its_member() -> None:
    """Its name and its size are compared, as tarfile writes them and with a leading `./`; longer names by size."""
    for stored in ("0001.png", "./0001.png", "0001.PNG"):
        header = tarfile.TarInfo(stored)
        header.size = 1234
        block = header.tobuf()
        assert stands_before(block, "0001.png", 1234)
        assert not stands_before(block, "0001.png", 1235) and not stands_before(block, "0002.png", 1234)
        assert not stands_before(block, "0001.pn", 1234) and not stands_before(b"", "0001.png", 1234)
