"""Which picture files are read, by suffix and by their first bytes, and which are refused by name with a next step."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from stat import S_ISREG

from PIL import Image

from training.commands import door
from training.errors import DATA, UserError

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jp2"),
    *(".heic", ".heif", ".jfif", ".jpe", ".jif", ".mpo", ".apng", ".pnm", ".pbm", ".pfm", ".tga", ".dib", ".ico"),
    *(".qoi", ".j2k", ".j2c", ".jpf", ".jpx", ".jxl", ".hif", ".avifs"),
)
FIELDS = tuple(suffix[1:] for suffix in SUFFIXES)  # as shards name them; where there is a choice, the first
# None starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "HEIF", "ICO", "QOI", "JXL")
BARE = {".tga": "TGA", ".dib": "DIB"}  # files that begin with no mark of their format: tried where the suffix says so
PLUGINS = {"HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}
LARGEST_FILE = 256 << 20  # bytes of a picture's file
SAVE_AS = "save it as PNG or JPEG"
RAW = (".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef", ".srw", ".x3f", ".3fr", ".iiq")
LAYERED = {".psd": "Photoshop", ".psb": "Photoshop", ".xcf": "GIMP", ".kra": "Krita", ".clip": "Clip Studio"}
# HDR light has no white: which of it is shown is a choice that whoever made the picture must make.
LINEAR = {".exr": "OpenEXR", ".hdr": "Radiance HDR", ".rgbe": "Radiance HDR", ".jxr": "JPEG XR", ".wdp": "JPEG XR"}
UNREAD = {".jls": "JPEG-LS", ".dds": "DDS", ".pcx": "PCX", ".sgi": "SGI", ".xpm": "XPM", ".xbm": "XBM", ".cur": "CUR",
          ".icns": "ICNS", ".dcm": "DICOM", ".fits": "FITS", ".ras": "Sun raster", ".bpg": "BPG", ".flif": "FLIF",
          ".wmf": "WMF", ".emf": "EMF", ".eps": "EPS", ".ai": "Illustrator"}  # fmt: skip
ELSEWHERE = {
    **dict.fromkeys((".svg", ".svgz"), "SVG is a drawing, not a picture"),
    **dict.fromkeys(RAW, "RAW is not developed here"),
    **{suffix: f"{name} is not read ({SAVE_AS})" for suffix, name in {**LAYERED, **UNREAD}.items()},
    **{suffix: f"{name} is not read (tone-map it, and {SAVE_AS})" for suffix, name in LINEAR.items()},
}
# First bytes, and the suffix that says the same.
MARKS = (
    *((b"\x89PNG\r\n\x1a\n", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"GIF8", ".gif"), (b"II*\0", ".tif")),
    *((b"MM\0*", ".tif"), (b"II+\0", ".tif"), (b"MM\0+", ".tif"), (b"qoif", ".qoi"), (b"8BPS", ".psd")),
    *((b"\0\0\0\x0cjP  \r\n\x87\n", ".jp2"), (b"\xff\x4f\xff\x51", ".j2k"), (b"\x76\x2f\x31\x01", ".exr")),
    *((b"#?RADIANCE", ".hdr"), (b"#?RGBE", ".hdr"), (b"gimp xcf", ".xcf"), (b"DDS ", ".dds"), (b"II\xbc", ".jxr")),
    *((b"\xff\x0a", ".jxl"), (b"\0\0\0\x0cJXL \r\n\x87\n", ".jxl"), (b"\xff\xd8\xff\xf7", ".jls")),
)
BRANDS = {b"avif": ".avif", b"avis": ".avif", **dict.fromkeys((b"heic", b"heix", b"mif1", b"hevc", b"msf1"), ".heic")}


class Unusable(UserError):
    """A picture that cannot be used, for a reason that starts with a few words fit for counting.

    `otherwise`: what helps where the hint names a flag of packing, and pictures are not packed.
    """

    otherwise = ""


def refuse(reason: str, hint: str = "", otherwise: str = "") -> Unusable:
    """The error for `reason`."""
    problem = Unusable(reason, hint=hint, code=DATA)
    problem.otherwise = otherwise
    return problem


def size_words(count: int) -> str:
    """A file's size for people."""
    return f"{count:,} bytes" if count < 10_000 else f"{count // 1000:,} kB"


def read_file(path: Path, limit: int) -> bytes:
    """A regular file's bytes. Raises UserError(code 3) for pipes and devices, which would hold us up, and beyond
    `limit` bytes."""
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            raise refuse("unreadable file (not a regular file)")
        if status.st_size > limit:
            raise refuse(f"file too large ({size_words(status.st_size)}; at most {size_words(limit)} are read)")
        return path.read_bytes()
    except OSError as error:
        raise refuse(f"unreadable file ({error.strerror})") from None


@cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with, and those of `PLUGINS` that are installed."""
    Image.init()
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        importlib.import_module("pillow_jxl")  # which registers itself
    return tuple(name for name in FORMATS if name in Image.OPEN)


def suffix_of(head: bytes) -> str:
    """The suffix that goes with a file's first bytes; "" for those of no format known by name here."""
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], "")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    return max(((len(mark), suffix) for mark, suffix in MARKS if head.startswith(mark)), default=(0, ""))[1]


def unknown(data: bytes) -> Unusable:
    """The error for a file that no decoder takes: what it is by its first bytes, and what would help."""
    suffix = suffix_of(data[:32])
    for name, package in ((name, package) for name, (_, package) in PLUGINS.items() if name not in formats()):
        if suffix == {"HEIF": ".heic", "JXL": ".jxl"}[name]:
            said = {"HEIF": "HEIC", "JXL": "JPEG XL"}[name]
            return refuse(f"{said} needs: pip install {package}")
    if suffix in ELSEWHERE:
        return refuse(ELSEWHERE[suffix])
    if suffix == ".tif":
        return refuse(f"TIFF of a kind that is not read ({_tiff_kind(data)})", f"{SAVE_AS}, of 8 or 16 bits")
    return refuse("not an image of a known format")


def several_pictures(fields: Iterable[str]) -> str:
    """What is wrong with a sample of a shard that has these pictures."""
    return f"several pictures in one sample ({', '.join(sorted(fields))})"


def choose(directory: Path | None, fields: Iterable[str]) -> str:
    """What tells which of several pictures in each sample is the one."""
    flags = [f"--image-field {field}" for field in sorted(fields)]
    command = door("make_shards pack", f"{directory}/*.tar" if directory else "SOURCE")
    return f"{command} --output DIR {flags[0]} (or {' or '.join(flags[1:])})"


def unused(name: str, head: bytes) -> str | None:
    """Why a file that is not looked at as a picture is one all the same: by its suffix, or its first bytes. None: it is
    none."""
    path = PurePosixPath(name)
    if path.suffix.lower() in ELSEWHERE:
        return ELSEWHERE[path.suffix.lower()]
    found = suffix_of(head[:32])
    if found in SUFFIXES:
        return f"picture under a suffix that is not read (it is {found[1:].upper()}: name it {path.stem}{found})"
    return ELSEWHERE.get(found)


def _tiff_kind(data: bytes) -> str:
    """Samples a pixel, their bits and kind, as far as a TIFF's own tags say so."""
    from io import BytesIO

    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    try:
        tags = ImageFileDirectory_v2(data[:8])
        file = BytesIO(data)
        file.seek(tags.next)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags.load(file)
        bits, kind = tags.get(258, (1,)), tags.get(339, (1,))[0]
        return f"{tags.get(277, 1)} x {bits[0]} bits, {({1: 'unsigned', 2: 'signed', 3: 'float'}).get(kind, 'other')}"
    except Exception:  # a damaged one
        return "its tags cannot be read"
