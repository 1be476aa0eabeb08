"""From words to a source: patterns, brackets, archives in place, and hints that work when followed."""

from __future__ import annotations

import gzip
import shlex
import stat
import subprocess
import zipfile
from pathlib import Path

import pytest
from packs import pack, png, refused, tar, write

from training.packing import archives
from training.packing.finding import find_files

FILES: dict[str, bytes | str] = {
    "top/train/a.png": png(0), "top/train/a.txt": "one\ntwo", "top/val/metadata.csv": "file_name,text\nb.png,three\n",
    "top/val/b.png": png(1),
}  # fmt: skip
CAPTIONS = {"top/train/a": ["one", "two"], "top/val/b": ["three"]}


def zipped(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["d.zip", "d.ZIP", "d.tar", "d.tar.gz", "d.tgz", "d.tar.bz2", "d.tar.xz", "d.txz"])
def test_archives_are_read_in_place(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    if name.lower().endswith("zip"):
        path = zipped(tmp_path / "in" / name, FILES)
    else:
        mode = {"z": "w:gz", "2": "w:bz2", "xz": "w:xz"}.get(name[-2:] if name.endswith("xz") else name[-1:], "w")
        path = tar(tmp_path / "in" / name, FILES, "w:gz" if name.endswith("tgz") else mode)
    packed = pack(path, tmp_path / "out")
    assert packed.captions == CAPTIONS and packed.splits == {"train": {"top/train/a"}, "val": {"top/val/b"}}
    assert not packed.counts("left out") and [entry.name for entry in (tmp_path / "in").iterdir()] == [name]
    assert pack(write(tmp_path / "folder", FILES), tmp_path / "same").captions == CAPTIONS


def test_what_a_zip_may_not_hold(tmp_path: Path) -> None:
    path = zipped(tmp_path / "d.zip", {"a.png": png(0), "a.txt": "a", "../b.png": png(1), "/c.png": png(2)})
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("d.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("__MACOSX/._a.png", b"x")
        archive.writestr("sub\\e.png", png(3))  # as old programs for Windows wrote it
        archive.writestr("sub\\e.txt", "e")
    assert "unusable member" in refused(path, tmp_path / "no").what
    packed = pack(path, tmp_path / "out", "--on-bad-data", "skip")
    assert packed.captions == {"a": ["a"], "sub/e": ["e"]} and packed.counts("left out") == {"unusable member": 3}
    assert packed.counts("ignored") == {"hidden file or folder": 1}


def test_damage_and_lies_in_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w") as archive:  # stored: a changed byte is seen by its CRC alone
        archive.writestr("a.png", png(0))
        archive.writestr("a.txt", "words")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"words", b"wards"))
    assert "a: damaged member" in refused(path, tmp_path / "no").what
    path.write_bytes(data[:-30])
    error = refused(path, tmp_path / "no")
    assert error.code == 3 and "not a sound zip" in error.what
    bomb = zipped(tmp_path / "bomb.zip", {"a.png": png(0), "a.txt": "x" * (5 << 20)})
    assert "a: file too large" in refused(bomb, tmp_path / "no").what
    monkeypatch.setattr(archives, "SLACK", 1 << 20)
    bomb = zipped(tmp_path / "bomb.zip", {"a.png": bytes(2 << 20), "a.txt": "x"})
    assert "a: file too large (2,097,152 bytes out of" in refused(bomb, tmp_path / "no").what


def test_bombs_and_damage_in_compressed_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar(tmp_path / "d.tar.gz", {"a.png": png(0), "a.txt": "a"}, "w:gz")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert "damaged tar" in refused(path, tmp_path / "no").what
    monkeypatch.setattr(archives, "SLACK", 1 << 20)
    path.write_bytes(gzip.compress(bytes(8 << 20)))
    error = refused(path, tmp_path / "no")
    assert error.code == 3 and "unpacks to more than" in error.what
    path.write_bytes(whole)
    pack(path, tmp_path / "out")


def test_a_compressed_tar_is_gone_through_once_however_its_members_lie(tmp_path: Path) -> None:
    files = {f"{i}.{field}": data for field in ("txt", "png") for i in range(50) for data in
             ([f"words {i}"] if field == "txt" else [png(i)])}  # fmt: skip
    path = tar(tmp_path / "d.tar.gz", dict(files), "w:gz")
    back = []
    seek = gzip.GzipFile.seek

    def counted(self: gzip.GzipFile, offset: int, whence: int = 0) -> int:
        back.append(whence == 0 and offset < self.tell())
        return seek(self, offset, whence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gzip.GzipFile, "seek", counted)
        packed = pack(path, tmp_path / "out")
    assert packed.captions["7"] == ["words 7"] and len(packed.captions) == 50
    assert sum(back) <= 4  # to the start for the headers, the captions and the pictures


@pytest.mark.parametrize("folder", ["a [1]", "a [x] {y}", "a {1..2}", "it's", "q?"])
def test_names_with_brackets_and_the_hint_for_a_folder_of_tars(tmp_path: Path, folder: str) -> None:
    tar(tmp_path / folder / "sub" / "0.tar", {"a.png": png(0), "a.txt": "a"})
    hint = refused(tmp_path / folder, tmp_path / "no").hint
    pattern = shlex.split(hint.partition(": ")[2])
    assert pack(pattern[0], tmp_path / "out").captions == {"a": ["a"]}
    assert find_files([str(tmp_path / folder / "sub" / "0.tar")]) == [tmp_path / folder / "sub" / "0.tar"]


def test_a_folder_of_zips(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    zipped(tmp_path / "in/d.zip", FILES)
    hint = refused(tmp_path / "in", tmp_path / "no").hint
    assert pack(shlex.split(hint.partition(": ")[2])[0], tmp_path / "out").captions == CAPTIONS


def test_an_archive_beside_pictures_is_told(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.png": png(0), "a.txt": "a"})
    zipped(tmp_path / "in/d.zip", FILES)
    assert pack(tmp_path / "in", tmp_path / "out").counts("ignored") == {"archive beside the pictures, not read": 1}


@pytest.mark.parametrize(("name", "tool"), [("d.7z", "7z x"), ("d.rar", "unrar x"), ("d.tar.zst", "tar --zstd")])
def test_archives_that_are_not_read(tmp_path: Path, name: str, tool: str) -> None:
    (tmp_path / name).write_bytes(b"?")
    error = refused(tmp_path / name, tmp_path / "no")
    assert error.code == 3 and name in error.what and tool in error.hint and f"then pack {tmp_path}/d" in error.hint


def test_what_unpacks_a_gzip_file_works(tmp_path: Path) -> None:
    (tmp_path / "a b.png.gz").write_bytes(gzip.compress(png(0)))
    hint = refused(tmp_path / "a b.png.gz", tmp_path / "no").hint
    command, folder = hint.removeprefix("unpack it: ").split("; then pack ")
    subprocess.run(command, shell=True, check=True)
    pack(shlex.split(folder)[0], tmp_path / "out", "--missing-caption", "empty")


def test_one_picture_is_no_source_but_its_folder_is(tmp_path: Path) -> None:
    path = write(tmp_path / "in", {"a.png": png(0), "a.txt": "a"}) / "a.png"
    hint = refused(path, tmp_path / "no").hint
    words = shlex.split(hint.partition("make_shards.py ")[2])
    assert words[::2] == ["pack", "--output"] and pack(words[1], tmp_path / "out").captions == {"a": ["a"]}


def test_several_sources_at_once(tmp_path: Path) -> None:
    for name in "xy":
        write(tmp_path / name, {"a.png": png(ord(name)), "a.txt": name})
    error = refused([tmp_path / "x", tmp_path / "y"], tmp_path / "no")
    assert error.code == 2 and "links to folders are followed" in error.hint
    (tmp_path / "both").mkdir()
    for name in "xy":
        (tmp_path / "both" / name).symlink_to(tmp_path / name)
    assert pack(tmp_path / "both", tmp_path / "out").captions == {"x/a": ["x"], "y/a": ["y"]}
    several = [zipped(tmp_path / "d.zip", FILES), tar(tmp_path / "d.tar", FILES)]
    assert "one source at a time" in refused(several, tmp_path / "no").what


