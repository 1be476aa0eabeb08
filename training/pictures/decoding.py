"""Any picture file to an upright 8-bit RGB picture of the wanted size, or one sentence that says why not."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError

from training.errors import USAGE, UserError
from training.pictures import depths
from training.pictures.formats import (
    BARE,
    LARGEST_FILE,
    SUFFIXES,
    Unusable,
    formats,
    read_file,
    refuse,
    size_words,
    unknown,
)
from training.pictures.metadata import COMPLAINT, UNREADABLE, Remarks, signalled, turn_of, without

__all__ = ["LARGEST_FILE", "SUFFIXES", "Unusable", "read_file", "refuse"]  # of formats, for those who pack

MAX_PIXELS = 100_000_000  # refused before decoding: a file of 100 kB can claim gigabytes
MOST_PIXELS = 178_000_000  # that MAX_PIXELS may be raised to: there Pillow's own guard stands, which is never lifted
HEAVY = {"JPEG2000": 2}  # decoders that hold 24 bytes a pixel; others, with all conversions, 17 at most
ROWS = 1 << 20  # pixels laid on the background at once, for copies of the whole picture take gigabytes
MODES: dict[int, str] = {1: "L", 3: "RGB", 4: "RGBA"}  # by channels
ALPHA_UNUSED = ("BMP", "DIB", "TGA", "ICO")  # where zeros alone say no more than that nobody wrote the fourth byte
Crop = Literal["center", "random"]
ANIMATED = "animated picture, first frame taken"
PROFILE = "colour profile that cannot be used, numbers as they are"
INKS = "CMYK without a colour profile"
UNUSED_ALPHA = "transparency of zeros alone, taken as unused"
LAID = "transparency, laid on the background"
SMALLER = "make it smaller first"


def load_image(
    source: bytes | Path,
    background: str = "white",
    max_pixels: int = MAX_PIXELS,
    *,
    channels: int = 3,
    limits: Sequence[float] | None = None,
    ignore_alpha: bool = False,
    suffix: str = "",
) -> Image.Image:
    """The picture as upright sRGB, 8 bits: EXIF turn done, transparency laid on `background`, first frame of an
    animation; grey for 1 of `channels`, RGBA as it is for 4, its colour 0 where nothing of it is seen.

    CMYK, Lab, palette, grey, 16-bit and float pictures are converted, embedded colour profiles applied. Of grey wider
    than 8 bits, `limits` say what is black and white. `ignore_alpha` takes all as opaque. `suffix` is of the file's
    name, for formats without a mark. Nothing of the file's metadata is kept; `info["animated"]` says whether it has
    more frames, `info["deep"]` whether its numbers were wider than 8 bits, `info["remarks"]` lists (effect, kind) of
    what was not used as it was given, for the ledger.
    Raises UserError(code 3) with a one-sentence reason for what is broken, too large, of no known format, of numbers
    that nothing gives a range, or all transparent.
    """
    data = source if isinstance(source, bytes) else read_file(source, LARGEST_FILE)
    if not data:
        raise refuse("empty file (0 bytes)")
    bare = (BARE[suffix.lower()],) if suffix.lower() in BARE else ()
    return _decoded(data, max_pixels, formats() + bare, _Wanted(background, channels, limits, ignore_alpha))


@dataclass(frozen=True)
class _Wanted:
    background: str
    channels: int
    limits: Sequence[float] | None
    ignore_alpha: bool


def _decoded(data: bytes, max_pixels: int, known: tuple[str, ...], wanted: _Wanted) -> Image.Image:
    """The picture; where it cannot be read, from the file with less and less metadata."""
    first: UserError | None = None
    for attempt in _attempts(data):
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")  # Pillow warns of size, which the cap judges, and of odd metadata
                image = _finished(_open(attempt, max_pixels, known), data, wanted)
        except UserError:
            raise
        except UnidentifiedImageError:
            first = first or unknown(data)
        except Image.DecompressionBombError:
            raise _too_many(max_pixels) from None
        except Exception as error:  # a dozen decoders raise what they like on damaged files
            first = first or _broken(data, error)
        else:
            if first or any(COMPLAINT.search(str(warning.message)) for warning in heard):
                image.info["remarks"].append(("ignored", UNREADABLE))
            return image
    assert first is not None
    raise first from None


def _attempts(data: bytes) -> Iterator[bytes]:
    """The file; without texts; without all metadata."""
    yield data
    for all_of_it in (False, True):
        if (less := without(data, all_of_it)) is not None:
            yield less


def _finished(image: Image.Image, data: bytes, wanted: _Wanted) -> Image.Image:
    """The opened picture as it is wanted."""
    # A phone's JPEG holds a preview or a depth map beside the picture.
    animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))
    remarks: Remarks = [("cut", ANIMATED)] if animated else []
    remarks += [("cut", depths.ROUNDED)] if depths.wide(image) and wanted.limits is None else []
    image.load()
    remarks += signalled(data, image)
    unused, turn = image.format in ALPHA_UNUSED, turn_of(image, remarks)
    if deep := depths.deep(image):
        image = depths.eight_bits(image, wanted.limits, remarks)
    image = _to_mode(image if turn is None else image.transpose(turn), wanted, unused, remarks)
    # No more: a profile holds the time it was made, which would be other bytes for each packing.
    image.info = {"animated": animated, "deep": deep, "remarks": list(dict.fromkeys(remarks))}
    return image


def _broken(data: bytes, error: Exception) -> Unusable:
    if "truncated" in str(error).lower():
        return refuse(f"truncated image ({size_words(len(data))}, the rest is missing)")
    return refuse(f"broken image ({size_words(len(data))}: {error})")


def _too_many(limit: int, image: Image.Image | None = None) -> Unusable:
    """The error for more than `limit` pixels, with the flag that helps where one does."""
    hint, shown = SMALLER, ""
    if image:
        times = HEAVY.get(image.format or "", 1)
        shown = f"{image.width}x{image.height}{f' in {image.format}, where each counts {times}-fold' * (times > 1)}; "
        if (needed := image.width * image.height * times) <= MOST_PIXELS:
            hint = f"--max-pixels {needed} decodes it"
    what = f"too many pixels ({shown}at most {limit:,} are decoded)"
    return refuse(what, f"{hint}; --max-pixels goes up to {MOST_PIXELS}", SMALLER)


def _open(data: bytes, max_pixels: int, known: tuple[str, ...]) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=known)
    if image.width * image.height * HEAVY.get(image.format or "", 1) > max_pixels:
        raise _too_many(max_pixels, image)
    return image


def _to_mode(image: Image.Image, wanted: _Wanted, unused: bool, remarks: Remarks) -> Image.Image:
    """8-bit sRGB of the channels wanted. `unused`: writers of the format leave the fourth byte unused."""
    transparent = image.has_transparency_data
    image = _managed_colours(image, transparent, remarks)
    if transparent:
        image = _opaque(_as(image, "RGBA"), wanted, unused, remarks)
    return _as(image, MODES[wanted.channels])


def _as(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which copies even where nothing changes


def _opaque(image: Image.Image, wanted: _Wanted, unused: bool, remarks: Remarks) -> Image.Image:
    """An RGBA picture laid on the background; with its transparency where four channels are wanted."""
    least, most = image.getchannel("A").getextrema()
    if wanted.ignore_alpha or (most == 0 and unused):
        remarks += [] if wanted.ignore_alpha else [("guessed", UNUSED_ALPHA)]
        image.putalpha(255)
        return image
    if wanted.channels == 4:
        image.paste((0, 0, 0, 0), mask=image.getchannel("A").point([255] + [0] * 255))
        return image
    if most == 0:
        hint = "--ignore-alpha takes the colours of all pictures as opaque"
        raise refuse("fully transparent image", hint, "save it without transparency")
    remarks += [("replaced", LAID)] if least < 255 else []
    return _flat(image, background_colour(wanted.background))


def _managed_colours(image: Image.Image, transparent: bool, remarks: Remarks) -> Image.Image:
    """The picture in sRGB by its profile, if it has one that can be used."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("P", "PA", "LA"):
        image = image.convert("RGBA" if transparent else "RGB")
    if image.mode == "LAB":
        return _managed(image, ImageCms.createProfile("LAB"))
    if profile and image.mode in ("RGB", "RGBA", "CMYK", "L"):
        try:
            return _managed(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except (ImageCms.PyCMSError, OSError, TypeError):
            remarks.append(("ignored", PROFILE))  # a damaged one, or one of other channels
    elif image.mode == "CMYK":
        remarks.append(("guessed", INKS))
    return image


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes from top to bottom."""
    rows = max(1, ROWS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _flat(layer: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """An RGBA picture laid on a colour."""
    result = Image.new("RGB", layer.size)
    for box in _strips(layer):
        part = layer.crop(box)
        result.paste(Image.alpha_composite(Image.new("RGBA", part.size, colour), part).convert("RGB"), box)
    return result


def background_colour(name: str) -> tuple[int, int, int]:
    """The RGB of a colour's name or #rrggbb. Raises UserError(code 2) for others."""
    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError:
        raise UserError(
            f"--background: {name!r} is not a colour", hint="a name such as white, or #rrggbb", code=USAGE
        ) from None
    return red, green, blue


def _managed(image: Image.Image, profile: ImageCms.ImageCmsProfile | ImageCms.core.CmsProfile) -> Image.Image:
    """The picture converted from its colour profile to sRGB."""
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    if converted is None:
        raise OSError("no conversion")
    return converted


def fit(
    image: Image.Image,
    resolution: int | tuple[int, int],
    crop: Crop = "center",
    rng: Random | None = None,
    upscale: bool = False,
) -> Image.Image:
    """A square of `resolution`, or its (height, width): resized (Lanczos, anti-aliased) to cover it, the rest cropped.

    `rng` places a random crop. Raises UserError(code 3) where the picture is smaller, unless `upscale`.
    """
    rows, columns = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    if image.size == (columns, rows):
        return image
    box = cut_box(image.size, (rows, columns), crop, rng, upscale)
    return image.resize((columns, rows), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def cut_box(
    size: tuple[int, int],
    target: tuple[int, int],
    crop: Crop = "center",
    rng: Random | None = None,
    upscale: bool = False,
) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) of a picture of `size` (width, height) that `fit` takes for `target` (height,
    width): the largest of its ratio. Raises as `fit` does."""
    (width, height), (rows, columns) = size, target
    if (width < columns or height < rows) and not upscale:
        wanted = rows if rows == columns else f"{columns}x{rows}"
        raise refuse(f"too small ({width}x{height} < {wanted})", "--upscale enlarges it")
    if max(size) > 20 * min(size):
        raise refuse(f"too narrow ({width}x{height}; at most 20 to 1)", "cut it into several pictures")
    across_box, down_box = min(width, height * columns / rows), min(height, width * rows / columns)
    across, down = (rng.random(), rng.random()) if crop == "random" and rng else (0.5, 0.5)
    left, top = round(across * (width - across_box)), round(down * (height - down_box))
    # Rounding may pass the edge by half a pixel where the box is not of whole ones.
    left, top = min(left, int(width - across_box)), min(top, int(height - down_box))
    return left, top, left + across_box, top + down_box


def encode_png(image: Image.Image | NDArray[np.uint8]) -> bytes:
    """PNG bytes of a picture or a uint8 array (H, W), (H, W, 3) or (H, W, 4); fastest compression, exact."""
    return _encode(image, "PNG", compress_level=1)


def encode_jpg(image: Image.Image | NDArray[np.uint8]) -> bytes:
    """JPEG bytes at quality 95 with full colour resolution."""
    return _encode(image, "JPEG", quality=95, subsampling=0)


def _encode(image: Image.Image | NDArray[np.uint8], form: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, form, **options)
    return buffer.getvalue()
