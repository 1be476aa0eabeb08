"""Which files are read, whatever they are called, and which are refused by name with a next step."""

from __future__ import annotations

import importlib.util
import io
import shlex
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peaks import told
from PIL import Image

from training.doors.make_shards import main
from training.errors import UserError
from training.pictures.decoding import load_image
from training.pictures.formats import ELSEWHERE, SUFFIXES, suffix_of, unused
from training.shards.reading import ShardSet

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
WRITTEN = {
    ".jfif": "JPEG", ".jpe": "JPEG", ".jif": "JPEG", ".JFIF": "JPEG", ".mpo": "MPO", ".apng": "PNG", ".pnm": "PPM",
    ".tga": "TGA", ".dib": "DIB", ".ico": "ICO", ".qoi": "QOI", ".j2k": "JPEG2000", ".jpx": "JPEG2000",
}
HEADS = {
    ".psd": b"8BPS", ".exr": b"\x76\x2f\x31\x01", ".hdr": b"#?RADIANCE\n", ".jls": b"\xff\xd8\xff\xf7",
    ".xcf": b"gimp xcf v", ".dds": b"DDS ", ".jxr": b"II\xbc\1",
}


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def folder(root: Path, files: dict[str, bytes]) -> Path:
    root.mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def pack(source: Path, output: Path, *flags: str) -> ShardSet:
    words = ["--val-fraction", "0", "--missing-caption", "empty", "--resolution", "32"]
    main(["pack", str(source), "--output", str(output), *words, *flags])
    return ShardSet(output)


@pytest.mark.parametrize("suffix", WRITTEN)
def test_suffixes_that_are_read(suffix: str, tmp_path: Path) -> None:
    packed = pack(folder(tmp_path / "in", {f"a{suffix}": saved(NOISE, WRITTEN[suffix])}), tmp_path / "out")
    with Image.open(io.BytesIO(packed.read_field(0, "png"))) as found:
        assert found.size == (32, 32) and np.asarray(found).std() > 10  # neither black nor flat


@pytest.mark.parametrize("suffix", HEADS)
def test_formats_refused_by_name(suffix: str, tmp_path: Path) -> None:
    """Under their own suffix, under none, under another's; in a folder of nothing else, too."""
    data = HEADS[suffix] + bytes(99)
    files = {f"a{suffix}": data, "plain": data, "good.png": saved(NOISE, "PNG")}
    source = folder(tmp_path / "in", files)
    with pytest.raises(UserError, match="is not read") as caught:
        pack(source, tmp_path / "out")
    assert caught.value.code == 3
    left = pack(source, tmp_path / "out", "--on-bad-data", "skip").summary["ledger"]["left out"]
    assert left == {ELSEWHERE[suffix].split(" (")[0]: {"count": 2, "first": [f"a{suffix}", "plain"]}}
    with pytest.raises(UserError) as caught:
        load_image(data)
    assert caught.value.what == ELSEWHERE[suffix] and "save it as PNG" in caught.value.what
    with pytest.raises(UserError, match="no images in this folder") as caught:
        pack(folder(tmp_path / "only", {f"a{suffix}": HEADS[suffix]}), tmp_path / "x")
    assert ELSEWHERE[suffix] in caught.value.hint


def test_a_picture_without_its_suffix_is_not_passed_over(tmp_path: Path) -> None:
    """The name that is proposed is one that is read."""
    forms = {"PNG": ".png", "JPEG": ".jpg", "GIF": ".gif", "WEBP": ".webp", "TIFF": ".tif", "AVIF": ".avif"}
    for form, suffix in forms.items():
        source = folder(tmp_path / form, {"photo": saved(NOISE, form), "good.png": saved(NOISE, "PNG")})
        with pytest.raises(UserError, match="picture under a suffix that is not read") as caught:
            pack(source, tmp_path / f"out-{form}")
        name = caught.value.what.split("name it ")[1].rstrip(")")
        assert name == f"photo{suffix}" and suffix in SUFFIXES
        (source / "photo").rename(source / name)
        assert len(pack(source, tmp_path / f"out-{form}")) == 2
    for name, data in (("notes.md", b"# words"), ("a.pdf", b"%PDF-1.4"), ("b.json", b"{}"), ("empty", b"")):
        assert unused(name, data) is None


@pytest.mark.parametrize(("suffix", "data", "module"), [
    (".jxl", b"\xff\x0a", "pillow_jxl"), (".jxl", b"\0\0\0\x0cJXL \r\n\x87\n", "pillow_jxl"),
    (".heic", b"\0\0\0\x18ftypheic", "pillow_heif"), (".heic", b"\0\0\0\x18ftypmif1", "pillow_heif"),
])  # fmt: skip
def test_what_a_package_reads_names_it(suffix: str, data: bytes, module: str) -> None:
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is here")
    with pytest.raises(UserError, match="needs: pip install pillow-"):
        load_image(data + bytes(40))
    assert suffix_of(data) == suffix and suffix in SUFFIXES


def test_too_many_pixels_names_the_flag_and_its_end(tmp_path: Path) -> None:
    """The hint is followed; beyond the end of the flag nothing is proposed that would not work."""
    source = folder(tmp_path / "in", {"pano.png": saved(Image.new("L", (1200, 100)), "PNG")})
    with pytest.raises(UserError) as caught:
        pack(source, tmp_path / "out", "--max-pixels", "100000")
    assert caught.value.what == "pano.png: too many pixels (1200x100; at most 100,000 are decoded)"
    flag, rest = caught.value.hint.split(" decodes it; ")
    assert flag == "--max-pixels 120000" and rest.startswith("--max-pixels goes up to 178000000")
    assert len(pack(source, tmp_path / "out", *shlex.split(flag))) == 1
    header = saved(Image.new("1", (8, 8)), "PNG")
    for side in (13_400, 30_000):
        huge = header[:16] + side.to_bytes(4, "big") * 2 + header[24:29]
        huge += zlib.crc32(huge[12:29]).to_bytes(4, "big") + header[33:]
        with pytest.raises(UserError, match="too many pixels") as caught:
            load_image(huge)
        assert caught.value.hint == "make it smaller first; --max-pixels goes up to 178000000"


def test_too_small_and_too_narrow_say_what_helps(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"a.png": saved(NOISE, "PNG")})
    with pytest.raises(UserError, match="too small .64x48 < 64.") as caught:
        pack(source, tmp_path / "out", "--resolution", "64")
    flag = caught.value.hint.split(" enlarges it")[0]
    assert flag == "--upscale" and len(pack(source, tmp_path / "out", "--resolution", "64", flag)) == 1
    with pytest.raises(UserError, match="too narrow") as caught:
        pack(folder(tmp_path / "thin", {"a.png": saved(Image.new("L", (5000, 100)), "PNG")}), tmp_path / "x")
    assert caught.value.hint.startswith("cut it into several pictures")


@pytest.mark.parametrize(("mode", "form"), [
    ("I;16", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "JPEG"), ("F", "TIFF"), ("RGBA", "WEBP"),
    ("RGB", "JPEG2000"),
])  # fmt: skip
def test_memory_goes_by_the_pixels(mode: str, form: str, tmp_path: Path) -> None:
    """18 bytes for each that --max-pixels counts, at most, conversions and all: a small file is no way around it."""
    side = 3000
    image = Image.fromarray(np.zeros((side, side), {"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)))
    options: dict[str, Any] = {"TIFF": {"compression": "tiff_lzw"}, "WEBP": {"method": 0}}.get(form, {})
    if mode in ("RGBA", "RGB", "P"):
        image = Image.new(mode, (side, side), 1 if mode == "P" else (1, 2, 3, 128)[: len(mode)])
        options |= {"transparency": 0} if mode == "P" else {}
    (tmp_path / "x").write_bytes(saved(image, form, **options))
    code = f"""
from pathlib import Path
from PIL import Image
from training.pictures.decoding import load_image
data = Path({str(tmp_path / "x")!r}).read_bytes()
Image.init()
before = peak()
load_image(data, limits=(0, 1) if {mode!r} == "F" else None)
print(peak() - before)
"""
    counted = side * side * (2 if form == "JPEG2000" else 1)
    assert int(told(code)[-1]) * 1024 < 18 * counted + (24 << 20)


def test_jpeg_2000_counts_twice(tmp_path: Path) -> None:
    """Its decoder holds that much more memory; the hint says how many it needs."""
    source = folder(tmp_path / "in", {"a.jp2": saved(NOISE, "JPEG2000")})
    with pytest.raises(UserError, match="64x48 in JPEG2000, where each counts 2-fold; at most 6,143 are") as caught:
        pack(source, tmp_path / "out", "--max-pixels", "6143")
    flag = caught.value.hint.split(" decodes it")[0]
    assert flag == "--max-pixels 6144" and len(pack(source, tmp_path / "out", *shlex.split(flag))) == 1


def test_ignore_alpha_is_what_the_hint_says(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"a.png": saved(Image.new("RGBA", (40, 40), (200, 9, 9, 0)), "PNG")})
    for channels in ("3", "4"):
        with pytest.raises(UserError, match=r"a.png: fully transparent image") as caught:
            pack(source, tmp_path / f"out{channels}", "--channels", channels)
        flag = caught.value.hint.split()[0]
        packed = pack(source, tmp_path / f"out{channels}", "--channels", channels, flag)
        found = np.asarray(Image.open(io.BytesIO(packed.read_field(0, "png"))))
        assert found.shape[2] == int(channels) and found[20, 20].tolist() == [200, 9, 9, 255][: int(channels)]
