"""Spatial hints: pictures that say where things are, made of a picture's pixels or read from files.

The family of kinds. A hint is stored as an 8-bit PNG beside its picture, and a network is shown it in [0, 1].
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.errors import USAGE, UserError
from training.ledger import Effect
from training.pictures.decoding import MAX_PIXELS, encode_png, load_image, refuse

if TYPE_CHECKING:
    from torch import Tensor

Bytes = NDArray[np.uint8]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
FIELD = "hint.png"  # of a packed sample
EXTRA = "image"  # the name that conditions, and fields of latents, have for it
APART = 60  # an edge lies where a channel of two neighbours differs by more
NEAR = 20  # a pixel is background where no channel differs by more from it
HALF = 128  # the alpha from which on a pixel is of the silhouette
EVEN = 0.5  # the share of the border that must be background for there to be one
BY_BACKGROUND = "silhouette of what differs from the border's colour"
BY_ALPHA = "colours of a picture whose silhouette is its transparency"
BLANK = "hint of one value everywhere, which says nothing"
RULES: dict[str, tuple[Effect, str]] = {"background": ("guessed", BY_BACKGROUND), "alpha": ("ignored", BY_ALPHA)}


class Made(NamedTuple):
    """A hint (H, W, C) uint8, and the rule that it was made by."""

    values: Bytes
    rule: str


class Decoded(NamedTuple):
    """A hint's file as (H, W, C) uint8, what of it was not used as it was given, and whether its numbers were `deep`,
    wider than 8 bits."""

    values: Bytes
    notes: list[tuple[Effect, str]]
    deep: bool


class Hint(ABC):
    """A kind of hint: its channels, whether it is `thin` (what is one pixel wide must outlive a resizing), and, where
    `of_pixels`, how it is made of a picture."""

    kind: ClassVar[str]
    channels: ClassVar[int] = 1
    thin: ClassVar[bool] = False
    of_pixels: ClassVar[bool] = False

    @abstractmethod
    def made(self, pixels: Bytes, alpha: Bytes | None) -> Made:
        """The hint of a picture (H, W, C); `alpha` (H, W): its transparency, where its file has any. Raises
        Unusable where the picture has none."""

    def decoded(self, data: bytes, max_pixels: int = MAX_PIXELS, limits: Sequence[float] | None = None,
                suffix: str = "") -> Decoded:
        """A hint's file, transparency laid on black; of more than 8 bits, `limits` say what is black and white.

        Raises Unusable for what is no picture, and for colour where the kind is grey.
        """
        image = load_image(data, "black", max_pixels, limits=limits, suffix=suffix)
        values = np.asarray(image)
        if self.channels == 1 and (values != values[..., :1]).any():
            raise refuse(f"colour in a hint of {self.kind}, which is grey", "--hint picture takes hints in colour")
        remarks: list[tuple[Effect, str]] = image.info["remarks"]
        notes = [(effect, f"hint: {why}".replace("--range", "the range of hints")) for effect, why in remarks]
        return Decoded(values[..., : self.channels], notes, image.info["deep"])

    def resized(self, values: Bytes, size: tuple[int, int], box: Box | None = None) -> Bytes:
        """The `box` of a hint (H, W, C), or all of it, brought to `size` (height, width): thin ones by the greatest
        value, in which each pixel counts once, others by the mean."""
        height, width = values.shape[:2]
        box = box or (0, 0, width, height)
        if box == (0, 0, width, height) and (height, width) == size:
            return values
        if self.thin:
            down = _greatest(values, box[1], box[3], size[0], 0)
            return _greatest(down, box[0], box[2], size[1], 1)
        planes = [Image.fromarray(values[..., c]).resize(size[::-1], Image.Resampling.BOX, box)
                  for c in range(values.shape[2])]
        return np.stack([np.asarray(plane) for plane in planes], -1)


def _greatest(values: Bytes, start: float, stop: float, count: int, axis: int) -> Bytes:
    """The greatest values of `count` equal parts of [start, stop) along an axis: a pixel is of the part that its first
    edge lies in, so that none is lost and none widened; where parts are narrower than pixels, the pixel there."""
    places = start + (stop - start) * np.arange(count) / count
    # The thousandth: a place that is a whole number must stay it, however it was rounded.
    starts = np.floor(places + 1e-3) if stop - start < count else np.ceil(places - 1e-3)
    starts[0] = np.floor(start + 1e-3)
    end = int(np.ceil(stop - 1e-3))
    return np.maximum.reduceat(values.take(range(end), axis), starts.astype(int), axis)


class Edges(Hint):
    """255 where a pixel and a neighbour, beside or beneath it, differ by more than 60 in a channel: on the darker one
    of the two, by the sum of the channels and then by the first that differs. Lines are one pixel wide, and those of a
    mirrored picture are the mirrored ones."""

    kind = "edges"
    thin = of_pixels = True

    def made(self, pixels: Bytes, alpha: Bytes | None) -> Made:
        return Made(edges(pixels)[..., None], "pixels")


def edges(pixels: Bytes) -> Bytes:
    """The edges (H, W) of a picture (H, W, C), 0 or 255, as `Edges` says."""
    values = pixels.astype(np.int64)
    rank = values.sum(-1)  # no two pixels that differ have the same
    for channel in range(values.shape[-1]):
        rank = rank * 256 + values[..., channel]
    found = np.zeros(pixels.shape[:2], bool)
    for first, second in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        apart = abs(values[first] - values[second]).max(-1) > APART
        found[first] |= apart & (rank[first] < rank[second])
        found[second] |= apart & (rank[first] > rank[second])
    return found.astype(np.uint8) * 255


class Mask(Hint):
    """255 on the silhouette: where alpha is at least 128; of a picture without transparency where a channel differs by
    more than 20 from the background, the most frequent colour of the outermost pixels, which at least half of them
    must be near."""

    kind = "mask"
    thin = of_pixels = True

    def made(self, pixels: Bytes, alpha: Bytes | None) -> Made:
        if alpha is not None:
            return Made((alpha >= HALF).astype(np.uint8)[..., None] * 255, "alpha")
        border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
        colours, counts = np.unique(border, axis=0, return_counts=True)
        background = colours[counts.argmax()]
        if (_away(border, background) <= NEAR).mean() < EVEN:
            raise refuse("no silhouette: neither transparency nor an even background",
                         "give masks as files with --hint-files DIR")
        return Made((_away(pixels, background) > NEAR).astype(np.uint8)[..., None] * 255, "background")


def _away(pixels: Bytes, colour: Bytes) -> NDArray[np.int16]:
    """The greatest difference of a channel from a colour, by pixel."""
    return abs(pixels.astype(np.int16) - colour).max(-1)  # type: ignore[no-any-return]


class _OfFiles(Hint):
    """A kind that only files give."""

    def made(self, pixels: Bytes, alpha: Bytes | None) -> Made:
        raise refuse(f"no {self.kind} is made of pixels", "give it with --hint-files DIR")


class Depth(_OfFiles):
    """Depth, or any other number a pixel, as grey files."""

    kind = "depth"


class ColourPicture(_OfFiles):
    """Pictures in colour: poses, segments, sketches."""

    kind, channels = "picture", 3


HINTS: tuple[type[Hint], ...] = (Edges, Mask, Depth, ColourPicture)
KINDS = tuple(hint.kind for hint in HINTS)


def hint_of(kind: str) -> Hint:
    """The member of that name. Raises UserError for another."""
    for hint in HINTS:
        if hint.kind == kind:
            return hint()
    raise UserError(f"--hint: must be one of {', '.join(KINDS)} (got {kind!r})", code=USAGE)


def stored(values: Bytes) -> bytes:
    """A hint (H, W, C) as the PNG that is stored."""
    return encode_png(values[..., 0] if values.shape[2] == 1 else np.ascontiguousarray(values))


def loaded(data: bytes, channels: int, size: tuple[int, int]) -> Bytes:
    """A stored hint as (C, H, W). Raises Unusable where it is no picture of those channels and that size (height,
    width)."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != size[::-1] or image.mode != {1: "L", 3: "RGB"}.get(channels):
                found = f"{image.width}x{image.height} of mode {image.mode}"
                raise refuse(f"hint of another size or other channels ({found})")
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise refuse("hint that cannot be read") from None
    return np.ascontiguousarray(values.reshape(*size, channels).transpose(2, 0, 1))


def beside(picture: Image.Image, hint: bytes | None) -> Image.Image:
    """A picture with its stored hint to the right of it; alone where there is none."""
    if hint is None:
        return picture
    both = Image.new("RGBA" if picture.mode == "RGBA" else "RGB", (2 * picture.width, picture.height))
    both.paste(picture, (0, 0))
    both.paste(Image.open(io.BytesIO(hint)).convert("RGB"), (picture.width, 0))
    return both


def all_beside(pictures: Sequence[Image.Image], shown: Tensor) -> list[Image.Image]:
    """Pictures, each with its hint of (B, C, H, W) in [0, 1] to the right of it."""
    return [beside(picture, stored(hint)) for picture, hint in zip(pictures, as_bytes(shown), strict=True)]


def as_bytes(shown: Tensor) -> Bytes:
    """Hints (B, C, H, W) in [0, 1] as they are stored, (B, H, W, C)."""
    values: Bytes = (shown.detach().float().cpu().permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    return values
