"""Hints beside the pictures that are packed: made of their pixels, or files of the same names, cropped as they are."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from training.errors import DATA, UserError
from training.ledger import Effect, Ledger
from training.packing.settings import Settings
from training.packing.sources import Stored, safe_key
from training.packing.trees import Directory
from training.pictures.decoding import SUFFIXES, Crop, cut_box, fit, load_image, refuse
from training.pictures.hints import BLANK, BY_BACKGROUND, Bytes, Decoded, Hint, hint_of

UNUSED = "hint of no picture that was packed"
File = tuple[Stored, str]  # where a file lies, and its suffix


class HintFiles:
    """The pictures of a folder by the keys that a source gives those of the same relative names, whatever the suffix.

    `state`: a fingerprint of the folder, as that of a source. Raises UserError where it holds no picture, and where two
    have one name.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"--hint-files {root}: no such folder", hint="name a folder of pictures", code=DATA)
        self.tree, self.names = Directory(root), dict[str, str]()
        for name in self.tree.files:
            stem, suffix = posixpath.splitext(name)
            if suffix.lower() in SUFFIXES:
                other = self.names.setdefault(safe_key(stem), name)
                if other != name:
                    what = f"--hint-files {root}: two hints for one picture ({other}, {name})"
                    raise UserError(what, hint="leave one of them there", code=DATA)
        if not self.names:
            raise UserError(f"--hint-files {root}: no images in this folder", hint="name another folder", code=DATA)
        self.unused = dict(self.names)

    @property
    def state(self) -> str:
        """A hash that changes when a file does."""
        return self.tree.state()

    def of(self, key: str) -> File | UserError:
        """The hint's file of a picture, or why there is none."""
        self.unused.pop(key, None)
        if (name := self.names.get(key)) is None:
            hint = f"a hint has the name of its picture, below --hint-files as that lies below SOURCE: {key}.png"
            return refuse("no hint", hint)
        return self.tree.picture(name), posixpath.splitext(name)[1]

    def tell_unused(self, ledger: Ledger) -> None:
        """Note the files that no picture asked for."""
        for name in self.unused.values():
            ledger.add("ignored", UNUSED, name)


def hint_files(root: Path, sources: Sequence[str]) -> HintFiles:
    """The hints of a folder. Raises UserError where they lie among the pictures, and would be packed as such."""
    for source in map(Path, sources):
        if source.is_dir() and root.resolve().is_relative_to(source.resolve()):
            what = f"--hint-files {root}: lies in {source}, so that its files would be packed as pictures"
            raise UserError(what, hint="move it beside that folder")
    return HintFiles(root)


def packing_state(source: str, files: HintFiles | None) -> str:
    """The fingerprint of a source, and of the hints beside it."""
    return hashlib.sha256((f"{source}\0{files.state}" if files else source).encode()).hexdigest()


def hint_beside(
    image: Image.Image | bytes, packed: Image.Image, given: File | UserError | None, settings: Settings,
    crop: Crop, rng: str, suffix: str,
) -> tuple[Bytes, str, list[tuple[Effect, str]]]:
    """The hint (H, W, C) of a picture, the rule that it was made by, and what is to be noted of it.

    `image`: the source's, decoded or a file's bytes; `packed`: as it is stored; `given`: the hint's file, where hints
    are files; `rng`: the key of the random crop, which is drawn again. Raises UserError(code 3) where there is none.
    """
    assert settings.hint
    hint, notes = hint_of(settings.hint), list[tuple[Effect, str]]()
    if isinstance(given, UserError):
        raise given
    if given:
        size = image.size if isinstance(image, Image.Image) else _load(image, settings, 3, suffix).size
        values, notes, _ = _decoded(hint, given, settings)
        values, rule = _cropped(hint, values, size, settings, crop, rng), "files"
    else:
        pixels = np.asarray(packed).reshape(packed.height, packed.width, -1)
        alpha = _alpha(image, packed, settings, crop, rng, suffix) if hint.kind == "mask" else None
        values, rule = hint.made(pixels, alpha)
        notes = [("guessed", BY_BACKGROUND)] if rule == "background" else []
    return values, rule, [*notes, ("ignored", BLANK)] if values.min() == values.max() else notes


def _decoded(hint: Hint, given: File, settings: Settings) -> Decoded:
    try:
        return hint.decoded(given[0].read(), settings.max_pixels, settings.hint_range, given[1])
    except UserError as problem:
        flag = problem.hint.replace("--range", "--hint-range")
        raise refuse(f"hint: {problem.what}", flag) from None


def _cropped(
    hint: Hint, values: Bytes, size: tuple[int, int], settings: Settings, crop: Crop, rng: str
) -> Bytes:
    """The part of a hint that is packed of its picture of `size` (width, height). Raises UserError(code 3) where it is
    not of the same shape, a pixel of rounding aside, or too small."""
    (width, height), (down, across) = size, values.shape[:2]
    if abs(across * height - down * width) > max(width, height):
        raise refuse(f"hint of another shape than its picture ({across}x{down}, {width}x{height})")
    box: tuple[float, float, float, float] = (0, 0, width, height)
    rows, columns = settings.target(size)
    if size != (columns, rows):
        box = cut_box(size, (rows, columns), crop, Random(rng), settings.upscale)
    x, y = across / width, down / height
    if (box[2] - box[0]) * min(x, y) < columns - 1 and not settings.upscale:
        raise refuse(f"hint too small ({across}x{down})", "--upscale enlarges it")
    scaled = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    return hint.resized(values, (rows, columns), scaled)


def _alpha(
    image: Image.Image | bytes, packed: Image.Image, settings: Settings, crop: Crop, rng: str, suffix: str
) -> Bytes | None:
    """The transparency of a picture as it is packed; None where its file has none, or that is not asked for."""
    if settings.ignore_alpha or not isinstance(image, bytes):
        return None
    whole = _load(image, settings, 4, suffix)
    if whole.getchannel("A").getextrema()[0] == 255:
        return None
    if packed.mode != "RGBA":
        packed = fit(whole, settings.target(whole.size), crop, Random(rng), settings.upscale)
    return np.asarray(packed.getchannel("A"))


def _load(image: bytes, settings: Settings, channels: int, suffix: str) -> Image.Image:
    return load_image(image, settings.background, settings.max_pixels, channels=channels, limits=settings.range,
                      ignore_alpha=settings.ignore_alpha, suffix=suffix)
