"""A sound picture is read whatever its metadata are; what cannot be read of them is dropped and counted."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from training.errors import UserError
from training.pictures.decoding import ANIMATED, INKS, LAID, PROFILE, UNUSED_ALPHA, load_image
from training.pictures.metadata import GAIN_MAP, HDR, UNREADABLE, VIEWS, WIDE

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)
SMOOTH = Image.fromarray(np.stack([*np.mgrid[0:192:4, 0:256:4], np.full((48, 64), 90)], -1).astype(np.uint8))


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    code = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", code)


def png_with(*chunks: bytes, end: bool = False, image: Image.Image = PICTURE) -> bytes:
    """A PNG with chunks after its head, or before its end."""
    data = saved(image)
    at = len(data) - 12 if end else 33
    return data[:at] + b"".join(chunks) + data[at:]


def jpeg_with(marker: int, body: bytes) -> bytes:
    data = saved(SMOOTH, "JPEG", quality=95)
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + data[2:]


def big_text() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "node " * 300_000, zip=True)
    return saved(PICTURE, pnginfo=info)


def remarks(data: bytes, **how: Any) -> list[tuple[str, str]]:
    return load_image(data, **how).info["remarks"]


BAD_EXIF = b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(9)
ODD_PNGS = {
    "text beyond Pillow's cap": big_text(),
    "many texts": png_with(*[chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 900_000)) for _ in range(80)]),
    "zTXt of another method": png_with(chunk(b"zTXt", b"key\0\x07" + zlib.compress(b"x"))),
    "text with a wrong checksum": png_with(chunk(b"tEXt", b"key\0value", 7)),
    "pHYs too short": png_with(chunk(b"pHYs", b"\0")),
    "profile beyond Pillow's cap": png_with(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000)))),
    "profile of another method": png_with(chunk(b"iCCP", b"p\0\x09" + zlib.compress(b"x"))),
    "EXIF that points nowhere": png_with(chunk(b"eXIf", BAD_EXIF[6:])),
    "EXIF of letters": png_with(chunk(b"eXIf", b"not EXIF at all")),
    "EXIF as text of no digits": png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzzzz\n")),
}


@pytest.mark.parametrize("name", ODD_PNGS)
def test_a_png_with_odd_metadata_keeps_its_pixels(name: str) -> None:
    image = load_image(ODD_PNGS[name])
    assert np.array_equal(np.asarray(image), NOISE)
    assert image.info["remarks"] == [("ignored", UNREADABLE)]


@pytest.mark.parametrize(("marker", "body"), [
    (0xE1, BAD_EXIF), (0xE1, b"Exif\0\0garbage"), (0xE1, b"Exif\0\0"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmp"),
    (0xE2, b"ICC_PROFILE\0\1\3short"), (0xE2, b"MPF\0MM\0*\0\0\0\x08\0\x09garbage"),
    (0xED, b"Photoshop 3.0\x008BIM\x04"),
    (0xFE, b"\xff" * 60_000), (0xE0, b"JFIF\0\1"), (0xEE, b"Ad"),
])  # fmt: skip
def test_a_jpeg_with_odd_metadata_keeps_its_pixels(marker: int, body: bytes) -> None:
    found = np.asarray(load_image(jpeg_with(marker, body))).astype(int)
    assert np.abs(found - np.asarray(SMOOTH)).mean() < 3


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "TIFF"])
def test_a_turn_that_is_none_is_counted(form: str) -> None:
    for turn, wanted in ((0, []), (1, []), (9, [("ignored", UNREADABLE)])):
        exif = Image.Exif()
        exif[0x0112] = turn
        assert remarks(saved(SMOOTH, form, exif=exif)) == wanted, turn


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("exif", [BAD_EXIF, b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"x"], ids=range(4))
def test_broken_exif(form: str, exif: bytes) -> None:
    data = saved(SMOOTH, form, exif=exif, **{"quality": 95} if form == "JPEG" else {})
    assert np.abs(np.asarray(load_image(data)).astype(int) - np.asarray(SMOOTH)).mean() < 4


def test_broken_exif_of_avif() -> None:
    """Which Pillow's own writer refuses to make."""
    exif = Image.Exif()
    exif[0x010E] = "words"
    data = saved(SMOOTH, "AVIF", quality=95, exif=exif)
    at = data.index(exif.tobytes()[6:])
    image = load_image(data[:at] + b"xxxx" + data[at + 4 :])
    assert np.abs(np.asarray(image).astype(int) - np.asarray(SMOOTH)).mean() < 3
    assert image.info["remarks"] == [("ignored", UNREADABLE)]


def test_the_turn_is_kept_where_only_texts_are_dropped() -> None:
    """A picture both turned and with a text that cannot be read; one whose EXIF holds what cannot be written again."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = png_with(chunk(b"eXIf", exif.tobytes()), chunk(b"tEXt", b"key\0value", 7))
    image = load_image(turned)
    assert np.array_equal(np.asarray(image), np.rot90(NOISE, -1)) and image.info["remarks"] == [("ignored", UNREADABLE)]


def test_a_damaged_picture_is_still_refused() -> None:
    """With bad metadata or without; the cap on pixels stands on every way."""
    for data in (saved(PICTURE), big_text()):
        spoilt = bytearray(data)
        at = data.index(b"IDAT") + 40
        spoilt[at : at + 30] = bytes(30)
        for bad in (bytes(spoilt), data[: len(data) // 2]):
            with pytest.raises(UserError, match="broken|truncated"):
                load_image(bad)
    with pytest.raises(UserError, match="too many pixels .64x48; at most 3,000"):
        load_image(big_text(), max_pixels=3000)


def test_profiles_that_cannot_be_used_are_counted() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert remarks(saved(PICTURE, icc_profile=srgb)) == []
    assert remarks(saved(PICTURE, icc_profile=b"no profile")) == [("ignored", PROFILE)]
    assert remarks(saved(PICTURE.convert("L"), "JPEG", icc_profile=srgb)) == [("ignored", PROFILE)]  # one for colour
    assert remarks(saved(PICTURE.convert("CMYK"), "JPEG")) == [("guessed", INKS)]


def test_hdr_is_counted() -> None:
    """Signalled by PNG's cICP, by the colr box of AVIF and HEIC; a gain map beside the picture."""
    for primaries, transfer, wanted in ((9, 16, [HDR]), (9, 18, [HDR]), (9, 1, [WIDE]), (12, 13, [WIDE]), (1, 13, [])):
        found = remarks(png_with(chunk(b"cICP", bytes([primaries, transfer, 0, 1]))))
        assert found == [("guessed", kind) for kind in wanted]
    avif = saved(SMOOTH, "AVIF")
    at = avif.index(b"colrnclx") + 10
    assert remarks(avif) == []
    assert remarks(avif[:at] + struct.pack(">H", 16) + avif[at + 2 :]) == [("guessed", HDR)]
    gain = jpeg_with(0xE1, b'http://ns.adobe.com/xap/1.0/\0<rdf hdrgm:Version="1.0"/>')
    assert remarks(gain) == [("ignored", GAIN_MAP)]


def test_several_pictures_in_one_file() -> None:
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    for form in ("GIF", "TIFF", "PNG", "WEBP"):
        image = load_image(saved(red, form, save_all=True, append_images=[blue]))
        assert image.info == {"animated": True, "deep": False, "remarks": [("cut", ANIMATED)]}, form
    image = load_image(saved(red, "MPO", save_all=True, append_images=[blue]))
    assert image.info == {"animated": False, "deep": False, "remarks": [("ignored", VIEWS)]}
    assert image.getpixel((5, 5))[0] > 250
    assert load_image(saved(red, "JPEG")).info == {"animated": False, "deep": False, "remarks": []}


def test_one_bit_is_black_and_white() -> None:
    bits = Image.fromarray(NOISE[..., 0] > 127)
    for form in ("PNG", "TIFF", "BMP", "PPM"):
        found = np.asarray(load_image(saved(bits, form)))
        assert np.array_equal(found[..., 0], np.where(NOISE[..., 0] > 127, 255, 0)), form


def bmp_with_mask(alpha: int) -> bytes:
    """A 32-bit BMP whose head names an alpha mask."""
    pixels = np.dstack([NOISE[..., ::-1], np.full(NOISE.shape[:2], alpha, np.uint8)])[::-1].tobytes()
    head = struct.pack("<IiiHHIIiiII", 108, 64, 48, 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(pixels), 0, 0, 14 + len(head)) + head + pixels


def test_alpha_that_nobody_wrote() -> None:
    """Zeros alone in the formats that have a fourth byte anyway; elsewhere they mean what they say."""
    clear = Image.fromarray(np.dstack([NOISE, np.zeros(NOISE.shape[:2], np.uint8)]))
    for data, suffix in ((bmp_with_mask(0), ""), (saved(clear, "TGA"), ".tga"), (bmp_with_mask(0)[14:], ".dib")):
        for channels in (3, 4):
            image = load_image(data, suffix=suffix, channels=channels)
            assert np.array_equal(np.asarray(image)[..., :3], NOISE), suffix
            assert image.info["remarks"] == [("guessed", UNUSED_ALPHA)]
            assert channels == 3 or image.getchannel("A").getextrema() == (255, 255)
    assert remarks(bmp_with_mask(128)) == [("replaced", LAID)] and remarks(bmp_with_mask(255)) == []
    with pytest.raises(UserError, match="fully transparent") as caught:
        load_image(saved(clear))
    assert "--ignore-alpha" in caught.value.hint
    image = load_image(saved(clear), ignore_alpha=True)
    assert np.array_equal(np.asarray(image), NOISE) and image.info["remarks"] == []


def test_colour_that_nobody_sees_is_zero() -> None:
    """So that a model of four channels need not learn it; what is seen stays exact."""
    pixels = np.dstack([NOISE, np.where(NOISE[..., 0] < 100, 0, 7)]).astype(np.uint8)
    found = np.asarray(load_image(saved(Image.fromarray(pixels)), channels=4))
    assert np.array_equal(found, np.where(pixels[..., 3:] == 0, 0, pixels))
