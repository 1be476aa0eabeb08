"""Tars that are indexed where they lie: which are, which are refused, and whether what is said then helps."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from tars import png, refused, tar_of

from training.data.images import Images
from training.doors.make_shards import main
from training.errors import UserError
from training.pictures.decoding import MODES
from training.pictures.formats import FIELDS
from training.shards.index import read_index, write_index
from training.shards.indexing import index_folder
from training.shards.reading import ShardSet
from training.shards.streaming import StreamedShards, TarStream
from training.shards.verifying import verify
from training.shards.writing import ShardWriter


def packed_as_said(hint: str, output: Path, *flags: str) -> ShardSet:
    """What the command in a hint makes."""
    words = shlex.split(re.split(r" gives | reads | \(", hint[hint.index("make_shards.py ") + 15 :])[0])
    place = words.index("--output") + 1
    main([*words[:place], str(output), *words[place + 1 :], "--resolution", "8", "--missing-caption", "empty", *flags])
    return ShardSet(output)


def test_a_picture_whose_metadata_alone_are_odd_is_sound(tmp_path: Path) -> None:
    """A text beyond Pillow's cap: training reads the picture, and so does `verify`."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "node " * 300_000, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG", pnginfo=texts)
    tar_of(tmp_path / "t.tar", {"a.png": buffer.getvalue(), "a.txt": b"a"})
    index_folder(tmp_path)
    assert verify(tmp_path).problems == ()


def test_several_pictures_in_a_sample(tmp_path: Path) -> None:
    """A photo and its mask: indexed in place, or indexed before that was asked, neither is taken unasked."""
    tars = tmp_path / "tars"
    tar_of(tars / "t.tar", {f"{i}.{field}": png(i + len(field)) for i in range(2) for field in ("png", "webp")})
    problem = refused("index", tars)
    assert problem.code == 3 and "sample 0: several pictures in one sample (png, webp)" in problem.what
    assert not (tars / "index.json").exists() and "--image-field webp" in problem.hint
    assert len(packed_as_said(problem.hint, tmp_path / "out")) == 2
    (tmp_path / "old").mkdir()
    writer = ShardWriter(tmp_path / "old", "train", 3)
    writer.add("0", {"png": png(0), "jpg": png(1), "txt": b"words"})
    write_index(tmp_path / "old", writer.finish(), {})
    with pytest.raises(UserError, match="several pictures in one sample .jpg, png.") as caught:
        Images(ShardSet(tmp_path / "old")).picture(0)
    assert "--image-field jpg" in caught.value.hint
    assert "several pictures in one sample" in refused("verify", tmp_path / "old").what
    stream = StreamedShards(TarStream((str(tars / "t.tar"),)), [{"__key__": "0", "png": png(0), "webp": b"x"}], FIELDS)
    with pytest.raises(UserError, match="several pictures"):
        Images(stream)[0]
    stream.kept.append({"__key__": "1", "png": png(0)})
    assert Images(stream)[0].indices == [1]  # at the front of a stream too, one that cannot be read is replaced


def test_pictures_of_all_formats_are_trained_on_where_they_lie(tmp_path: Path) -> None:
    forms = {"png": "PNG", "bmp": "BMP", "tga": "TGA", "tif": "TIFF", "jfif": "JPEG"}
    members = {}
    for name, form in forms.items():
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), "red").save(buffer, form)
        members |= {f"{name}.{name.upper()}": buffer.getvalue(), f"{name}.txt": name.encode()}
    tar_of(tmp_path / "t.tar", members)
    index_folder(tmp_path)
    assert read_index(tmp_path)[0]["summary"]["ledger"].keys() == {"guessed"}  # no format is missed beside another
    images = Images(ShardSet(tmp_path))
    assert all(abs(images.picture(i).astype(int) - [255, 0, 0]).max() < 3 for i in range(len(forms)))
    assert verify(tmp_path).problems == ()


def test_tars_without_a_picture_are_no_data_set(tmp_path: Path) -> None:
    tar_of(tmp_path / "t.tar", {"a.psd": b"8BPS", "a.txt": b"words"})
    problem = refused("index", tmp_path)
    assert problem.code == 3 and "no field of these tars is a picture (they have: psd, txt)" in problem.what
    assert not (tmp_path / "index.json").exists()


def test_keys_of_two_tars_and_hard_links_are_packed_as_said(tmp_path: Path) -> None:
    for run in range(2):
        tar_of(tmp_path / "keys" / f"{run}.tar", {"0.png": png(run), "0.txt": b"words"})
    problem = refused("index", tmp_path / "keys")
    assert "duplicate" in problem.what and len(packed_as_said(problem.hint, tmp_path / "both")) == 2
    (tmp_path / "links").mkdir()
    with tarfile.open(tmp_path / "links/t.tar", "w") as archive:
        for name in ("0.png", "0.txt", "1.png"):
            info, data = tarfile.TarInfo(name), b"words" if name == "0.txt" else png(ord(name[0]))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("1.txt")
        link.type, link.linkname = tarfile.LNKTYPE, "0.txt"
        archive.addfile(link)
    problem = refused("index", tmp_path / "links")
    assert "hard link" in problem.what and len(packed_as_said(problem.hint, tmp_path / "linked")) == 2


def test_an_index_made_anew_keeps_the_ledger_of_who_made_the_shards(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, data in {"a.png": png(0), "b.png": png(0), "c.png": b"no"}.items():
        (tmp_path / "in" / name).write_bytes(data)
    words = ["pack", tmp_path / "in", "--output", tmp_path / "out", "--resolution", "8"]
    main([*map(str, words), "--missing-caption", "empty", "--on-bad-data", "skip", "--val-fraction", "0"])
    before = read_index(tmp_path / "out")[0]["summary"]["ledger"]
    assert before.keys() == {"left out", "guessed", "ignored"}
    for _ in range(2):
        (tmp_path / "out/._x.tar").write_bytes(b"")
        main(["index", str(tmp_path / "out")])
        after = read_index(tmp_path / "out")[0]["summary"]["ledger"]
        assert after.pop("ignored") == {**before["ignored"], "hidden tar": {"count": 1, "first": ["._x.tar"]}}
        assert after == {effect: kinds for effect, kinds in before.items() if effect != "ignored"}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_verify_asks_for_the_channels_that_were_packed(tmp_path: Path, channels: int) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (16, 16), (9, 99, 200, 128)).save(tmp_path / "in/a.png")
    (tmp_path / "in/a.txt").write_text("word " * 3_000)
    words = ["pack", tmp_path / "in", "--output", tmp_path / "out", "--resolution", "16", "--channels", channels]
    main([*map(str, words), "--val-fraction", "0"])
    assert verify(tmp_path / "out").problems == ()
    with Image.open(tmp_path / "out/contact-sheet.png") as sheet:  # cut to a few lines: the picture is still seen
        assert max(sheet.size) < 200 and len(set(sheet.convert("RGB").getdata())) > 2
    index = json.loads((tmp_path / "out/index.json").read_text())
    index["summary"]["channels"] = 3 if channels != 3 else 4
    (tmp_path / "out/index.json").write_text(json.dumps(index))
    (problem,) = verify(tmp_path / "out").problems
    assert f"is a picture of mode {MODES[channels]}, index.json says" in problem


def test_names_full_of_dots(tmp_path: Path) -> None:
    """As screenshots are called: the key ends at the first dot, and no field is a picture."""
    members = {f"Screenshot 2024-05-01 at 10.15.3{i}.{field}": png(i) for i in range(3) for field in ("PNG", "txt")}
    tar_of(tmp_path / "tars/t.tar", {name: data if name[-3:] == "PNG" else b"words" for name, data in members.items()})
    problem = refused("index", tmp_path / "tars")
    assert problem.code == 3 and "15.30.png" in problem.what
    assert not (tmp_path / "tars/index.json").exists()
    assert len(packed_as_said(problem.hint, tmp_path / "out")) == 3
