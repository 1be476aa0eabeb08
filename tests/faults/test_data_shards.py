"""Rows D (shards), and H3 (indexes that lead out of their folder), of the battery of faults."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import webdataset
from peaks import told
from PIL import Image
from tars import png, refused, tar_of

from training.commands import door
from training.data.images import Images
from training.doors.make_shards import main
from training.errors import UserError
from training.shards.index import write_index
from training.shards.indexing import index_folder
from training.shards.reading import ShardSet
from training.shards.tars import END, index_tar, member_bytes
from training.shards.verifying import verify
from training.shards.writing import ShardWriter


def make(folder: Path, samples: int = 20, per_shard: int = 10) -> Path:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, "train", per_shard)
    for i in range(samples):
        writer.add(f"{i:06d}", {"png": png(i), "txt": b"a caption", "json": b'{"captions": ["a caption"]}'})
    write_index(folder, writer.finish(), {})
    return folder


def all_said(folder: Path) -> str:
    return "\n".join(verify(folder).problems)


def test_d1_cut_inside_a_members_data(tmp_path: Path) -> None:
    tar = make(tmp_path) / "train-000001.tar"
    offset = int(index_tar(tar)["png"]["offset"][4])
    tar.write_bytes(tar.read_bytes()[: offset + 20])
    said = all_said(tmp_path)
    assert f"damaged at byte {offset - 512:,} (member 000014.png): unexpected end of data" in said
    assert "train-000001.tar: index lists 10 samples, 4 readable" in said
    error = refused("verify", tmp_path)
    assert error.code == 3 and "train-000001.tar" in error.what
    with pytest.raises(UserError, match="its index says") as caught:
        ShardSet(tmp_path)
    assert caught.value.code == 3


@pytest.mark.parametrize("how", ["header", "boundary", "checksum", "size", "zero block"])
def test_d2_what_tarfile_passes_over_in_silence(tmp_path: Path, how: str) -> None:
    tar = make(tmp_path) / "train-000000.tar"
    data, at = bytearray(tar.read_bytes()), int(index_tar(tar)["json"]["offset"][3]) - 512
    if how in ("header", "boundary"):
        del data[at + (100 if how == "header" else 0) :]
    elif how == "checksum":
        data[at + 150] ^= 1
    elif how == "size":
        data[at + 124 : at + 136] = b"zzzzzzzzzzz\0"
    else:
        data[at : at + 512] = bytes(512)
    tar.write_bytes(data)
    said = all_said(tmp_path)
    assert "index lists 10 samples, 3 readable" in said and "damaged at byte" in said
    # The policy applies to the shard: it is left out whole, named, and stays on the disk.
    error = refused("index", tmp_path)
    assert error.code == 3 and "train-000000.tar" in error.what
    main(["index", str(tmp_path), "--on-bad-data", "skip"])
    shards = ShardSet(tmp_path)
    assert [info.name for info in shards.shards] == ["train-000001.tar"] and tar.read_bytes() == bytes(data)
    left_out = shards.summary["ledger"]["left out"]
    assert list(left_out) == ["tar that cannot be used"] and str(tar) in left_out["tar that cannot be used"]["first"][0]
    flags = ["--output", str(tmp_path / "out"), "--val-fraction", "0", "--resolution", "16"]
    error = refused("pack", tmp_path / "train-*.tar", *flags)
    assert error.code == 3 and "damaged tar" in error.what
    main(["pack", str(tmp_path / "train-*.tar"), *flags, "--on-bad-data", "skip"])
    packed = ShardSet(tmp_path / "out")
    assert len(packed) == 10 and packed.summary["ledger"]["left out"] == {
        "damaged tar": {"count": 1, "first": ["train-000000.tar"]}
    }


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "is empty"),
        (bytes(10240), "is empty (only zeros)"),
        (b"<html><body>404" * 90, 'is not a tar archive (starts with "<html>'),
        (b"\x1f\x8b\x08" + bytes(900), "is not a tar archive (it is gzip data)"),
    ],
)
def test_d3_no_tar_at_all(tmp_path: Path, data: bytes, said: str) -> None:
    (make(tmp_path) / "train-000001.tar").write_bytes(data)
    assert said in all_said(tmp_path) and said in refused("index", tmp_path).what


def test_d4_changed_after_indexing(tmp_path: Path) -> None:
    tar = make(tmp_path) / "train-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1024])
    with pytest.raises(UserError, match="its index says") as caught:
        ShardSet(tmp_path)
    assert caught.value.code == 3 and caught.value.hint == f"run: {door('make_shards index', tmp_path)}"
    samples = {f"{i:06d}.png": png(i) for i in range(10)}
    for name in (tar.name, "train-000001.tar"):
        tar_of(tmp_path / name, samples if name == tar.name else {f"x{k}": v for k, v in samples.items()})
    index_folder(tmp_path)
    shards = ShardSet(tmp_path)
    shards.read(0)
    tar_of(tar, dict(reversed(samples.items())))  # of the same size, in another order
    assert ShardSet(tmp_path)  # which the start cannot see; the first read does
    with pytest.raises(UserError, match="is not where its index says; the shard was changed after indexing") as caught:
        ShardSet(tmp_path).read(0)
    assert caught.value.code == 3 and "make_shards.py index" in caught.value.hint
    assert "sha256 differs" in all_said(tmp_path)


NAMES = {"../x.txt": "leaves", "/etc/x.txt": "absolute", "n\0ul.txt": "control", "k" * 5000 + ".txt": "5004 bytes"}
KINDS = {"a symbolic link": tarfile.SYMTYPE, "a hard link": tarfile.LNKTYPE, "a pipe": tarfile.FIFOTYPE,
         "a device": tarfile.CHRTYPE}  # fmt: skip


@pytest.mark.parametrize("case", [*NAMES, *KINDS])
def test_d5_unsafe_members(tmp_path: Path, case: str) -> None:
    (tmp_path / "in").mkdir()
    info = tarfile.TarInfo("x.txt" if case in KINDS else case.replace("\0", "Z"))
    info.type, info.linkname = KINDS.get(case, tarfile.REGTYPE), "/etc/passwd" if case in KINDS else ""
    block = info.tobuf(tarfile.PAX_FORMAT)
    if "\0" in case:  # where a C program's name would end
        info.pax_headers = {"path": case}
        block = info.tobuf(tarfile.PAX_FORMAT)
    rest = b"".join(member_bytes(name, data) for name, data in (("a.png", png(0)), ("a.txt", b"one")))
    (tmp_path / "in" / "0.tar").write_bytes(block + rest + END)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    error = refused("index", tmp_path / "in")
    assert (
        error.code == 3
        and "unsafe member" in error.what
        and (NAMES | {kind: kind for kind in KINDS})[case] in error.what
    )
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before  # nothing was extracted
    main(["index", str(tmp_path / "in"), "--on-bad-data", "skip"])
    assert ShardSet(tmp_path / "in").read(0)["txt"] == b"one"
    flags = ["--output", str(tmp_path / "out"), "--val-fraction", "0", "--resolution", "16"]
    assert "unsafe member" in refused("pack", tmp_path / "in" / "0.tar", *flags).what
    main(["pack", str(tmp_path / "in" / "0.tar"), *flags, "--on-bad-data", "skip"])
    assert ShardSet(tmp_path / "out").summary["ledger"]["left out"]["unusable member"]["count"] == 1


def test_d6_bombs_take_no_memory(tmp_path: Path) -> None:
    forged = tarfile.TarInfo("a.png")
    forged.size = 10 << 30
    (tmp_path / "forged.tar").write_bytes(forged.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    negative = bytearray(tarfile.TarInfo("a.png").tobuf())
    negative[124:136] = b"-0000001000\0"  # a walk that believes it never ends
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + 256 + sum(negative[156:]))
    (tmp_path / "negative.tar").write_bytes(negative + END)
    large = tarfile.TarInfo("a.png")
    large.size = 1 << 30  # a hole of a gigabyte, which takes no disk
    with (tmp_path / "large.tar").open("wb") as file:
        file.write(member_bytes("a.txt", b"words") + large.tobuf())
        file.seek(large.size, os.SEEK_CUR)
        file.write(END)
    tar_of(tmp_path / "nested.tar", {"a.tar": END * 10, "a.txt": b"words", "a.json.gz": b"\x1f\x8b" + bytes(99)})
    code = f"""
from training.doors.make_shards import main
from training.errors import UserError
import training.packing.pack
before = peak()
for name in ("forged", "negative", "large", "nested"):
    try:
        main(["pack", f"{tmp_path}/{{name}}.tar", "--output", f"{tmp_path}/out-{{name}}", "--on-bad-data", "skip"])
    except UserError as error:
        print(error.code, error.what)
print("grew", peak() - before)
"""
    said = told(code)
    assert len(said) == 5 and all(line.startswith("3 ") for line in said[:4]), said
    for line, word in zip(
        said, ("forged.tar", "negative.tar", "png too large", "no image (it has: json.gz"), strict=False
    ):
        assert word.split(" (")[0] in line
    assert int(said[4].split()[1]) < 20_000  # kB


def test_d6_a_gzip_bomb_for_fashion_mnist(tmp_path: Path) -> None:
    for stem in ("train", "t10k"):
        for rest in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            (tmp_path / f"{stem}-{rest}.gz").write_bytes(gzip.compress(b"\0\0\x08\x01" + bytes(70 << 20), 1))
    error = refused("pack", "fashion-mnist", "--root", tmp_path, "--output", tmp_path / "out")
    assert error.code == 3 and "damaged (not an idx file of bytes)" in error.what


def test_d7_duplicate_keys(tmp_path: Path) -> None:
    tar_of(tmp_path / "00000.tar", {"a.png": png(0), "000042.png": png(1)})
    tar_of(tmp_path / "00001.tar", {"b.png": png(2), "000042.png": png(3)})
    error = refused("index", tmp_path)
    assert error.code == 3 and error.what == "duplicate sample key 000042 (00000.tar, 00001.tar)"
    main(["index", str(tmp_path), "--on-bad-data", "skip"])
    shards = ShardSet(tmp_path)
    assert [shards.key(i) for i in range(3)] == ["a", "000042", "b"] and len(shards) == 3
    assert verify(tmp_path).problems == ()
    flags = ["--missing-caption", "empty", "--resolution", "16", "--val-fraction", "0"]
    main(["pack", str(tmp_path / "0*.tar"), "--output", str(tmp_path / "out"), *flags])
    packed = ShardSet(tmp_path / "out")
    assert {packed.key(i) for i in range(4)} == {"a", "000042", "b", "00001/000042"}
    tar_of(tmp_path / "00001.tar", {"b.png": png(2), "b.PNG": png(3)})
    assert "duplicate sample key b (png twice)" in refused("index", tmp_path).what


def test_d8_incomplete_and_scattered_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {"a.png": png(0), "b.png": png(1), "a.txt": b"a", "b.txt": b"b", "c.png": png(2), "d.txt": b"d"}
    tar_of(tmp_path / "00000.tar", {**members, "a.npz": b"?", "b.npz": b"?"})
    main(["index", str(tmp_path)])
    said = capsys.readouterr().out
    assert "ignored 1: samples without a picture (d)" in said and "ignored 1: samples without txt (c)" in said
    assert ShardSet(tmp_path).read(0) == {"png": png(0), "txt": b"a", "npz": b"?"}
    flags = ["--output", str(tmp_path / "out"), "--val-fraction", "0", "--resolution", "16", "--on-bad-data", "skip"]
    main(["pack", str(tmp_path / "00000.tar"), *flags])
    summary = ShardSet(tmp_path / "out").summary
    assert summary["ledger"]["left out"] == {
        "no caption": {"count": 1, "first": ["c"]},
        "no image": {"count": 1, "first": ["d"]},
    }
    assert summary["ledger"]["ignored"] == {"field npz": {"count": 2, "first": ["a", "b"]}}


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_d9_pickles_addresses_and_patterns(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Canary(canary))
    members = {f"a.{name}": payload for name in ("pkl", "pickle", "pyd", "pth", "npy")}
    (tmp_path / "in").mkdir()
    tar_of(tmp_path / "in" / "0.tar", {"a.png": png(0), "a.txt": b"one", **members})
    main(["pack", str(tmp_path / "in" / "0.tar"), "--output", str(tmp_path / "o"), "--val-fraction", "0", "--upscale"])
    index_folder(tmp_path / "in")
    verify(tmp_path / "in"), Images(ShardSet(tmp_path / "in")).__getitem__(0)
    assert not canary.exists() and ShardSet(tmp_path / "o").fields == ("json", "png", "txt")
    pickle.loads(payload)
    assert canary.exists()  # the payload works: what kept it from running was us
    for address in (f"pipe:touch {tmp_path}/x", "http://localhost/{0..1}.tar"):
        assert refused("pack", address, "--output", tmp_path / "p").code == 2 and not (tmp_path / "x").exists()
    error = refused("pack", tmp_path / "train-{000000..000009}.tar", "--output", tmp_path / "p")
    assert error.code == 3 and "no shards match" in error.what and "train-{000000..000009}.tar" in error.what
    tar_of(tmp_path / "train-000003.tar", {"a.png": png(0)})
    error = refused("pack", tmp_path / "train-{000000..000009}.tar", "--output", tmp_path / "p")
    assert "9 of the 10 shards" in error.what and "train-000000.tar" in error.what
    assert "more than 1,000,000 shards" in refused("pack", "x-{0..99999999999}.tar", "--output", tmp_path / "p").what


def test_d10_foreign_webdatasets(tmp_path: Path) -> None:
    """img2dataset's layout: jpg, txt and json under one key, a parquet beside."""
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as tar:
        for i in range(6):
            picture = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            tar.write({"__key__": f"0000{i}", "jpg": picture, "txt": f"words {i}", "json": {"caption": f"words {i}"}})
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    main(["index", str(tmp_path)])
    assert verify(tmp_path).problems == ()
    shards = ShardSet(tmp_path)
    assert Images(shards).__getitem__(5).data.shape == (1, 3, 32, 32) and shards.read_field(5, "txt") == b"words 5"
    train = [*tiny.AUTOENCODER, "--batch-size", "4", "--max-steps", "2"]
    assert tiny.call("train_autoencoder", "--data", tmp_path, "--output", tmp_path / "run", *train) == 0
    main(
        [
            "pack",
            str(tmp_path / "00000.tar"),
            "--output",
            str(tmp_path / "o"),
            "--resolution",
            "32",
            "--val-fraction",
            "0",
        ]
    )
    packed = ShardSet(tmp_path / "o")
    read = list(webdataset.WebDataset([str(tmp_path / "o" / info.name) for info in packed.shards], shardshuffle=False))
    assert [sample["txt"] for sample in read] == [f"words {i}".encode() for i in range(6)]


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.open(io.BytesIO(png(i, 48))).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"number {i}")
    return folder


def test_d11_pack_killed_and_run_again(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 60)
    words = ["pack", str(source), "--resolution", "32", "--samples-per-shard", "5", "--output"]
    main([*words, str(tmp_path / "straight")])
    command = [sys.executable, str(tiny.SCRIPTS / "make_shards.py"), *words, str(tmp_path / "killed")]
    killed = 0
    for wanted in (1, 4, 7):  # shards to wait for
        run = subprocess.Popen(command, env=tiny.ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and len(list((tmp_path / "killed").glob("train-*.tar"))) < wanted:
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        killed += run.wait() == -signal.SIGKILL
        if not (tmp_path / "killed" / "index.json").exists():
            with pytest.raises(UserError, match="holds no index.json"):
                ShardSet(tmp_path / "killed")
            for tar in (tmp_path / "killed").glob("*.tar"):
                index_tar(tar)  # under its final name it is whole
    assert killed
    main([*words, str(tmp_path / "killed")])
    ours = {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}
    assert ours == {path.name: path.read_bytes() for path in (tmp_path / "straight").iterdir()}
    assert verify(tmp_path / "killed").problems == ()


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def test_h3_links_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    data, other = make(tmp_path / "data"), make(tmp_path / "elsewhere" / "data")
    link(data / "train-000000.tar", other / "train-000000.tar")
    for read in (lambda: ShardSet(data), lambda: index_folder(data)):
        with pytest.raises(UserError, match="is a link out of its folder") as caught:
            read()
        assert caught.value.code == 3
    assert "link out of its folder" in all_said(data)
    make(data)
    link(data / "train-000000.index.npy", other / "train-000000.index.npy")
    with pytest.raises(UserError, match="offset index cannot be read"):
        ShardSet(data)
    make(data)
    link(data / "index.json", other / "index.json")
    with pytest.raises(UserError, match="not an index of shards"):
        ShardSet(data)
    (tmp_path / "by-name").symlink_to(data)  # the folder itself may stand anywhere
    make(data)
    assert len(ShardSet(tmp_path / "by-name")) == 20


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/passwd", "..", "", "a/b.tar", "train-000000.tar\0.tar"])
def test_h3_names_out_of_the_folder(tmp_path: Path, name: str) -> None:
    make(tmp_path / "data")
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    index["shards"][0]["name"] = name
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is not an index of shards"):
        ShardSet(tmp_path / "data")
