"""A folder of shards: one writer at a time, indices of foreign tars, checksums of what is read."""

from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from peaks import told
from tars import png, refused, tar_of

from training.data.images import Images
from training.data.latents import Latents
from training.doors.make_shards import main
from training.errors import UserError
from training.shards.captions import stored_captions
from training.shards.checksums import READ_LIMIT, TEXT_LIMIT
from training.shards.claims import claimed
from training.shards.index import read_index, write_index
from training.shards.indexing import index_folder
from training.shards.offset_index import index_path, write_tar_index
from training.shards.reading import ShardSet
from training.shards.tars import END, index_tar, member_bytes
from training.shards.verifying import verify
from training.shards.writing import ShardWriter, sound_shard


def make(folder: Path, samples: int = 6, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, split, 3)
    for i in range(samples):
        writer.add(f"{i:06d}", {"png": png(i), "txt": b"words", "json": b'{"captions": ["words"]}'})
    write_index(folder, writer.finish(), {})
    return folder


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder `held`, as a writer does."""
    held = tmp_path / "held"
    held.mkdir()
    code = "import sys; from pathlib import Path; from training.shards.claims import claimed\n"
    code += f"with claimed(Path({str(held)!r})): print('held', flush=True); sys.stdin.read()"
    run = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           env=tiny.ENVIRONMENT, text=True)  # fmt: skip
    assert run.stdout is not None and run.stdout.readline() == "held\n"
    yield run
    run.communicate()


def test_a_folder_has_one_writer(
    tmp_path: Path, holder: subprocess.Popen[str], shapes: Path, autoencoder: Path
) -> None:
    held = tmp_path / "held"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(0))
    tar_of(held / "0.tar", {"a.png": png(0)})
    pack = ("pack", tmp_path / "in", "--output", held, "--resolution", 16, "--missing-caption", "empty")
    encode = ("--autoencoder", autoencoder, "--data", shapes, "--output", held, "--device", "cpu")
    before = sorted(held.iterdir())
    for problem in (refused(*pack), refused("index", held), tiny.refused("encode_latents", *encode)):
        assert problem.code == 4 and f"is in use by pid {holder.pid}" in problem.what and "wait for it" in problem.hint
    assert "--output" not in refused("index", held).hint and sorted(held.iterdir()) == before
    holder.communicate()
    assert not (held / ".lock").exists()
    main(["index", str(held)])
    assert not (held / ".lock").exists() and len(ShardSet(held)) == 1


def test_a_lock_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened, then removed by who held it, then locked: another may hold the new file of that name."""
    taken = fcntl.flock
    removed = []

    def late(file: object, operation: int) -> None:
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        taken(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(tmp_path):
        assert (tmp_path / ".lock").exists()
        with pytest.raises(UserError, match="in use"), claimed(tmp_path):
            pass


def test_what_is_written_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make(tmp_path / "a")
        tar_of(tmp_path / "b" / "x.tar", {"a.png": png(0)})
        index_folder(tmp_path / "b")
    finally:
        os.umask(before)
    written = [*(tmp_path / "a").iterdir(), tmp_path / "b" / "index.json", tmp_path / "b" / "x.index.npy"]
    assert len(written) == 7 and {path.stat().st_mode & 0o777 for path in written} == {0o640}


def test_a_disk_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is seen before, or turns read-only while the tars are walked."""
    tar_of(tmp_path / "0.tar", {"a.png": png(0)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        problem = refused("index", tmp_path)
    assert problem.code == 6 and "cannot be written" in problem.what and "copy these" in problem.hint
    opened = Path.open

    def read_only(self: Path, mode: str = "r", *rest: object, **more: object) -> object:
        if mode[0] in "wa":
            raise OSError(30, "Read-only file system")
        return opened(self, mode, *rest, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", read_only)
    problem = refused("index", tmp_path)
    assert problem.code == 6 and "Read-only file system" in problem.what


SPLITS = {
    ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"): {"train": 1, "val": 1},
    ("train-0000.tar", "validation-0000.tar"): {"train": 1, "val": 1},
    ("train_subj01_13.tar", "TEST_2.tar", "00003.tar"): {"train": 2, "test": 1},
}


@pytest.mark.parametrize("names", SPLITS)
def test_splits_of_foreign_tars(tmp_path: Path, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate(names):
        tar_of(tmp_path / name, {f"{i}.png": png(i)})
    main(["index", str(tmp_path)])
    assert read_index(tmp_path)[0]["summary"]["counts"] == SPLITS[names]
    guess = "guessed 1: no split in the name of the tar, train (00003.tar)"
    assert (guess in capsys.readouterr().out) == ("00003.tar" in names)
    tar_of(tmp_path / "train-val.tar", {"x.png": png(9)})
    assert refused("index", tmp_path).code == 3


def test_latents_take_the_split_of_their_pictures(tmp_path: Path, autoencoder: Path, shapes: Path) -> None:
    """Whatever the shard is called."""
    source = ShardSet(shapes)
    for name, keys in (("train_subj01_13.tar", range(4)), ("held_out_validation.tar", range(4, 6))):
        members = {f"{i}.{field}": source.read(i)[field] for i in keys for field in ("png", "txt")}
        tar_of(tmp_path / "data" / name, members)
    index_folder(tmp_path / "data")
    words = ("--autoencoder", autoencoder, "--data", tmp_path / "data", "--output", tmp_path / "latents")
    for _ in range(2):  # the second finds all there
        assert tiny.call("encode_latents", *words, "--device", "cpu") == 0
        sets = {split: ShardSet(tmp_path / "latents", split) for split in ("train", "val")}
        assert {split: len(shards) for split, shards in sets.items()} == {"train": 4, "val": 2}
    assert Latents(sets["val"]).captions(0) == [source.read(4)["txt"].decode()]
    assert sets["train"].summary["ledger"] == {} and verify(tmp_path / "latents").problems == ()


def test_debris_and_unlisted_tars_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "00000.tar", {"a.png": png(0), "._a.png": b"\0\5\x16\7", "README": b"x"})
    (tmp_path / "._00000.tar").write_bytes(b"\0\5\x16\7" + bytes(60))
    main(["index", str(tmp_path)])
    said = capsys.readouterr().out
    assert "ignored 1: hidden tar (._00000.tar)" in said
    assert "ignored 2: file of a tar that belongs to no sample (00000.tar: ._a.png, 00000.tar: README)" in said
    tar_of(tmp_path / "00001.tar", {"b.png": png(1)})
    main(["verify", str(tmp_path)])
    said = capsys.readouterr().out
    assert "all sound" in said and "ignored 1: tar that index.json does not list (00001.tar)" in said
    assert "ignored 1: hidden tar (._00000.tar)" in said


def test_an_older_index_is_read(tmp_path: Path) -> None:
    """Without checksums, and with the notes of its time; made anew, it has both."""
    make(tmp_path)
    for tar in tmp_path.glob("*.tar"):
        write_tar_index(tar, index_tar(tar))
    index = json.loads((tmp_path / "index.json").read_text())
    index["summary"] |= {"index_notes": ["1 samples without txt (first: a)"], "skipped": {"no caption": 1}, "mine": 1}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert verify(tmp_path).problems == () and ShardSet(tmp_path).read(5)["png"] == png(5)
    assert sound_shard(tmp_path, "train-000000") is not None
    index_folder(tmp_path)
    summary = read_index(tmp_path)[0]["summary"]
    assert summary["mine"] == 1 and "index_notes" not in summary and summary["ledger"] == {}
    assert np.load(index_path(tmp_path / "train-000000.tar")).dtype[1].names == ("offset", "size", "crc")
    assert verify(tmp_path).problems == () and ShardSet(tmp_path).read(5)["png"] == png(5)


def test_a_shard_overwritten_in_place_is_noticed(tmp_path: Path) -> None:
    """As long as before, with the same names: told at the first sample of it that is read."""
    make(tmp_path / "data", 3)
    other = ShardWriter(tmp_path, "train", 3)
    sizes = [len(ShardSet(tmp_path / "data").read(i)["png"]) for i in range(3)]
    for i in range(3):
        other.add(f"{i:06d}", {"png": bytes(sizes[i]), "txt": b"other", "json": b'{"captions": ["other"]}'})
    (info,) = other.finish()
    tar = tmp_path / "data" / info.name
    assert tar.stat().st_size == info.bytes
    tar.write_bytes((tmp_path / info.name).read_bytes())
    with pytest.raises(UserError, match="other bytes than were indexed") as caught:
        ShardSet(tmp_path / "data").read(0)
    assert caught.value.code == 3 and f"verify {tmp_path / 'data'}" in caught.value.hint
    assert sound_shard(tmp_path / "data", "train-000000") is None
    problem = refused("verify", tmp_path / "data")
    assert "sha256 differs" in problem.what and f"index {tmp_path / 'data'}" in problem.hint


def test_holes_take_no_memory(tmp_path: Path) -> None:
    """A member of a gigabyte that takes no disk: by training's reader, by verify and by index."""
    large = tarfile.TarInfo("a.png")
    large.size = 1 << 30
    with (tmp_path / "large.tar").open("wb") as file:
        file.write(member_bytes("a.txt", b"words") + member_bytes("b.txt", bytes(TEXT_LIMIT + 1)) + large.tobuf())
        file.seek(large.size, os.SEEK_CUR)
        file.write(END)
    code = f"""
from training.errors import UserError
from training.shards.indexing import index_folder
from training.shards.reading import ShardSet
from training.shards.verifying import verify
before = peak()
index_folder({str(tmp_path)!r})
for problem in verify({str(tmp_path)!r}).problems:
    print(problem)
for number in (0, 1):
    try:
        ShardSet({str(tmp_path)!r}).read(number)
    except UserError as error:
        print(error.what)
print("grew", peak() - before)
"""
    said = told(code)
    assert len(said) == 5 and all("too large (" in line for line in said[:4]), said
    assert f"at most {READ_LIMIT:,}" in said[2] and f"at most {TEXT_LIMIT:,}" in said[3]
    assert int(said[4].split()[1]) < 40_000  # kB


def test_an_index_of_latents_is_made_anew_as_what_it_is(tmp_path: Path, latents: Path) -> None:
    import shutil

    copy = tmp_path / "latents"
    shutil.copytree(latents, copy)
    before = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text((copy / "index.json").read_text()[:100])
    main(["index", str(copy)])
    index = json.loads((copy / "index.json").read_text())
    assert index["kind"] == "latents" and index["shards"] == before["shards"]
    for name in ("latent", "encoder", "text_encoder", "mirrored"):
        assert index["summary"][name] == before["summary"][name]
    assert len(Latents(ShardSet(copy))) == 96
    for name in ("index.json", "encoding.json"):
        (copy / name).unlink()
    problem = refused("index", copy)
    assert problem.code == 3 and "hold latents" in problem.what and "encode" in problem.hint
    assert not (copy / "index.json").exists()


def test_an_index_of_pictures_is_made_anew_with_what_is_known(tmp_path: Path) -> None:
    main(["pack", "shapes", "--samples", "4", "--output", str(tmp_path / "data")])
    before = read_index(tmp_path / "data")[0]["summary"]
    (tmp_path / "data" / "index.json").unlink()
    main(["index", str(tmp_path / "data")])
    after = read_index(tmp_path / "data")[0]["summary"]
    for name in ("settings", "source", "counts", "order"):
        assert after[name] == before[name], name


@pytest.mark.parametrize("change", ["dtype", "shape", "order"])
def test_the_header_of_stored_moments_is_read(tmp_path: Path, change: str) -> None:
    """An index that says another type of the same size would train on noise."""
    writer = ShardWriter(tmp_path, "train", 9)
    array = np.arange(32, dtype=np.float16).reshape(2, 4, 4)
    stored = np.asfortranarray(array) if change == "order" else array
    buffer = io.BytesIO()
    np.save(buffer, stored)
    writer.add("a", {"moments.npy": buffer.getvalue(), "json": b'{"captions": ["a"]}'})
    infos = writer.finish()
    right = {"shape": [2, 4, 4], "dtype": "float16"}
    said = {"dtype": {**right, "dtype": "int16"}, "shape": {**right, "shape": [4, 2, 4]}, "order": right}[change]
    write_index(tmp_path, infos, {"latent": said}, "latents")
    with pytest.raises(UserError, match="moments are"):
        Latents(ShardSet(tmp_path)).moments(0)
    if change != "order":
        write_index(tmp_path, infos, {"latent": right}, "latents")
        assert np.array_equal(Latents(ShardSet(tmp_path)).moments(0), array)


CAPTIONS = [
    ({"json": b'{"captions": "a red circle"}'}, ["a red circle"]),  # one string is one caption
    ({"json": b'{"caption": "one", "width": 3}'}, ["one"]),
    ({"json": b'{"text": ["one", "two"]}'}, ["one", "two"]),
    ({"json": b'{"captions": ["one"]}', "txt": b"two\r\nthree"}, ["one", "two", "three"]),
    ({"json": b'{"caption": "other"}', "txt": b"one"}, ["one"]),
    ({"txt": "one\u2028still".encode()}, ["one still"]),
    ({"json": b'{"Captions": ["one"]}', "txt": b"one"}, ["one"]),
    ({"json": b'{" TEXT ": "one", "url": "x"}'}, ["one"]),
    ({"json": b'\xef\xbb\xbf{"text": "one"}'}, ["one"]),
    ({"caption": b"one\ntwo", "png": b""}, ["one", "two"]),
    ({"png.txt": b"one", "png": b""}, ["one"]),
    ({"json": b"[1]"}, []),
    ({}, []),
]


@pytest.mark.parametrize(("fields", "captions"), CAPTIONS, ids=range(len(CAPTIONS)))
def test_captions_of_foreign_samples(fields: dict[str, bytes], captions: list[str]) -> None:
    meta, found = stored_captions(fields)
    assert list(found) == captions and meta.keys() <= {"width", "url", "json"}
    assert meta == dict.fromkeys(meta) or meta in ({"width": 3}, {"url": "x"}, {"json": [1]})


def test_captions_that_cannot_be_read_are_found_by_verify(tmp_path: Path) -> None:
    for data in (b"{", b'{"captions": [3]}'):
        with pytest.raises(UserError):
            stored_captions({"json": data})
    tar_of(tmp_path / "0.tar", {"a.png": png(0), "a.json": b"{"})
    index_folder(tmp_path)
    assert "metadata not JSON" in verify(tmp_path).problems[0] and Images(ShardSet(tmp_path))[0].data.shape[0] == 1
