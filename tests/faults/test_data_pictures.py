"""Rows E (images and captions) of the battery of faults."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
from peaks import told
from PIL import Image, ImageCms, ImageFile

from training.data.images import Images
from training.data.order import Slot
from training.doors.make_shards import main
from training.errors import UserError
from training.pictures.decoding import load_image
from training.shards.index import write_index
from training.shards.reading import ShardSet
from training.shards.writing import ShardWriter


def noise(seed: int, width: int = 80, height: int = 72) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int = 64, height: int = 48) -> np.ndarray:
    """Colours that change slowly, so that JPEG keeps them."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, 255 - x * 200 / width], -1).astype(np.uint8)


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def folder(root: Path, files: dict[str, bytes], caption: str | None = "words") -> Path:
    """A folder of files; every picture with a caption, unless None."""
    root.mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
        if caption is not None and not name.endswith((".txt", ".jsonl", ".csv")):
            (root / name).with_suffix(".txt").write_text(caption)
    return root


def pack(source: Path, output: Path, *flags: str) -> ShardSet:
    main(["pack", str(source), "--output", str(output), "--val-fraction", "0", *flags])
    return ShardSet(output)


def refused(source: Path, output: Path, *flags: str) -> UserError:
    with pytest.raises(UserError) as caught:
        pack(source, output, *flags)
    return caught.value


def skipped(source: Path, output: Path, *flags: str) -> dict[str, int]:
    summary = pack(source, output, "--on-bad-data", "skip", *flags).summary
    return {reason: found["count"] for reason, found in summary["ledger"]["left out"].items()}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_e1_broken_files(tmp_path: Path) -> None:
    whole = saved(noise(0), "JPEG")
    broken = {"cut.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.jpg": b"words, not a picture",
              "garbage.png": saved(noise(0))[:300] + Random(0).randbytes(4000)}  # fmt: skip
    for number, (name, data) in enumerate(broken.items()):
        error = refused(folder(tmp_path / f"in{number}", {name: data}), tmp_path / f"out{number}")
        assert error.code == 3 and error.what.startswith(f"{name}: ") and "--on-bad-data skip" in error.hint
        if name == "cut.jpg":
            assert error.what == f"cut.jpg: truncated image ({len(data):,} bytes, the rest is missing)"
    source = folder(tmp_path / "in", {**broken, "good.jpg": whole})
    reasons = skipped(source, tmp_path / "out")
    assert reasons.pop("empty file") == reasons.pop("not an image of a known format") == 1
    assert sum(reasons.values()) == 2 and set(reasons) <= {"truncated image", "broken image"}
    assert len(ShardSet(tmp_path / "out")) == 1 and all((source / name).exists() for name in broken)  # nothing deleted
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "WEBP", "PNG"])
def test_e2_turned_pictures(form: str) -> None:
    """Orientations 1-8 in every format that can say so; the size is that after the turn."""
    upright = Image.fromarray(smooth())
    for turn, undone in {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.items():
        exif = Image.Exif()
        exif[0x0112] = turn
        stored = upright if undone is None else upright.transpose(Image.Transpose(undone))
        quality = {} if form in ("TIFF", "PNG") else {"quality": 95}
        image = load_image(saved(stored, form, exif=exif, **quality))
        assert image.size == (64, 48), (form, turn)
        assert np.abs(np.asarray(image).astype(int) - smooth()).mean() < 3, (form, turn)


def test_e2_also_in_tars_that_are_read_in_place(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    writer = ShardWriter(tmp_path, "train")
    writer.add("0", {"jpg": saved(Image.fromarray(smooth()).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)})
    write_index(tmp_path, writer.finish(), {})
    assert Images(ShardSet(tmp_path)).picture(0).shape == (48, 64, 3)


def profile(matrix: list[list[float]], gamma: float) -> bytes:
    """An ICC matrix profile: the D50 columns of `matrix`, one gamma."""

    def xyz(values: list[float]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags = {b"desc": text, b"wtpt": xyz([0.9642, 1.0, 0.8249]), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    tags |= {name: xyz([row[i] for row in matrix]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    table, body, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"test", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + table + body


SRGB = [[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7142]]  # to XYZ of D50, as all three
P3 = [[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]]
ADOBE = [[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]]


@pytest.mark.parametrize("matrix", [P3, ADOBE], ids=["P3", "AdobeRGB"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "palette"])
def test_e3_colour_profiles(matrix: list[list[float]], form: str) -> None:
    """Against the same conversion in numpy: gamma 2.2 out, matrices, the sRGB curve in."""
    image = Image.fromarray((smooth() // 2 + 60).astype(np.uint8))
    image = image.convert("P", palette=Image.Palette.ADAPTIVE) if form == "palette" else image
    linear = (np.asarray(image.convert("RGB")) / 255) ** (round(2.2 * 256) / 256)
    linear = (linear @ np.array(matrix).T @ np.linalg.inv(SRGB).T).clip(0, 1)
    wanted = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    kind = {"palette": "PNG"}.get(form, form)
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    converted = np.asarray(load_image(saved(image, kind, icc_profile=profile(matrix, 2.2), **options))).astype(float)
    assert np.abs(converted - wanted).mean() < 3
    assert np.abs(np.asarray(image.convert("RGB")).astype(float) - wanted).mean() > 3  # which it would fail unconverted


def test_e3_cmyk_and_lab() -> None:
    image = Image.fromarray(smooth())
    cmyk, lab = (
        image.convert("CMYK"),
        ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        ),
    )
    adobe = saved(cmyk, "JPEG", quality=98, subsampling=0)
    assert b"Adobe" in adobe[:400]  # which stores the inks inverted
    for data in (saved(cmyk, "TIFF"), adobe, saved(lab, "TIFF")):
        assert np.abs(np.asarray(load_image(data)).astype(int) - smooth()).mean() < 3


def test_e3_packing_keeps_no_metadata_and_the_same_bytes(tmp_path: Path) -> None:
    """A profile made by the conversion holds the second it was made in; a phone's EXIF the place."""
    exif = Image.Exif()
    exif[0x010E] = "home address"
    data = saved(noise(0), "JPEG", icc_profile=profile(P3, 2.2), exif=exif, quality=95)
    for form in ("png", "jpg"):
        packed = pack(folder(tmp_path / f"in-{form}", {"a.jpg": data}), tmp_path / form, "--format", form)
        image = Image.open(io.BytesIO(packed.read_field(0, form)))
        assert "icc_profile" not in image.info and not image.getexif() and b"home" not in packed.read_field(0, form)


def test_e4_transparency(tmp_path: Path) -> None:
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    red.paste((255, 0, 0, 255), (0, 0, 4, 8))
    grey = Image.new("LA", (8, 8), (200, 0))
    grey.paste((200, 255), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.paste(0, (0, 0, 4, 8))
    files = {"rgba.png": saved(red), "la.png": saved(grey), "p.png": saved(palette, transparency=1),
             "none.png": saved(Image.new("RGBA", (8, 8), (9, 9, 9, 0)))}  # fmt: skip
    source = folder(tmp_path / "in", files)
    flags = ("--resolution", "8", "--background", "#0000ff")
    error = refused(source, tmp_path / "out", *flags)
    assert error.what == "none.png: fully transparent image"
    assert skipped(source, tmp_path / "out", *flags) == {"fully transparent image": 1}
    packed = ShardSet(tmp_path / "out")
    for i in range(3):
        left, right = pixels(packed.read_field(i, "png"))[4, [1, 6]]
        assert right.tolist() == [0, 0, 255] and left[0] in (255, 200), packed.key(i)


def test_e5_animations(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    files = {
        f"{form}.{form}": saved(frames[0], name, save_all=True, append_images=frames[1:], **options)
        for form, name, options in (("gif", "GIF", {}), ("webp", "WEBP", {"lossless": True}), ("png", "PNG", {}),
                                    ("tiff", "TIFF", {}))
    } | {"still.png": saved(noise(0))}  # fmt: skip
    source = folder(tmp_path / "in", files)
    packed = pack(source, tmp_path / "out")
    assert packed.summary["ledger"]["cut"]["animated picture, first frame taken"]["count"] == 4
    moving = [i for i in range(5) if packed.key(i) != "still"]
    assert all(np.abs(pixels(packed.read_field(i, "png")) - [255, 0, 0]).max() < 3 for i in moving)
    assert "animated picture" in refused(source, tmp_path / "x", "--animated", "reject").what
    assert skipped(source, tmp_path / "y", "--animated", "reject") == {"animated picture": 4}


def test_e6_sizes(tmp_path: Path) -> None:
    files = {"small.png": saved(noise(0, 48, 48)), "thread.png": saved(noise(1, 5000, 1)),
             "narrow.png": saved(noise(2, 2000, 80)), "odd.png": saved(noise(3, 101, 67))}  # fmt: skip
    source = folder(tmp_path / "in", files)
    assert skipped(source, tmp_path / "out") == {"too small": 2, "too narrow": 1}
    assert pixels(ShardSet(tmp_path / "out").read_field(0, "png")).shape == (64, 64, 3)
    assert skipped(source, tmp_path / "up", "--upscale") == {"too narrow": 2}
    error = refused(folder(tmp_path / "one", {"a.png": files["small.png"]}), tmp_path / "x")
    assert "too small (48x48 < 64)" in error.what and error.hint.startswith("--upscale enlarges it")
    writer = ShardWriter(tmp_path, "train")
    for i, name in enumerate(("small.png", "odd.png")):
        writer.add(str(i), {"png": files[name]})
    write_index(tmp_path, writer.finish(), {})
    with pytest.raises(UserError, match=r"different sizes in one batch \(101x67, 48x48\)") as caught:
        Images(ShardSet(tmp_path)).__getitems__([Slot(0, 0, 0), Slot(1, 0, 1)])
    assert caught.value.code == 3 and "--resolution" in caught.value.hint


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9000))) + chunk(b"IEND", b"")
    )


def test_e7_decompression_bombs(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"bomb.png": bomb(30_000)})
    before = Image.MAX_IMAGE_PIXELS
    error = refused(source, tmp_path / "out")
    assert error.code == 3 and error.what.startswith("bomb.png: too many pixels")
    source = folder(tmp_path / "small", {"a.png": saved(noise(0, 100, 100))})
    assert "at most 9,999 are decoded" in refused(source, tmp_path / "x", "--max-pixels", "9999").what
    assert len(pack(source, tmp_path / "x", "--max-pixels", "10000")) == 1
    assert refused(source, tmp_path / "y", "--max-pixels", str(10**12)).code == 2  # raised, never lifted
    assert before == Image.MAX_IMAGE_PIXELS
    writer = ShardWriter(tmp_path, "train")  # in a tar read in place: a sentence, not Pillow's own error
    writer.add("bomb", {"png": bomb(30_000)})
    write_index(tmp_path, writer.finish(), {})
    with pytest.raises(UserError, match="bomb: not a readable picture .too many pixels"):
        Images(ShardSet(tmp_path)).picture(0)


def test_e8_kinds_of_files(tmp_path: Path) -> None:
    image = noise(0)
    files = {"a.JPG": saved(image, "JPEG"), "b.jpeg": saved(image, "JPEG"), "c.webp": saved(image, "WEBP"),
             "d.avif": saved(image, "AVIF"), "e.heic": b"\0\0\0\x18ftypheic" + bytes(40), "f.svg": b"<svg/>",
             "g.cr2": b"II*\0", "h.pdf": b"%PDF"}  # fmt: skip
    source = folder(tmp_path / "in", files)
    (source / "folder.jpg").mkdir()
    (source / "gone.png").symlink_to(source / "nowhere.png")
    (source / "loop.png").symlink_to(source / "loop.png")
    (source / "round").symlink_to(source)
    os.mkfifo(source / "pipe.png")  # opening it would wait for ever
    os.mkfifo(source / "c.pipe")
    assert skipped(source, tmp_path / "out") == {
        "HEIC needs: pip install pillow-heif": 1, "SVG is a drawing, not a picture": 1, "RAW is not developed here": 1,
        "unreadable file": 3}  # fmt: skip
    packed = ShardSet(tmp_path / "out")
    assert [packed.key(i) for i in range(len(packed))] == ["a", "b", "c", "d"]
    unread = packed.summary["ledger"]["ignored"]["neither picture nor caption"]
    assert unread == {"count": 2, "first": ["c.pipe", "h.pdf"]}
    for name in ("gone", "loop", "pipe"):
        alone = folder(tmp_path / name, {})
        (source / f"{name}.png").rename(alone / f"{name}.png")
        error = refused(alone, tmp_path / f"out-{name}")
        assert error.code == 3 and error.what.startswith(f"{name}: unreadable file")


def test_e9_same_names_and_same_pictures(tmp_path: Path) -> None:
    one = saved(noise(0))
    source = folder(tmp_path / "in", {"a.png": one, "a.jpg": saved(noise(1), "JPEG"), "b.png": one})
    packed = pack(source, tmp_path / "out")
    keys = [packed.key(i) for i in range(3)]
    assert len(set(keys)) == 3 and keys == ["a", "a_png", "b"]
    assert packed.summary["ledger"] == {
        "replaced": {"same name as another picture": {"count": 1, "first": ["a.png"]}},
        "ignored": {"same picture twice, both packed": {"count": 1, "first": ["b"]}},
    }


CAPTIONS = {
    b"\xef\xbb\xbfa mark\r\nand another\r\n": ["a mark", "and another"],
    "sixteen bits é".encode("utf-16"): ["sixteen bits é"],
    b"zero\0in  the\tmiddle": ["zero in the middle"],
    "🎈 שלום \u202eabc".encode(): ["🎈 שלום \u202eabc"],
    "café".encode("latin-1"): "caption not UTF-8 (byte 3)",
    "sixteen bits".encode("utf-16-le"): "caption not UTF-8 (UTF-16 without its mark?)",
    b"": "no caption",
    b" \r\n\t ": "no caption",
    b"a" * 50_000: "caption too long (50,000 characters)",
    b"a" * (5 << 20): "file too large",
}


@pytest.mark.parametrize("text", CAPTIONS, ids=[f"{i}" for i in range(len(CAPTIONS))])
def test_e10_captions(tmp_path: Path, text: bytes) -> None:
    source = folder(tmp_path / "in", {"a.png": saved(noise(0)), "b.png": saved(noise(1))})
    (source / "a.txt").write_bytes(text)
    wanted = CAPTIONS[text]
    if isinstance(wanted, list):
        assert json.loads(pack(source, tmp_path / "out").read_field(0, "json"))["captions"] == wanted
    else:
        error = refused(source, tmp_path / "out")
        assert error.code == 3 and error.what.startswith(f"a: {wanted}")
        assert skipped(source, tmp_path / "out") == {wanted.split(" (")[0]: 1}


def test_e10_metadata_of_every_kind(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"a.png": saved(noise(0))}, None)
    for number, (line, said) in enumerate((
        (b'{"file_name": "a.png", "text": "\\ud800"}', "a: caption not valid Unicode"),
        (b'{"file_name": "a.png", "text": 7}', "a: caption not a string"),
        (b'{"file_name": "a.png", "text": {"x": 1}}', "a: caption not a string"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"file_name": 3}', "row 1 has no 'file_name'"),
        (b'{"file_name": "../../etc/passwd", "text": "x"}', "listed in metadata.jsonl but not there"),
        (b"\xff\xff", "not UTF-8"),
    )):  # fmt: skip
        (source / "metadata.jsonl").write_bytes(line + b"\n")
        error = refused(source, tmp_path / f"out{number}")
        assert error.code == 3 and said in error.what
    (source / "metadata.jsonl").unlink()
    (source / "metadata.csv").write_bytes(b"file_name,text\na.png," + b"x" * 200_000 + b"\n")
    assert "not readable as CSV" in refused(source, tmp_path / "csv").what
    (source / "metadata.csv").write_bytes(b"file_name,text\na.png,fine,too,many\n")
    assert "row 1 has 4 cells, the header 2" in refused(source, tmp_path / "more").what  # a caption would be cut
    (source / "metadata.csv").write_bytes(b"file_name,text\na.png,fine,,\n")
    assert pack(source, tmp_path / "ok").read_field(0, "txt") == b"fine"


def test_e11_nothing_one_and_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no images in this folder" in refused(folder(tmp_path / "none", {}), tmp_path / "x").what
    assert len(pack(folder(tmp_path / "one", {"a.png": saved(noise(0))}), tmp_path / "out-one")) == 1
    source = folder(tmp_path / "in", {f"{i:02d}.png": saved(noise(i)) for i in range(12)})
    (source / "deep").mkdir()
    for i in range(4):
        (source / f"{i:02d}.png").rename(source / "deep" / f"{i:02d}.png")
        (source / f"{i:02d}.txt").rename(source / "deep" / f"{i:02d}.txt")
    pack(source, tmp_path / "a", "--crop", "random")
    whole = os.walk

    def shuffled(*arguments: object) -> object:
        for place, folders, names in whole(*arguments):
            Random(7).shuffle(names)
            folders.reverse()
            yield place, folders, names

    monkeypatch.setattr(os, "walk", shuffled)
    pack(source, tmp_path / "b", "--crop", "random")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_e11_many_tiny_files_take_bounded_memory(tmp_path: Path) -> None:
    """A picture costs its path and its fingerprint, no more: 100,000 of them some 300 MB at most."""
    one = saved(Image.new("RGB", (8, 8), "red"))
    peaks = []
    for count in (500, 2500):
        source = folder(tmp_path / str(count), {}, None)
        for i in range(count):
            (source / f"{i:05d}.png").write_bytes(one)
        code = f"""
from training.doors.make_shards import main
main(["pack", {str(source)!r}, "--output", {str(source) + "-out"!r}, "--resolution", "8", "--missing-caption", "empty"])
print(peak())
"""
        peaks.append(int(told(code)[-1]))
    assert peaks[1] - peaks[0] < 3 * 2000  # kB
