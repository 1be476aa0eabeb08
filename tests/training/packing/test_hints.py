"""Hints are packed beside their pictures: of the very pixels, or of files that are cropped and resized as these are."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from training.doors.make_shards import main
from training.errors import UserError
from training.pictures.hints import edges
from training.shards.index import read_index
from training.shards.indexing import index_folder
from training.shards.reading import ShardSet
from training.shards.verifying import verify

COUNT = 6


def drawn(number: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A bar on an even ground, at a place of its own."""
    image = Image.new("RGB", size, (240, 240, 230))
    ImageDraw.Draw(image).rectangle((10 + 9 * number, 12, 30 + 9 * number, 50), fill=(20 + 9 * number, 40, 160))
    return image


def lines(number: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A hint of one vertical line, at a column of its own."""
    image = Image.new("L", size)
    ImageDraw.Draw(image).line((20 + 9 * number, 0, 20 + 9 * number, size[1]), fill=255)
    return image


def folder(root: Path, make: Any = drawn, **options: Any) -> Path:
    root.mkdir(parents=True)
    for number in range(COUNT):
        make(number, **options).save(root / f"{number}.png")
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return folder(tmp_path / "photos")


def pack(source: Path | str, output: Path, *flags: str) -> ShardSet:
    words = ["--resolution", "32", "--val-fraction", "0", "--missing-caption", "empty"]
    main(["pack", str(source), "--output", str(output), *words, *flags])
    assert verify(output).problems == ()
    return ShardSet(output)


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_edges_are_of_the_packed_pixels(photos: Path, tmp_path: Path) -> None:
    shards = pack(photos, tmp_path / "out", "--hint", "edges", "--flip", "--crop", "random")
    assert len(shards) == 2 * COUNT and "hint.png" in shards.fields
    for i in range(len(shards)):  # mirrored ones among them
        fields = shards.read(i)
        hint = decode(fields["hint.png"])
        assert hint.any() and np.array_equal(hint, edges(decode(fields["png"])))
    assert shards.summary["hint"] == {"kind": "edges", "channels": 1, "of": "pixels", "made": {"pixels": COUNT}}
    assert (tmp_path / "out" / "contact-sheet.png").is_file()


def test_without_a_hint_nothing_is_said_of_one(photos: Path, tmp_path: Path) -> None:
    shards = pack(photos, tmp_path / "out")
    assert "hint" not in shards.summary and "hint.png" not in shards.fields


def test_masks_by_background_and_by_alpha(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alpha = Image.new("L", (96, 64))
    ImageDraw.Draw(alpha).rectangle((40, 20, 60, 40), fill=255)
    clear = drawn(0)
    clear.putalpha(alpha)
    clear.save(photos / "0.png")
    for channels in ("3", "4"):
        shards = pack(photos, tmp_path / channels, "--hint", "mask", "--channels", channels, "--order", "source")
        assert shards.summary["hint"]["made"] == {"alpha": 1, "background": COUNT - 1}
        assert f"hints: mask (1 of alpha, {COUNT - 1} of background)" in capsys.readouterr().out
        entry = shards.summary["ledger"]["guessed"]["silhouette of what differs from the border's colour"]
        assert entry["count"] == COUNT - 1
        first = decode(shards.read(0)["hint.png"])
        box = Image.fromarray(first).getbbox()
        assert box is not None and abs(np.array(box) - (12, 10, 22.5, 20.5)).max() <= 1
        # As packed: where the picture itself is seen.
        if channels == "4":
            assert np.array_equal(first, (decode(shards.read(0)["png"])[..., 3] >= 128) * np.uint8(255))


def test_files_are_cropped_as_their_pictures(photos: Path, tmp_path: Path) -> None:
    """The crop is random: a hint that is the picture itself stays the picture itself."""
    own = folder(tmp_path / "own")
    words = ("--hint", "picture", "--hint-files", str(own), "--crop", "random", "--flip")
    shards = pack(photos, tmp_path / "out", *words)
    starts, turned = set(), 0.0
    for i in range(len(shards)):
        fields = shards.read(i)
        picture, hint = decode(fields["png"]).astype(int), decode(fields["hint.png"]).astype(int)
        assert abs(picture - hint).mean() < 6, i  # Lanczos and area
        turned = max(turned, abs(picture - hint[:, ::-1]).mean())
        starts.add(hint.tobytes())
    assert len(starts) == 2 * COUNT and turned > 20
    assert shards.summary["hint"] == {"kind": "picture", "channels": 3, "of": "files", "made": {"files": COUNT}}


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_lines_of_files_stay(photos: Path, tmp_path: Path, factor: int) -> None:
    size = (96 * factor, 64 * factor)
    hints = folder(tmp_path / "lines", lambda n: lines(n, size))
    shards = pack(photos, tmp_path / "out", "--hint", "edges", "--hint-files", str(hints), "--order", "source")
    for n in range(COUNT):
        hint = decode(shards.read(n)["hint.png"])
        left, column = 16 * factor, 20 + 9 * n  # the middle 64 of 96
        inside = left <= column < left + 64 * factor
        wanted = [(column - left) // (2 * factor)] if inside else []
        assert np.flatnonzero(hint[0]).tolist() == wanted and np.array_equal(hint[0], hint[-1])


@pytest.mark.parametrize("words", [("edges",), ("mask",), ("edges", "files")], ids=" ".join)
def test_processes_change_no_byte(photos: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    hints = ("--hint-files", str(folder(tmp_path / "lines", lines))) if words[1:] else ()
    for workers in ("0", "2"):
        flags = ("--flip", "--crop", "random", "--num-workers", workers, "--hint", words[0], *hints)
        pack(photos, tmp_path / workers, *flags)
    alone, shared = (read_index(tmp_path / name)[1] for name in ("0", "2"))
    assert [info.sha256 for info in alone] == [info.sha256 for info in shared]


def refused(source: Path | str, output: Path, *flags: str) -> UserError:
    with pytest.raises(UserError) as caught:
        pack(source, output, *flags)
    return caught.value


BAD = {
    "missing": (lambda path: path.unlink(), "no hint"),
    "shape": (lambda path: lines(0, (64, 64)).save(path), "hint of another shape than its picture"),
    "small": (lambda path: lines(0, (24, 16)).save(path), "hint too small"),
    "text": (lambda path: path.write_text("a hint"), "hint: not an image"),
    "empty": (lambda path: path.write_bytes(b""), "hint: empty file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:90]), "hint: "),
    "colour": (lambda path: drawn(1).save(path), "hint: colour in a hint of edges"),
    "float": (lambda path: Image.fromarray(np.eye(64, 96, dtype=np.float32)).save(path, "TIFF"), "hint: nothing says"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_hint_that_cannot_be_used(photos: Path, tmp_path: Path, name: str) -> None:
    """Stops the packing, or leaves its sample out, counted: none is guessed."""
    spoil, why = BAD[name]
    hints = folder(tmp_path / "lines", lines)
    spoil(hints / "3.png")
    flags = ("--hint", "edges", "--hint-files", str(hints))
    problem = refused(photos, tmp_path / "out", *flags)
    assert problem.code == 3 and why in problem.what and "3" in problem.what
    assert "--range" not in problem.hint or "--hint-range" in problem.hint
    shards = pack(photos, tmp_path / "skip", *flags, "--on-bad-data", "skip")
    assert len(shards) == COUNT - 1 and "3" not in {shards.key(i) for i in range(len(shards))}
    (kind, entry), *more = shards.summary["ledger"]["left out"].items()
    assert not more and entry["count"] == 1 and kind.startswith(why[:20])


def test_hints_of_other_depths(photos: Path, tmp_path: Path) -> None:
    """16 bits by their type's range or the one given; floats by that alone."""
    ramp = np.linspace(0, 1, 64 * 96, dtype=np.float32).reshape(64, 96)
    for name, values, form, flags in (
        ("deep", (ramp * 65535).astype(np.uint16), "PNG", ()),
        ("millimetres", (ramp * 4000).astype(np.uint16), "PNG", ("--hint-range", "0", "4000")),
        ("metres", ramp * 4, "TIFF", ("--hint-range", "0", "4")),
    ):
        hints = tmp_path / name
        hints.mkdir()
        for n in range(COUNT):
            Image.fromarray(values).save(hints / f"{n}.{'tif' if form == 'TIFF' else 'png'}", form)
        shards = pack(photos, tmp_path / f"{name}-out", "--hint", "depth", "--hint-files", str(hints), *flags)
        assert shards.summary["hint"].get("range", []) == [float(word) for word in flags[1:]]
        hint = decode(shards.read(0)["hint.png"]).astype(int)
        wanted = ramp[:, 16:80].reshape(32, 2, 32, 2).mean((1, 3)) * 255
        assert abs(hint - wanted).max() < 1.5, name


def test_what_is_told_of_hints_that_say_nothing(photos: Path, tmp_path: Path) -> None:
    hints = folder(tmp_path / "lines", lines)
    Image.new("L", (96, 64)).save(hints / "0.png")
    lines(0).save(hints / "stranger.png")
    shards = pack(photos, tmp_path / "out", "--hint", "edges", "--hint-files", str(hints))
    ignored = shards.summary["ledger"]["ignored"]
    assert ignored["hint of one value everywhere, which says nothing"]["count"] >= 1
    assert ignored["hint of no picture that was packed"] == {"count": 1, "first": ["stranger.png"]}


def test_flags_that_do_not_go_together(photos: Path, tmp_path: Path) -> None:
    hints, out = folder(tmp_path / "lines", lines), tmp_path / "out"
    assert "--hint-files DIR" in refused(photos, out, "--hint", "depth").hint
    for meant in (str(hints), f"{hints}/none"):
        assert f"--hint-files {meant} where they lie" in refused(photos, out, "--hint", meant).hint
    assert "invalid choice" in refused(photos, out, "--hint", "canny").what
    assert "--hint edges" in refused(photos, out, "--hint-files", str(hints)).hint
    assert "--hint-files" in refused(photos, out, "--hint", "edges", "--hint-range", "0", "1").what
    assert "LOW must be below" in refused(
        photos, out, "--hint", "depth", "--hint-files", str(hints), "--hint-range", "2", "1").what
    assert "no such folder" in refused(photos, out, "--hint", "depth", "--hint-files", str(tmp_path / "no")).what
    lines(0).save(hints / "0.webp")
    assert "two hints" in refused(photos, out, "--hint", "depth", "--hint-files", str(hints)).what
    within = folder(photos / "depth", lines)
    assert "packed as pictures" in refused(photos, out, "--hint", "depth", "--hint-files", str(within)).what


def test_other_hints_are_another_packing(photos: Path, tmp_path: Path) -> None:
    hints = folder(tmp_path / "lines", lines)
    flags = ("--hint", "edges", "--hint-files", str(hints))
    pack(photos, tmp_path / "out", *flags)
    pack(photos, tmp_path / "out", *flags)  # done already
    lines(5).save(hints / "0.png")
    assert "holds another packing" in refused(photos, tmp_path / "out", *flags).what
    assert "holds another packing" in refused(photos, tmp_path / "out", "--hint", "edges").what


def test_verify_and_index_know_hints(photos: Path, tmp_path: Path) -> None:
    from training.shards.writing import write_shard

    out = tmp_path / "out"
    shards = pack(photos, out, "--hint", "edges")
    rows = [(shards.key(i), shards.read(i)) for i in range(COUNT)]
    del rows[1][1]["hint.png"]
    rows[2][1]["hint.png"] = rows[2][1]["hint.png"][:50]
    write_shard(out, "train-000000", rows)
    index_folder(out)
    found = "\n".join(verify(out).problems)
    assert found.count("hint that cannot be read") == 2 and rows[1][0] in found and rows[2][0] in found
    (out / "index.json").unlink()
    index_folder(out)
    assert read_index(out)[0]["summary"]["hint"] == {"kind": "edges", "channels": 1, "of": "pixels"}


def test_shapes_and_emoji(tmp_path: Path) -> None:
    root = tmp_path / "package"
    (root / "img" / "google" / "64").mkdir(parents=True)
    alpha = Image.new("L", (64, 64))
    ImageDraw.Draw(alpha).ellipse((10, 10, 50, 50), fill=255)
    face = Image.new("RGB", (64, 64), (255, 255, 255))  # which is the background: alpha alone tells it
    face.putalpha(alpha)
    face.save(root / "img" / "google" / "64" / "1f600.png")
    listed = [{"name": "FACE", "category": "Smileys", "image": "1f600.png"}]
    (root / "emoji.json").write_text(json.dumps(listed))
    for kind in ("edges", "mask"):
        shapes = pack("shapes", tmp_path / f"s-{kind}", "--samples", "8", "--hint", kind)
        assert all(decode(shapes.read(i)["hint.png"]).any() for i in range(8))
        emoji = pack("emoji", tmp_path / f"e-{kind}", "--root", str(root), "--hint", kind)
        assert decode(emoji.read(0)["hint.png"]).any() == (kind == "mask")
    assert emoji.summary["hint"]["made"] == {"alpha": 1}
