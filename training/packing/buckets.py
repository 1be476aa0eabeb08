"""Buckets: the few sizes of about the same area that pictures of any shape are packed in, each in that of the nearest
ratio (NovelAI 2022; SDXL, Podell et al. 2023, arXiv 2307.01952, appendix I)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from training.errors import UserError
from training.shards.index import Size

SMALLEST, RATIO = 8, 2.0  # pixels of a side; the longer to the shorter, at most


def add_bucket_flags(packing: Any) -> None:
    """The flags of `pack` that say which sizes there are."""
    text = "sizes of about RESOLUTION² pixels, each picture to that of its ratio: all, so many, or those given"
    packing.add_argument("--buckets", nargs="*", metavar="N|HxW", help=text)
    text = "what their sides are multiples of (an eighth of --resolution)"
    packing.add_argument("--bucket-step", type=int, metavar="PIXELS", help=text)
    packing.add_argument("--bucket-ratio", type=float, metavar="R", help="buckets from 1:R to R:1 (2)")
    text = "store each picture's own size, and where it was cut, as --buckets always does"
    packing.add_argument("--keep-sizes", action="store_true", help=text)


def asked_buckets(arguments: Any) -> list[list[int]] | None:
    """The sizes that the flags ask for; None without buckets. Raises UserError as `bucket_sizes` does."""
    step, ratio = arguments.bucket_step, arguments.bucket_ratio
    if arguments.buckets is not None:
        return bucket_sizes(arguments.buckets, arguments.resolution, step, RATIO if ratio is None else ratio)
    if step is not None or ratio is not None:
        raise UserError("--bucket-step and --bucket-ratio: are of buckets", hint="give --buckets, too")
    return None


def bucket_sizes(words: Sequence[str], resolution: int, step: int | None, ratio: float) -> list[list[int]]:
    """The sizes (height, width) that `--buckets` asks for, the flattest first, as JSON gives them back.

    None: every pair of sides, multiples of `step` (None: an eighth of `resolution`), whose shorter is up to
    `resolution` and whose longer is the one nearest to resolution² / shorter, of ratios from 1:`ratio` to `ratio`:1. A
    number: so many ratios, evenly from 1:`ratio` to `ratio`:1 in their logarithms, sides rounded to `step`. Else
    HEIGHTxWIDTH each. Raises UserError for anything else.
    """
    step = max(SMALLEST, resolution // 8) if step is None else step
    if not 1 <= step <= resolution:
        raise UserError(f"--bucket-step: must lie in 1 … {resolution}, the resolution (got {step})")
    if not 1 <= ratio <= 20:
        raise UserError(f"--bucket-ratio: must lie in 1 … 20 (got {ratio:g})")
    if len(words) == 1 and words[0].isdecimal():
        sizes = _even(int(words[0]), resolution, step, ratio)
    else:
        sizes = [_parsed(word) for word in words] if words else _every(resolution, step, ratio)
    return [list(size) for size in sorted(sizes, key=lambda size: size[0] / size[1])]


def _every(resolution: int, step: int, ratio: float) -> list[Size]:
    sizes = set[Size]()
    for shorter in range(step, resolution + 1, step):
        longer = max(shorter, round(resolution**2 / shorter / step) * step)
        if longer <= ratio * shorter:
            sizes |= {(shorter, longer), (longer, shorter)}
    return list(sizes)


def _even(count: int, resolution: int, step: int, ratio: float) -> list[Size]:
    places = [2 * i / (count - 1) - 1 for i in range(count)] if count > 1 else [0.0] * count
    sides = [(resolution * ratio ** (place / 2), resolution * ratio ** (-place / 2)) for place in places]
    sizes = {(_rounded(height, step), _rounded(width, step)) for height, width in sides}
    if not count or len(sizes) < count:
        what = f"--buckets {count}: with sides of multiples of {step} these are {len(sizes)} different sizes"
        raise UserError(what, hint="ask for fewer, or give a smaller --bucket-step or a larger --bucket-ratio")
    return list(sizes)


def _rounded(side: float, step: int) -> int:
    return max(1, round(side / step)) * step


def _parsed(word: str) -> Size:
    height, _, width = word.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and min(int(height), int(width)) >= SMALLEST):
        what = f"--buckets {word}: expected nothing, a number of buckets, or sizes HEIGHTxWIDTH of {SMALLEST} pixels up"
        raise UserError(what, hint="for example --buckets, --buckets 5 or --buckets 64x64 48x80 80x48")
    return int(height), int(width)


def check_buckets(sizes: Sequence[Sequence[int]]) -> None:
    """Raises UserError where two have one ratio, so that nothing says which of them a picture is for."""
    ratios: dict[float, Sequence[int]] = {}
    for size in sizes:
        other = ratios.setdefault(size[0] / size[1], size)
        if other is not size:
            what = f"--buckets: {_words(other)} and {_words(size)} have one ratio, by which pictures go to buckets"
            raise UserError(what, hint="leave one of them out")


def nearest(sizes: Sequence[Sequence[int]], size: tuple[int, int]) -> Size:
    """The bucket (height, width) whose ratio is nearest to that of a picture of `size` (width, height) in logarithms;
    of two as near, the first."""
    ratio = math.log(size[1] / size[0])
    height, width = min(sizes, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - ratio))
    return height, width


def _words(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
