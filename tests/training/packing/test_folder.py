"""Folders of pictures as people keep them: which captions, splits and files are taken, and what is said of the rest."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packs import pack, png, refused, tar, write

from training.doors.make_shards import main
from training.packing.texts import PASSED_OVER


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "A.Caption", "a.png.txt", "a.PNG.txt", "a.json"])
def test_caption_files_beside_a_picture(tmp_path: Path, name: str) -> None:
    text = '{"caption": "words"}' if name.endswith("json") else "words"
    write(tmp_path / "in", {"a.png": png(0), name: text})
    packed = pack(tmp_path / "in", tmp_path / "out")
    assert packed.captions == {"a": ["words"]} and not packed.ledger


def test_several_caption_files_are_all_taken(tmp_path: Path) -> None:
    files = {"a.png": png(0), "a.caption": "a sentence", "a.txt": "tag, tag", "a.json": '{"text": "no"}'}
    packed = pack(write(tmp_path / "in", files), tmp_path / "out")
    assert packed.captions["a"] == ["tag, tag", "a sentence"]
    assert packed.counts("guessed") == {"several caption files, all taken": 1}


def test_a_json_beside_a_picture_gives_facts_only_with_its_caption(tmp_path: Path) -> None:
    pictures = {f"{name}.png": png(seed) for seed, name in enumerate("abc")}
    files = {"a.json": '{"text": "a", "url": "u"}', "b.txt": "b", "b.json": '{"x": 1}', "c.txt": "c", "c.json": "{"}
    packed = pack(write(tmp_path / "in", {**pictures, **files}), tmp_path / "out")
    assert packed.captions == {"a": ["a"], "b": ["b"], "c": ["c"]}
    assert packed.meta == {"a": {"url": "u"}, "b": {}, "c": {}}
    assert packed.counts("ignored") == {"sidecar without a caption": 2, "sidecar that cannot be read": 1}
    write(tmp_path / "in", {"d.png": png(3), "d.json": "{"})
    assert refused(tmp_path / "in", tmp_path / "no").what == "d: metadata not JSON"


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\f", "\v", "\x1c", "\r"])
def test_only_line_feeds_end_a_line(tmp_path: Path, mark: str) -> None:
    text = f"one{mark}two\r\nthree"
    write(tmp_path / "in", {"a.png": png(0), "a.txt": text.encode(), "b.png": png(1)})
    row = json.dumps({"file_name": "b.png", "text": f"four{mark}five"}, ensure_ascii=False)
    write(tmp_path / "in", {"metadata.jsonl": row + "\r\n"})
    assert pack(tmp_path / "in", tmp_path / "out").captions == {"a": ["one two", "three"], "b": ["four five"]}


def test_captions_are_counted_up_to_a_cap(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.png": png(0), "a.txt": "\n".join(map(str, range(1001))), "b.png": png(1)})
    write(tmp_path / "in", {"b.txt": "\n".join(map(str, range(1000)))})
    assert refused(tmp_path / "in", tmp_path / "no").what == "a: more than 1,000 captions (1,001)"
    packed = pack(tmp_path / "in", tmp_path / "out", "--on-bad-data", "skip")
    assert packed.counts("left out") == {"more than 1,000 captions": 1} and len(packed.captions["b"]) == 1000


def test_a_caption_that_is_a_link_out_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path, {"in/a.png": png(0), "in/shared.md": "inside", "private": "secret", "in/b.png": png(1)})
    (tmp_path / "in/a.txt").symlink_to("../private")
    (tmp_path / "in/b.txt").symlink_to("shared.md")
    assert refused(tmp_path / "in", tmp_path / "no").what == "a: text file that is a link out of its folder"
    packed = pack(tmp_path / "in", tmp_path / "out", "--on-bad-data", "skip")
    assert packed.captions == {"b": ["inside"]} and "secret" not in (tmp_path / "out/index.json").read_text()
    (tmp_path / "in/a.txt").unlink()
    (tmp_path / "in/metadata.csv").symlink_to("../private")
    error = refused(tmp_path / "in", tmp_path / "no")
    assert "link out" in error.what and "secret" not in error.what + error.hint


def test_a_data_set_of_links_is_packed_as_the_hint_says(tmp_path: Path) -> None:
    write(tmp_path, {"blobs/1": png(0), "blobs/2": '{"file_name": "a.png", "text": "words"}'})
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").symlink_to("../blobs/1")
    (tmp_path / "in/metadata.jsonl").symlink_to("../blobs/2")
    hint = refused(tmp_path / "in", tmp_path / "no").hint
    command = hint.split(": ")[1].split(",")[0].replace("FOLDER", "in").replace("COPY", "copy")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert pack(tmp_path / "copy", tmp_path / "out").captions == {"a": ["words"]}


def test_linked_folders_are_followed_each_real_one_once(tmp_path: Path) -> None:
    write(tmp_path, {"far/cats/1.png": png(1), "far/cats/1.txt": "cat", "in/own/0.png": png(0), "in/own/0.txt": "own"})
    links = {"cats": "../far/cats", "again": "../far/cats", "loop": ".", "own2": "own", "up": "..", "own/back": ".."}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "far/cats/home").symlink_to("../../in")
    packed = pack(tmp_path / "in", tmp_path / "out")
    assert packed.captions == {"again/1": ["cat"], "own/0": ["own"]}
    assert packed.counts("ignored") == {"link to a folder that is read already": 6}


def test_hidden_files_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.png": png(0), "a.txt": "a", ".DS_Store": "x", "Thumbs.db": "x"})
    write(tmp_path / "in", {"__MACOSX/._a.png": png(0), ".cache/b.png": png(1)})
    packed = pack(tmp_path / "in", tmp_path / "out")
    assert packed.counts("ignored") == {"hidden file or folder": 3, "neither picture nor caption": 1}


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.png": png(0), "a.txt": "a"})
    folder = os.fsencode(tmp_path / "in")
    for name, data in ((b"caf\xe9.png", png(1)), (b"caf\xe9.txt", b"cafe"), (b"\xff.dat", b"x")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
    packed = pack(tmp_path / "in", tmp_path / "out")
    assert packed.captions == {"a": ["a"], "caf_": ["cafe"]}
    assert packed.counts("replaced") == {"name that cannot be shown": 1}
    assert packed.counts("ignored") == {"neither picture nor caption": 1}


UNDER = "picture under a suffix that is not read (it is PNG: name it b.png)"
ODD = {"b.png_large": UNDER, "b": UNDER, "b.jpeg~": UNDER, "b.psd": "Photoshop is not read", "b.exr": "OpenEXR is not"}


@pytest.mark.parametrize(("name", "why"), ODD.items())
def test_an_unused_picture_is_no_harmless_note(tmp_path: Path, name: str, why: str) -> None:
    write(tmp_path / "in", {"a.png": png(0), "a.txt": "a", name: b"8BPS" if name.endswith("d") else png(1)})
    error = refused(tmp_path / "in", tmp_path / "no")
    assert error.code == 3 and error.what.startswith(f"{name}: {why}")
    assert pack(tmp_path / "in", tmp_path / "out", "--on-bad-data", "skip").counts("left out")


def test_a_folder_of_pictures_under_odd_names_is_told(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "in", {"photo": png(0)}), tmp_path / "no")
    assert "no images" in error.what and "name it photo.png" in error.hint
    (tmp_path / "in/photo").rename(tmp_path / "in/photo.png")  # as it says
    pack(tmp_path / "in", tmp_path / "out", "--missing-caption", "empty")


def test_our_own_shards_inside_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", {"a.png": png(0), "a.txt": "a"})
    for _ in range(2):
        main(["pack", str(tmp_path / "in"), "--output", str(tmp_path / "in/shards"), "--resolution", "8"])
    assert "already packed" in capsys.readouterr().out
    packed = pack(tmp_path / "in", tmp_path / "in/more")
    assert packed.captions == {"a": ["a"]} and packed.counts("ignored") == {"folder of packed shards": 1}


def test_class_folders_as_captions(tmp_path: Path) -> None:
    files = {"train/golden_retriever/1.png": png(0), "val/tree-frog/1.png": png(1)}
    packed = pack(write(tmp_path / "in", files), tmp_path / "out", "--missing-caption", "folder")
    assert packed.captions == {"train/golden_retriever/1": ["golden retriever"], "val/tree-frog/1": ["tree frog"]}
    assert packed.counts("guessed")["no caption, folder used"] == 2
    for name in ("x.png", "val/y.png"):  # in no folder, and in one that is no class
        write(tmp_path / "in", {name: png(2)})
        error = refused(tmp_path / "in", tmp_path / "no", "--missing-caption", "folder")
        assert "no folder of a class" in error.what and "--missing-caption filename" in error.hint
        (tmp_path / "in" / name).unlink()


def test_splits_by_folder_and_how_they_were_taken(tmp_path: Path) -> None:
    files = {f"{folder}/{i}.png": png(i) for folder in ("train", "Validation", "test") for i in range(3)}
    flags = ("--missing-caption", "empty")
    packed = pack(write(tmp_path / "in", files), tmp_path / "out", *flags)
    assert packed.splits == {
        split: {f"{folder}/{i}" for i in range(3)}
        for split, folder in (("train", "train"), ("val", "Validation"), ("test", "test"))
    }
    taken = packed.ledger["guessed"]["split taken from a folder's name"]
    assert taken["count"] == 9 and "Validation = val" in taken["first"]
    drawn = pack(tmp_path / "in", tmp_path / "drawn", *flags, "--splits", "draw")
    assert set(drawn.splits) == {"train"} and "split taken from a folder's name" not in drawn.counts("guessed")


@pytest.mark.parametrize("column", ["split", "Subset", "partition"])
def test_splits_by_a_column(tmp_path: Path, column: str) -> None:
    rows = [f"{i}.png,{i},{split}" for i, split in enumerate(("train", "Validation", "test", "2014"))]
    write(tmp_path / "in", {f"{i}.png": png(i) for i in range(4)})
    write(tmp_path / "in", {"metadata.csv": "\n".join([f"file_name,text,{column}", *rows])})
    packed = pack(tmp_path / "in", tmp_path / "out")
    assert packed.splits == {"train": {"0", "3"}, "val": {"1"}, "test": {"2"}}
    assert packed.counts("guessed") == {"split taken from its metadata": 3}
    assert set(pack(tmp_path / "in", tmp_path / "drawn", "--splits", "draw").splits) == {"train"}


def test_a_folder_that_cannot_be_read_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in", {"a.png": png(0), "a.txt": "a", "deep/b.png": png(1), "deep/b.txt": "b"})
    whole = os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", denied)
    error = refused(tmp_path / "in", tmp_path / "no")
    assert error.code == 3 and "deep: folder that cannot be read (Permission denied)" in error.what


def test_two_splits_in_one_name_are_refused_and_the_hint_works(tmp_path: Path) -> None:
    write(tmp_path / "in", {"train_val/a.png": png(0), "test/b.png": png(1)})
    error = refused(tmp_path / "in", tmp_path / "no", "--missing-caption", "empty")
    assert error.code == 3 and "train_val" in error.what and "--splits draw" in error.hint
    pack(tmp_path / "in", tmp_path / "out", "--missing-caption", "empty", "--splits", "draw")


def test_a_photo_and_its_mask_of_one_name_are_refused_and_the_hint_works(tmp_path: Path) -> None:
    forms = {"jpg": "JPEG", "png": "PNG"}
    files = {f"{stem}.{field}": png(ord(stem), form) for stem in "abc" for field, form in forms.items()}
    write(tmp_path / "in", {**files, "a.txt": "a", "metadata.csv": "file_name,text\nb.jpg,b\nc.png,c\nc.jpg,c\n"})
    for flags in ((), ("--on-bad-data", "skip")):
        error = refused(tmp_path / "in", tmp_path / "no", *flags)
        assert error.code == 3 and "3 of 3 pictures are there twice (jpg, png)" in error.what
    for field, other in (("jpg", "png"), ("PNG", "jpg")):
        assert f"--image-field {field.lower()}" in error.hint
        packed = pack(tmp_path / "in", tmp_path / field, "--image-field", field, "--missing-caption", "empty")
        assert packed.captions == {"a": ["a"], "b": ["b" if other == "png" else ""], "c": ["c"]}
        assert packed.counts("ignored") == {"picture of another format than --image-field": 3}
        (first,) = packed.ledger["ignored"].values()
        assert first["first"] == [f"{stem}.{other}" for stem in "abc"]
    assert "they end in jpg, png" in refused(tmp_path / "in", tmp_path / "no", "--image-field", "webp").hint
    write(tmp_path / "in", {"d.png": png(4)})
    flags = ("--image-field", "jpg", "--missing-caption", "empty")
    assert "no picture of the format jpg" in refused(tmp_path / "in", tmp_path / "no", *flags).what
    for name in files:  # each format in a folder of its own, as the hint says
        write(tmp_path / "apart", {f"{name[2:]}/{name}": files[name]})
    assert len(pack(tmp_path / "apart", tmp_path / "both", "--missing-caption", "empty").captions) == 6


def test_few_pictures_of_one_name_are_told_and_packed(tmp_path: Path) -> None:
    files = {**{f"{stem}.png": png(ord(stem)) for stem in "abcde"}, "a.jpg": png(9, "JPEG"), "b.gif": png(8, "GIF")}
    packed = pack(write(tmp_path / "in", files), tmp_path / "out", "--missing-caption", "empty")
    assert len(packed.captions) == 7 and packed.counts("replaced") == {"same name as another picture": 2}


def test_tars_of_several_folders_are_all_in_the_hint(tmp_path: Path) -> None:
    for place in ("one/00000.tar", "two/00000.tar", "two/deep/00000.tar"):
        tar(tmp_path / "a b" / place, {"0.png": png(len(place)), "0.txt": place})
    hint = refused(tmp_path / "a b", tmp_path / "no").hint
    packed = pack(shlex.split(hint.partition(": ")[2]), tmp_path / "out")
    assert sorted(text for texts in packed.captions.values() for text in texts) == [
        "one/00000.tar", "two/00000.tar", "two/deep/00000.tar"
    ]  # fmt: skip


def test_a_parquet_file_beside_captioned_pictures_needs_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    write(tmp_path / "in", {"a.png": png(0), "a.txt": "a", "download.parquet": b"PAR1"})
    assert pack(tmp_path / "in", tmp_path / "out").counts("ignored") == {"table that was not read": 1}
    (tmp_path / "in/a.txt").unlink()
    assert "download.parquet is read after: pip install pyarrow" in refused(tmp_path / "in", tmp_path / "no").hint


def test_captions_that_are_passed_over_are_told(tmp_path: Path) -> None:
    pictures = {f"{stem}.png": png(ord(stem)) for stem in "abc"}
    texts = {"a.txt": "of the file", "b.txt": "the same", "c.txt": "one\ntwo"}
    rows = "file_name,text\na.png,of the table\nb.png,the  same\nc.png,two\n"
    packed = pack(write(tmp_path / "in", {**pictures, **texts, "metadata.csv": rows}), tmp_path / "out")
    assert packed.captions["a"] == ["of the file"] and packed.ledger["ignored"][PASSED_OVER]["first"] == ["a"]
    sidecars = {"a.json": '{"caption": "of JSON"}', "b.json": '{"text": "the same"}', "c.json": '{"Caption": "one"}'}
    long = {**pictures, **texts, "a.json": json.dumps({"caption": "x" * 30_000})}  # too long, and not wanted
    for source in (
        write(tmp_path / "long", long),
        tar(tmp_path / "long.tar", long),
        write(tmp_path / "beside", {**pictures, **texts, **sidecars}),
        tar(tmp_path / "t.tar", {**pictures, **texts, **sidecars}),
    ):
        packed = pack(source, tmp_path / f"out-{source.name}")
        assert packed.captions["a"] == ["of the file"] and packed.ledger["ignored"][PASSED_OVER]["first"] == ["a"]
