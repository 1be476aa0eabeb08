"""How pictures are packed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from training.errors import UserError
from training.packing.buckets import check_buckets, nearest
from training.pictures.decoding import MAX_PIXELS, MOST_PIXELS, Crop, background_colour
from training.pictures.flags import check_pictures, is_range
from training.pictures.hints import KINDS, hint_of
from training.shards.index import Size


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that, with the source, decides the bytes of a packing."""

    resolution: int = 64
    crop: Crop = "center"
    flip: bool = False
    val_fraction: float = 0.02
    seed: int = 0
    format: Literal["png", "jpg"] = "png"
    missing_caption: Literal["error", "empty", "filename", "folder"] = "error"
    on_bad_data: Literal["error", "skip"] = "error"
    background: str = "white"
    upscale: bool = False
    limit: int | None = None
    samples_per_shard: int = 2000
    animated: Literal["first", "reject"] = "first"
    max_pixels: int = MAX_PIXELS
    order: Literal["mixed", "source"] = "mixed"
    caption_column: str | None = None
    caption_lines: Literal["each", "join"] = "each"
    image_field: str | None = None
    splits: Literal["names", "draw"] = "names"
    channels: int = 3
    range: list[float] | None = None  # a list, as JSON gives it back
    ignore_alpha: bool = False
    hint: Literal["edges", "mask", "depth", "picture"] | None = None
    hint_given: bool = False  # by files, not made of the pixels
    hint_range: list[float] | None = None
    buckets: list[list[int]] | None = None  # height and width of each
    keep_sizes: bool = False  # with buckets always

    def __post_init__(self) -> None:
        if self.resolution < 8:
            raise UserError(f"--resolution: must be at least 8 (got {self.resolution})")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction: must be at least 0 and below 1 (got {self.val_fraction})")
        if self.samples_per_shard < 1 or (self.limit is not None and self.limit < 1):
            raise UserError("--samples-per-shard and --limit: must be at least 1")
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise UserError(f"--max-pixels: must lie in 1 … {MOST_PIXELS:,} (got {self.max_pixels:,})")
        background_colour(self.background)
        check_pictures(self.channels, self.range, self.format)
        check_buckets(self.buckets or [])
        self._check_hint()

    def target(self, size: tuple[int, int]) -> Size:
        """Height and width that a picture of `size` (width, height) is packed in."""
        return nearest(self.buckets, size) if self.buckets else (self.resolution, self.resolution)

    @property
    def framed(self) -> bool:
        """Whether each picture's own size, and where it was cut, is stored beside it."""
        return self.keep_sizes or self.buckets is not None

    def _check_hint(self) -> None:
        if self.hint is None and self.hint_given:
            hint = f"--hint {' or --hint '.join(KINDS)}"
            raise UserError("--hint-files: of which kind they are is not said", hint=hint)
        if self.hint_range and not self.hint_given:
            raise UserError("--hint-range: is of the files of --hint-files, and none are given")
        if self.hint_range and not is_range(self.hint_range):
            low, high = self.hint_range
            raise UserError(f"--hint-range: LOW must be below HIGH (got {low:g} {high:g})")
        if self.hint and not self.hint_given and not hint_of(self.hint).of_pixels:
            what = f"--hint {self.hint}: is not made of pixels"
            raise UserError(what, hint="give a folder of them with --hint-files DIR")


def as_stored(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of an earlier packing: those newer than it stand at their defaults, but shards were packed in the
    source's order before they could be mixed."""
    return {**asdict(Settings()), "order": "source", **settings}
