"""Brightness goes by the type of the numbers or by --range: never by the picture's own maximum."""

from __future__ import annotations

import io
import shlex
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.doors.make_shards import main
from training.errors import UserError
from training.pictures.decoding import load_image
from training.pictures.depths import DARK, OUTSIDE, ROUNDED
from training.shards.reading import ShardSet

RAMP = np.tile(np.linspace(0, 1, 96), (80, 1))
UNREAD = {("u4", ">"), ("f8", "<"), ("f8", ">")}  # by some Pillow
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by the kind of a PNG
CODES = {"u": 1, "i": 2, "f": 3}  # sample formats of a TIFF


def tiff(values: np.ndarray, order: str = "<") -> bytes:
    """An uncompressed grey TIFF of any type and byte order, written by hand."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = [(256, width), (257, height), (258, 8 * values.itemsize), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, height), (279, len(data)), (339, CODES[values.dtype.kind])]  # fmt: skip
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    return head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def grey(data: bytes, **how: Any) -> np.ndarray:
    return np.asarray(load_image(data, channels=1, **how)).astype(int)


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("top", [200, 400, 4095, 65535])
def test_sixteen_bits_mean_the_same_in_every_picture(order: str, top: int) -> None:
    """255 v / 65535, whatever the byte order and the greatest value."""
    values = (RAMP * top).astype(np.uint16)
    for data in (tiff(values, order), png(values)):
        assert np.array_equal(grey(data), (values * (255 / 65535) + 0.5).astype(int))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["i2", "i4", "u4", "f4", "f8"])
def test_other_types_take_the_range_that_is_given(kind: str, order: str) -> None:
    """255 (v − low) / (high − low), clipped; the same for every type and byte order."""
    values = np.round(RAMP * 3000).astype(kind)
    wanted = ((values.astype(float) - 100).clip(0) * (255 / 2900) + 0.5).clip(0, 255).astype(int)
    try:
        found = grey(tiff(values, order), limits=[100, 3000])
    except UserError as refused:  # a type that this Pillow does not read in this order is refused by name
        assert (kind, order) in UNREAD and "TIFF of a kind that is not read" in refused.what
        return
    assert np.array_equal(found, wanted)


def test_unsigned_thirty_two_bits_do_not_turn_negative() -> None:
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32).repeat(9, 0)
    assert grey(tiff(values), limits=[0, 2**32 - 1])[0].tolist() == [0, 128, 255]
    signed = np.array([[-100, 0, 155]], np.int16).repeat(9, 0)
    assert grey(tiff(signed), limits=[-100, 155])[0].tolist() == [0, 100, 255]


def test_float_beyond_one_is_white_not_black() -> None:
    """0..1 with a maximum of 1.02, which once divided the whole picture by 255."""
    values = (RAMP * 1.02).astype(np.float32)
    image = load_image(tiff(values), limits=[0, 1])
    assert np.array_equal(np.asarray(image)[..., 0], (values.astype(float) * 255 + 0.5).clip(0, 255).astype(int))
    assert image.info["remarks"] == [("cut", OUTSIDE)]
    assert load_image(tiff(values / 2), limits=[0, 1]).info["remarks"] == []


@pytest.mark.parametrize(("values", "kind", "found", "proposed"), [
    ((RAMP * 1.02).astype("f4"), "float32", "0 to 1.02", "0 1"),
    ((RAMP * 255).astype("f4"), "float32", "0 to 255", "0 255"),
    ((RAMP * 3000 - 5).astype("i4"), "int32", "-5 to 2995", "-5 2995"),
    ((RAMP * 9 - 4).astype("i2"), "int16", "-4 to 5", "-4 5"),
    ((RAMP * 4e9).astype("u4"), "uint32", "0 to 4e+09", "0 4000000000"),
    (np.full((80, 96), 7.5, "f4"), "float32", "7.5 to 7.5", "7.5 8.5"),
    ((RAMP * 2e9 - 1e9).astype("i4"), "int32", "-1e+09 to 1e+09", "-1000000000 1000000000"),
])  # fmt: skip
def test_without_a_range_the_hint_names_one_that_works(
    values: np.ndarray, kind: str, found: str, proposed: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tif").write_bytes(tiff(values))
    words = ["pack", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--missing-caption", "empty"]
    with pytest.raises(UserError) as caught:
        main(words)
    assert caught.value.code == 3
    assert caught.value.what == f"a.tif: nothing says what is black and white in {kind} (found {found})"
    flag = f"--range {proposed}"
    assert f"pack with {flag}," in caught.value.hint
    main([*words, *shlex.split(flag), "--val-fraction", "0"])
    packed = ShardSet(tmp_path / "out")
    assert len(packed) == 1 and packed.summary["settings"]["range"] == [float(part) for part in proposed.split()]
    main([*words, *shlex.split(flag), "--val-fraction", "0"])  # which is known again


def test_dark_pictures_are_told_of() -> None:
    """Twelve bits in sixteen; a range that is given says that it is meant."""
    values = (RAMP * 4095).astype(np.uint16)
    assert load_image(png(values)).info["remarks"] == [("cut", ROUNDED), ("guessed", DARK)]
    assert load_image(png(values * 2)).info["remarks"] == [("cut", ROUNDED)]
    assert load_image(png(values), limits=[0, 4095]).info["remarks"] == []
    assert grey(png(values), limits=[0, 4095]).max() == 255


@pytest.mark.parametrize("kind", [0, 2, 4, 6])  # of a PNG: grey, colours, and each with transparency
def test_more_than_eight_bits_are_told_of(kind: int) -> None:
    """Of colours too, of which Pillow keeps eight by itself."""
    for bits, told in ((16, [("cut", ROUNDED)]), (8, [])):
        rows = b"".join(b"\0" + b"\x80" * (8 * bits // 8 * CHANNELS[kind]) for _ in range(8))
        head, parts = struct.pack(">IIBBBBB", 8, 8, bits, kind, 0, 0, 0), b""
        for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            parts += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        image = load_image(b"\x89PNG\r\n\x1a\n" + parts)
        assert [remark for remark in image.info["remarks"] if remark[0] == "cut"] == told
    buffer = io.BytesIO()  # five bits a channel are fewer
    Image.new("RGB", (8, 8)).save(buffer, "BMP")
    plain = buffer.getvalue()
    narrow = plain[:28] + struct.pack("<H", 16) + plain[30:54] + plain[54 : 54 + 128]
    assert load_image(narrow).info["remarks"] == []


def test_a_turn_does_not_change_the_type() -> None:
    """A turned picture is no longer a TIFF, whose tags tell the type."""
    exif = Image.Exif()
    exif[0x0112] = 3
    buffer = io.BytesIO()
    Image.fromarray((RAMP * 3000).astype(np.int32)).save(buffer, "TIFF", exif=exif)
    upright = grey(tiff((RAMP * 3000).astype("i4")), limits=[0, 3000])
    assert np.array_equal(grey(buffer.getvalue(), limits=[0, 3000])[::-1, ::-1], upright)
    with pytest.raises(UserError, match="int32"):
        load_image(buffer.getvalue())


def test_sixteen_bits_keep_their_transparent_number() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[7, 65535]], np.uint16).repeat(2, 0)).save(buffer, "PNG", transparency=7)
    assert np.asarray(load_image(buffer.getvalue(), "red"))[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert np.asarray(load_image(buffer.getvalue(), channels=4))[0].tolist() == [[0, 0, 0, 0], [255] * 4]


def test_a_type_that_is_not_read_is_named() -> None:
    with pytest.raises(UserError) as caught:
        load_image(tiff(RAMP.astype(np.float16)))
    assert caught.value.what == "TIFF of a kind that is not read (1 x 16 bits, float)"
    assert "16 bits" in caught.value.hint
