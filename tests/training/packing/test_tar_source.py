"""Tars as others make them: what is one sample, which picture, which captions, whose split."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset
from packs import Packed, pack, png, refused, tar, write

PARAGRAPHS = "A description:\n\nA red bicycle.\r\nTags: bicycle"


def test_two_pictures_under_a_key_are_refused_by_field_and_the_hint_works(tmp_path: Path) -> None:
    fields = {"jpg": png(0, "JPEG"), "png": png(1), "seg.webp": png(2, "WEBP"), "txt": "words"}
    path = tar(tmp_path / "t.tar", {f"{i}.{field}": data for i in range(2) for field, data in fields.items()})
    for flags in ((), ("--on-bad-data", "skip")):
        error = refused(path, tmp_path / "no", *flags)
        assert error.code == 3 and error.what == "t.tar: sample 0 has 3 pictures (jpg, png, seg.webp)"
    for field in ("jpg", "png", "seg.webp"):
        assert f"--image-field {field}" in error.hint
        packed = pack(path, tmp_path / field, "--image-field", field)
        assert packed.captions == {"0": ["words"], "1": ["words"]}
        others = fields.keys() - {field, "txt"}
        assert {f"field {name}": 2 for name in others}.items() <= packed.counts("ignored").items()
    assert "no image in the field exr" in refused(path, tmp_path / "no", "--image-field", "exr").what


def test_dotted_fields_alone_are_fields(tmp_path: Path) -> None:
    members = {f"{i}.{field}": png(i) for i in range(2) for field in ("photo.png", "depth.png")}
    error = refused(tar(tmp_path / "t.tar", members), tmp_path / "no", "--missing-caption", "empty")
    assert error.what == "t.tar: sample 0 has 2 pictures (depth.png, photo.png)"
    one = tar(tmp_path / "one.tar", {"0.photo.png": png(0), "0.txt": "words"})
    assert pack(one, tmp_path / "out").captions == {"0": ["words"]}


def test_dots_in_names_belong_to_the_key(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for i in range(3):
        members |= {f"./s/Shot 2024 at 10.15.3{i}.PNG": png(i), f"./s/Shot 2024 at 10.15.3{i}.txt": f"shot {i}"}
    members |= {"v1.5.png": png(7), "v1.5.png.txt": "a version", "plain.png": png(8), "plain.png.txt": "plain"}
    packed = pack(tar(tmp_path / "t.tar", members), tmp_path / "out")
    expected = {f"s/Shot 2024 at 10_15_3{i}": [f"shot {i}"] for i in range(3)}
    assert packed.captions == {**expected, "v1_5": ["a version"], "plain": ["plain"]} and not packed.ledger


@pytest.mark.parametrize("lines", ["each", "join"])
def test_one_rule_for_many_lines_in_folder_tar_and_zip(tmp_path: Path, lines: str) -> None:
    files: dict[str, bytes | str] = {"a.png": png(0), "a.txt": PARAGRAPHS, "b.png": png(1), "b.txt": "one\n"}
    write(tmp_path / "in", files)
    tar(tmp_path / "t.tar", files)
    found = [pack(tmp_path / name, tmp_path / f"out-{name}", "--caption-lines", lines) for name in ("in", "t.tar")]
    each = ["A description:", "A red bicycle.", "Tags: bicycle"]
    for packed in found:
        assert packed.captions == {"a": each if lines == "each" else [" ".join(each)], "b": ["one"]}
        assert sum(packed.counts("guessed").values()) == (lines == "each")


def test_caption_fields_and_columns(tmp_path: Path) -> None:
    members = {"a.png": png(0), "a.caption": "words", "b.png": png(1), "b.json": '{"prompt": "said", "text": "not"}'}
    path = tar(tmp_path / "t.tar", members)
    assert pack(path, tmp_path / "out").captions == {"a": ["words"], "b": ["not"]}
    hint = refused(path, tmp_path / "no", "--caption-column", "prompt").what
    assert hint == "a: no caption"
    flags = ("--caption-column", "prompt", "--missing-caption", "empty")
    assert pack(path, tmp_path / "other", *flags).captions == {"a": [""], "b": ["said"]}
    path = tar(tmp_path / "u.tar", {"b.png": png(1), "b.json": '{"prompt": "said"}'})
    assert "--caption-column prompt" in refused(path, tmp_path / "no").hint


def test_hard_links_have_the_data_of_what_they_link_to(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", {f"{i}.png": png(i) for i in range(3)} | {"0.txt": "a cat"})
    deep = folder / ("deep" * 30)
    deep.mkdir()
    os.link(folder / "0.txt", folder / "1.txt")
    os.link(folder / "0.txt", folder / "2.txt")
    write(deep, {"3.png": png(3), "3.txt": "far"})
    write(deep, {"4.png": png(4)})
    os.link(deep / "3.txt", deep / "4.txt")
    for form in ("gnu", "pax"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", f"--format={form}", "--sort=name", "-cf", path, "-C", folder, "."], check=True)
        packed = pack(path, tmp_path / form)
        assert sorted(packed.captions.values()) == [["a cat"]] * 3 + [["far"]] * 2 and not packed.ledger


@pytest.mark.parametrize("target", ["b.txt", "../x", "/etc/hostname"])
def test_a_hard_link_to_nothing_before_it_is_unusable(tmp_path: Path, target: str) -> None:
    path = tar(tmp_path / "t.tar", {"a.png": png(0)})
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = tarfile.LNKTYPE, target
        archive.addfile(info)
        info = tarfile.TarInfo("b.txt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"late"))
    assert "unusable member" in refused(path, tmp_path / "no").what


def test_two_downloads_with_the_same_keys_are_both_packed(tmp_path: Path) -> None:
    for run in range(2):
        members = {f"{i:09d}.{field}": data for i in range(3) for field, data in
                   (("png", png(10 * run + i)), ("txt", f"run {run} no {i}"))}  # fmt: skip
        tar(tmp_path / f"dl{run}/00000.tar", members)
    packed = pack(tmp_path / "dl*/*.tar", tmp_path / "out")
    first = {f"{i:09d}": [f"run 0 no {i}"] for i in range(3)}
    assert packed.captions == first | {f"dl1/00000/{i:09d}": [f"run 1 no {i}"] for i in range(3)}
    assert packed.counts("replaced") == {"key of another sample too": 3} and not packed.counts("left out")


@pytest.mark.parametrize(
    "names",
    [
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"),
        ("train-0000.tar", "validation-0000.tar"),
        ("train_subj01_13.tar", "VAL_subj01_13.tar"),
        ("train/0.tar", "dev/0.tar"),
        ("a/training/x.tar", "a/valid/x.tar"),
        ("set.train.tar", "set.eval.tar"),
    ],
)
def test_splits_by_name(tmp_path: Path, names: tuple[str, str]) -> None:
    for key, name in zip("tv", names, strict=True):
        tar(tmp_path / "in" / name, {f"{key}{i}.png": png(i) for i in range(4)})
    sources, flags = [tmp_path / "in" / name for name in names], ("--missing-caption", "empty")
    packed = pack(sources, tmp_path / "out", *flags)
    assert packed.splits == {"train": {f"t{i}" for i in range(4)}, "val": {f"v{i}" for i in range(4)}}
    assert packed.counts("guessed").get("split taken from a tar's name or folder", 0) == (
        1 if names[0] == "train-0000.tar" else 2  # `train-` is how our own are named
    )
    assert set(pack(sources, tmp_path / "drawn", *flags, "--splits", "draw").splits) == {"train"}


def test_splits_of_folders_in_a_tar_and_of_a_tar_in_no_split(tmp_path: Path) -> None:
    members = {f"{folder}/{i}.png": png(i) for folder in ("train", "test") for i in range(2)}
    packed = pack(tar(tmp_path / "train/all.tar", members), tmp_path / "out", "--missing-caption", "empty")
    assert packed.splits == {"train": {"train/0", "train/1"}, "test": {"test/0", "test/1"}}
    error = refused(tar(tmp_path / "train_val.tar", members), tmp_path / "no", "--missing-caption", "empty")
    assert "train, val" in error.what and "--splits draw" in error.hint


def test_splits_by_a_column_of_the_json(tmp_path: Path) -> None:
    members = {f"{i}.{field}": data for i, split in enumerate(("val", "train")) for field, data in
               (("png", png(i)), ("json", f'{{"caption": "x", "split": "{split}"}}'))}  # fmt: skip
    packed = pack(tar(tmp_path / "t.tar", members), tmp_path / "out")
    assert packed.splits == {"val": {"0"}, "train": {"1"}}


def test_a_tar_of_a_folder_with_metadata(tmp_path: Path) -> None:
    members = {"d/a.b.png": png(0), "d/c.png": png(1), "d/metadata.csv": "file_name;text\na.b.png;one\nc.png;two\n"}
    packed = pack(tar(tmp_path / "t.tar", {**members, "d/._c.png": b"x"}), tmp_path / "out")
    assert packed.captions == {"d/a_b": ["one"], "d/c": ["two"]}
    assert packed.counts("ignored") == {"hidden file or folder": 1}


def test_files_of_no_sample_are_counted(tmp_path: Path) -> None:
    members = {"a.png": png(0), "a.txt": "a", "README": "x", "._a.png": b"x", "x/.DS_Store": b"x"}
    packed = pack(tar(tmp_path / "t.tar", members), tmp_path / "out")
    assert packed.counts("ignored") == {"hidden file or folder": 2, "file of no sample": 1}
    assert "tar without samples" in refused(tar(tmp_path / "u.tar", {"README": "x"}), tmp_path / "no").what


def test_the_webdataset_package_reads_the_same_samples(tmp_path: Path) -> None:
    """Its grouping is ours wherever names are as it wants them, compressed tars too."""
    members: dict[str, bytes | str] = {}
    for i in range(4):
        members |= {f"x/{i:03d}.png": png(i), f"x/{i:03d}.txt": f"words {i}", f"x/{i:03d}.json": f'{{"n": {i}}}'}
    for name, mode in (("t.tar", "w"), ("t.tar.gz", "w:gz")):
        path = tar(tmp_path / name, members, mode)
        theirs = {s["__key__"]: s["txt"].decode() for s in webdataset.WebDataset(str(path), shardshuffle=False)}
        ours = pack(path, tmp_path / f"out-{name}")
        assert {key: texts[0] for key, texts in ours.captions.items()} == theirs and len(theirs) == 4
        assert ours.meta["x/003"] == {"n": 3}
    assert Packed(tmp_path / "out-t.tar").captions == Packed(tmp_path / "out-t.tar.gz").captions
