from __future__ import annotations

import io
import struct
import zlib
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from training.errors import UserError
from training.pictures.decoding import encode_png, fit, load_image

GRADIENT = np.stack(np.broadcast_arrays(np.arange(24)[:, None] * 10, np.arange(16) * 15, 60), axis=-1).astype(np.uint8)


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def error(data: bytes, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_image(data, **how)
    assert caught.value.code == 3 and "\n" not in caught.value.what
    return caught.value.what


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(turn: int) -> None:
    image = Image.fromarray(GRADIENT)
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]  # the transposition that each orientation undoes
    exif = Image.Exif()
    exif[0x0112] = turn
    turned = image if stored is None else image.transpose(Image.Transpose(stored))
    assert np.array_equal(np.asarray(load_image(saved(turned, exif=exif))), GRADIENT)


def test_modes() -> None:
    image = Image.fromarray(GRADIENT)
    assert np.array_equal(np.asarray(load_image(encode_png(GRADIENT))), GRADIENT)
    for data in (saved(image.convert("CMYK"), "TIFF"), saved(image.convert("CMYK"), "JPEG", quality=100)):
        assert np.abs(np.asarray(load_image(data)).astype(int) - GRADIENT).mean() < 3
    grey = np.asarray(image.convert("L"))
    sixteen = grey.astype(np.uint16) * 257
    for data, limits in (
        (saved(Image.fromarray(sixteen)), None),
        (saved(Image.fromarray(grey / np.float32(255)), "TIFF"), (0, 1)),
        (saved(Image.fromarray(grey)), None),
    ):
        assert np.array_equal(np.asarray(load_image(data, limits=limits))[..., 1], grey)
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(np.asarray(load_image(saved(lab, "TIFF"))).astype(int) - GRADIENT).mean() < 3


def test_transparency_is_laid_on_the_background() -> None:
    layer = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    layer.putpixel((0, 0), (255, 0, 0, 255))
    for data in (saved(layer), saved(layer, "TIFF"), saved(layer, "WEBP", lossless=True)):
        assert load_image(data, "blue").getpixel((3, 3)) == (0, 0, 255)
    assert load_image(saved(layer)).getpixel((3, 3)) == (255, 255, 255)
    assert load_image(saved(layer), "#000000").getpixel((0, 0)) == (255, 0, 0)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert load_image(saved(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert "fully transparent" in error(saved(Image.new("LA", (4, 4), (9, 0))))


def test_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert load_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0))[1:] == (0, 0)
    assert load_image(saved(frames[0], "TIFF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


def bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_broken_pictures_are_refused_with_a_reason() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = saved(noise, form)
        assert any(word in error(data[: len(data) // 2]) for word in ("truncated", "broken", "known format")), form
    assert error(b"") == "empty file (0 bytes)"
    assert error(b"just some text") == "not an image of a known format"
    assert "too many pixels" in error(bomb())
    assert "pillow-heif" in error(b"\0\0\0\x18ftypheic" + bytes(40))
    assert error(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image of a known format"
    for value in (np.nan, np.inf):
        spoilt = np.full((4, 4), 0.5, np.float32)
        spoilt[1, 2] = value
        assert error(saved(Image.fromarray(spoilt), "TIFF"), limits=(0, 1)) == "pixels that are not finite"
    damaged = bytearray(saved(noise, "PNG"))
    damaged[200:220] = bytes(20)
    assert "broken" in error(bytes(damaged)) or "truncated" in error(bytes(damaged))


def test_fit() -> None:
    wide = Image.fromarray(np.tile(GRADIENT, (4, 12, 1)))
    assert fit(wide, 32).size == (32, 32)
    assert fit(wide, 32, "random", Random(1)).tobytes() == fit(wide, 32, "random", Random(1)).tobytes()
    assert fit(wide, 32, "random", Random(1)).tobytes() != fit(wide, 32, "random", Random(2)).tobytes()
    with pytest.raises(UserError, match=r"too small \(192x96 < 128"):
        fit(wide, 128)
    assert fit(wide, 128, upscale=True).size == (128, 128)
    with pytest.raises(UserError, match="too narrow"):
        fit(Image.new("RGB", (5000, 100)), 64)
