"""Any picture file to an upright 8-bit RGB picture of the wanted size, or one sentence that says why not."""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path
from random import Random
from stat import S_ISREG
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from training.errors import DATA, USAGE, UserError

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jp2"),
    *(".heic", ".heif"),
)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "HEIF")  # none starts a program
MAX_PIXELS = 100_000_000  # refused before decoding: a file of 100 kB can claim gigabytes
MOST_PIXELS = 178_000_000  # that MAX_PIXELS may be raised to: there Pillow's own guard stands, which is never lifted
LARGEST_FILE = 256 << 20  # bytes of a picture's file
HEIC = "HEIC needs: pip install pillow-heif"
RAW = (".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2")
ELSEWHERE = {".svg": "SVG is a drawing, not a picture", **dict.fromkeys(RAW, "RAW is not developed here")}
Crop = Literal["center", "random"]


class Unusable(UserError):
    """A picture that cannot be used, for a reason that starts with a few words fit for counting."""


def refuse(reason: str) -> Unusable:
    """The error for `reason`."""
    return Unusable(reason, code=DATA)


def load_image(source: bytes | Path, background: str = "white", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as upright sRGB, 8 bits: EXIF turn done, transparency laid on `background`, first frame of an
    animation.

    CMYK, Lab, palette, grey, 16-bit and float pictures are converted, embedded colour profiles applied. Nothing of the
    file's metadata is kept; `info["animated"]` says whether it has more frames.
    Raises UserError(code 3) with a one-sentence reason for what is broken, too large, of no known format or all
    transparent.
    """
    data = source if isinstance(source, bytes) else read_file(source, LARGEST_FILE)
    if not data:
        raise refuse("empty file (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of size, which the cap judges, and of odd metadata
            image = _open(data, max_pixels)
            # A phone's JPEG holds a preview or a depth map beside the picture.
            animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))
            image.load()
            image = _to_rgb(ImageOps.exif_transpose(image), background)
            image.info = {"animated": animated}  # a profile holds the time it was made: other bytes for each packing
            return image
    except UnidentifiedImageError:
        heic = data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"hevc")
        raise refuse(HEIC if heic else "not an image of a known format") from None
    except Image.DecompressionBombError:
        raise refuse(f"too many pixels (at most {max_pixels:,} are decoded)") from None
    except UserError:
        raise
    except Exception as error:  # a dozen decoders raise what they like on damaged files
        if "truncated" in str(error).lower():
            raise refuse(f"truncated image ({_size(len(data))}, the rest is missing)") from None
        raise refuse(f"broken image ({_size(len(data))}: {error})") from None


def read_file(path: Path, limit: int) -> bytes:
    """A regular file's bytes. Raises UserError(code 3) for pipes and devices, which would hold us up, and beyond
    `limit` bytes."""
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            raise refuse("unreadable file (not a regular file)")
        if status.st_size > limit:
            raise refuse(f"file too large ({_size(status.st_size)}; at most {_size(limit)} are read)")
        return path.read_bytes()
    except OSError as error:
        raise refuse(f"unreadable file ({error.strerror})") from None


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with, HEIF where pillow-heif is installed."""
    Image.init()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=_formats())
    if image.width * image.height > max_pixels:
        raise refuse(f"too many pixels ({image.width}x{image.height}; at most {max_pixels:,} are decoded)")
    return image


def _size(count: int) -> str:
    return f"{count:,} bytes" if count < 10_000 else f"{count // 1000:,} kB"


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    profile = image.info.get("icc_profile")
    transparent = image.has_transparency_data
    if profile and image.mode in ("P", "PA", "LA"):
        image = image.convert("RGBA" if transparent else "RGB")
    if image.mode == "LAB":
        image = _managed(image, ImageCms.createProfile("LAB"))
    elif profile and image.mode in ("RGB", "RGBA", "CMYK", "L"):
        try:
            image = _managed(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile: the numbers as they are
    if not transparent:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema()[1] == 0:
        raise refuse("fully transparent image")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background_colour(background)), layer).convert("RGB")


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


def _eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """16-bit, 32-bit and float grey to 8 bits, the range told from type and greatest value."""
    numbers = values.astype(np.float64)
    top = float(numbers.max())
    if not np.isfinite(numbers).all():
        raise refuse("pixels that are not finite")
    if values.dtype == np.uint16:
        white = 65535.0
    elif values.dtype.kind == "f":
        white = 1.0 if top <= 1 else max(255.0, top)
    else:
        white = next(limit for limit in (255.0, 65535.0, 2.0**32) if top <= limit)
    return (numbers.clip(0) * (255 / white) + 0.5).clip(0, 255).astype(np.uint8)


def fit(
    image: Image.Image, resolution: int, crop: Crop = "center", rng: Random | None = None, upscale: bool = False
) -> Image.Image:
    """A square of `resolution`: the shorter side resized (Lanczos, anti-aliased), the longer cropped.

    `rng` places a random crop. Raises UserError(code 3) where the picture is smaller, unless `upscale`.
    """
    if image.size == (resolution, resolution):
        return image
    shorter = min(image.size)
    if shorter < resolution and not upscale:
        raise refuse(f"too small ({image.width}x{image.height} < {resolution}; --upscale takes it)")
    if max(image.size) > 20 * shorter:
        raise refuse(f"too narrow ({image.width}x{image.height}; at most 20 to 1)")
    spare_x, spare_y = image.width - shorter, image.height - shorter
    across, down = (rng.random(), rng.random()) if crop == "random" and rng else (0.5, 0.5)
    left, top = round(across * spare_x), round(down * spare_y)
    box = (left, top, left + shorter, top + shorter)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def encode_png(image: Image.Image | NDArray[np.uint8]) -> bytes:
    """PNG bytes of a picture or a uint8 array (H, W, 3); the fastest compression, the pixels exact."""
    return _encode(image, "PNG", compress_level=1)


def encode_jpg(image: Image.Image | NDArray[np.uint8]) -> bytes:
    """JPEG bytes at quality 95 with full colour resolution."""
    return _encode(image, "JPEG", quality=95, subsampling=0)


def _encode(image: Image.Image | NDArray[np.uint8], form: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, form, **options)
    return buffer.getvalue()
