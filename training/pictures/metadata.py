"""A picture's metadata, as far as its pixels need them: the turn, the colour signalling, HDR and further views."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from PIL import Image

from training.ledger import Effect

Remarks = list[tuple[Effect, str]]

UNREADABLE = "metadata that cannot be read"
GAIN_MAP = "HDR gain map, the standard picture taken"
HDR = "HDR signal (PQ or HLG), its numbers taken as sRGB"
WIDE = "wide-gamut signal without a profile, its numbers taken as sRGB"
VIEWS = "further views in one file, first taken"
TURNS = {
    turn: Image.Transpose(done) for turn, done in {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.items()
}  # EXIF's orientation -> what undoes it
COMPLAINT = re.compile(r"EXIF|[Mm]etadata|MPO|[Tt]runcated File Read|tag \d+")  # Pillow's warnings of metadata
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"tIME", b"pHYs", b"sPLT", b"hIST", b"bKGD", b"sBIT", b"gAMA", b"cHRM", b"sRGB")
PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT")
ITEMS = re.compile(rb"(infe.{8})(?:Exif|mime)", re.DOTALL)
GAIN_MARKS = (b"hdrgm:", b"HDRGainMap", b"hdrgainmap", b"urn:iso:std:iso:ts:21496")


def turn_of(image: Image.Image, remarks: Remarks) -> Image.Transpose | None:
    """How the picture is turned upright by its metadata; None where they ask for nothing or cannot be read.

    Pillow's own function also writes the metadata anew, which fails on many that can be read.
    """
    try:
        turn = image.getexif().get(0x0112, 1)
    except Exception:  # its readers raise what they like on odd metadata
        remarks.append(("ignored", UNREADABLE))
        return None
    if not isinstance(turn, int) or not 0 <= turn <= 8:
        remarks.append(("ignored", UNREADABLE))
        return None
    return TURNS.get(turn)


def signalled(data: bytes, image: Image.Image) -> Remarks:
    """What a file says of HDR, wide colour and further views that is not followed here."""
    remarks: Remarks = []
    holds_maps = data[4:8] == b"ftyp" or data.startswith(b"\xff\xd8")
    if holds_maps and (any(mark in data for mark in GAIN_MARKS) or b"tmap" in data[:64]):
        remarks.append(("ignored", GAIN_MAP))
    elif image.format == "MPO" and _views(image):
        remarks.append(("ignored", VIEWS))
    primaries, transfer = _coding(data)
    if transfer in (16, 18):
        remarks.append(("guessed", HDR))
    elif primaries in (9, 11, 12) and not image.info.get("icc_profile"):
        remarks.append(("guessed", WIDE))
    return remarks


def _coding(data: bytes) -> tuple[int, int]:
    """Colour primaries and transfer by the numbers of ITU-T H.273, of PNG's cICP or HEIF's colr box; 0 for unsaid."""
    if data.startswith(b"\x89PNG"):
        for kind, at, size in _png_chunks(data):
            if kind == b"cICP" and size == 4:
                return data[at + 8], data[at + 9]
            if kind == b"IDAT":
                break
    elif data[4:8] == b"ftyp" and (at := data.find(b"colrnclx", 0, 1 << 16)) >= 0 and len(data) >= at + 12:
        return struct.unpack(">HH", data[at + 8 : at + 12])
    return 0, 0


def _views(image: Image.Image) -> bool:
    """Whether an MPO file holds more than the picture and its previews."""
    try:
        kinds = [entry["Attribute"]["MPType"] for entry in image.mpinfo[0xB002]]
    except (AttributeError, KeyError, TypeError):
        return False
    return any("Thumbnail" not in kind for kind in kinds[1:])


def without(data: bytes, all_of_it: bool) -> bytes | None:
    """A PNG or JPEG without texts, or these, AVIF and HEIF without all that is neither pixels nor transparency; None
    where nothing goes."""
    try:
        if data.startswith(b"\x89PNG"):
            kept = _png_without(data, all_of_it)
        elif data.startswith(b"\xff\xd8"):
            kept = _jpeg_without(data, all_of_it)
        elif data[4:8] == b"ftyp":  # AVIF and HEIF: their Exif and XMP items under a type that nobody knows
            kept = ITEMS.sub(rb"\1skip", data) if all_of_it else data
        else:
            return None
    except (IndexError, struct.error):
        return None
    return kept if kept != data else None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, place, bytes of content) of each chunk whose head is there."""
    at = 8
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        yield kind, at, size
        at += 12 + size


def _png_without(data: bytes, all_of_it: bool) -> bytes:
    parts = [data[:8]]
    for kind, at, size in _png_chunks(data):
        if kind in PIXELS or not (all_of_it or kind in TEXTS):
            parts.append(data[at : at + 12 + size])
    return b"".join(parts)


def _jpeg_without(data: bytes, all_of_it: bool) -> bytes:
    """Segments before the scan: kept are JFIF, Adobe's and the tables; EXIF and the profile unless all go."""
    parts, at = [data[:2]], 2
    while data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, (size,) = data[at + 1], struct.unpack(">H", data[at + 2 : at + 4])
        body = data[at + 4 : at + 2 + size]
        extra = 0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE) or (marker == 0xE0 and len(body) < 14)
        needed = not all_of_it and (body.startswith((b"Exif\0", b"ICC_PROFILE\0")))
        if not extra or needed:
            parts.append(data[at : at + 2 + size])
        at += 2 + size
    return b"".join([*parts, data[at:]])
