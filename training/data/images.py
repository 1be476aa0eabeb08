"""Packed pictures, read by slot of the data order."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.commands import door
from training.data.order import Slot
from training.data.samples import Batch, Policy, Samples, coin, ids, or_error
from training.errors import DATA, UserError
from training.pictures.formats import FIELDS, choose, several_pictures

if TYPE_CHECKING:
    from training.shards.reading import ShardSet
    from training.shards.streaming import StreamedShards


class Images(Samples[np.ndarray]):
    """Packed pictures by slot; half of them mirrored when `flip`, keyed by (seed, epoch, sample).

    With `resolution` they are fitted to it, as packing does; packed ones have theirs.
    """

    def __init__(
        self,
        shards: ShardSet | StreamedShards,
        *,
        flip: bool = False,
        seed: int = 0,
        on_bad_data: Policy = "skip",
        resolution: int | None = None,
    ) -> None:
        super().__init__(shards, seed, on_bad_data)
        self.flip, self.resolution = flip, resolution
        self.channels: int = shards.summary.get("channels", 3)  # 1: grey, 3: RGB, 4: RGBA
        self.extensions = [ext for ext in FIELDS if ext in shards.fields]
        if not self.extensions:
            what = f"the shards hold no pictures (fields: {', '.join(shards.fields)})"
            raise UserError(what, hint=f"make them: {door('make_shards pack SOURCE --output DIR')}", code=DATA)

    @cached_property
    def plain(self) -> Images:
        """Without mirrored ones."""
        return Images(self.shards, on_bad_data=self.on_bad_data, resolution=self.resolution)

    def picture(self, index: int) -> np.ndarray:
        """Sample `index` as uint8 (H,W,channels). Raises UserError(code 3) where it cannot be decoded."""
        from training.pictures.decoding import fit, load_image

        record = self.shards.read(index, self.extensions)
        found = [ext for ext in self.extensions if record.get(ext)]
        if len(found) > 1:
            what = f"{self.shards.key(index)}: {several_pictures(found)}"
            raise UserError(what, hint=choose(self.shards.directory, found), code=DATA)
        data, suffix = (record[found[0]], f".{found[0]}") if found else (b"", "")
        try:
            image = load_image(data, channels=self.channels, suffix=suffix)
            pixels = np.asarray(fit(image, self.resolution) if self.resolution else image)
            return pixels.reshape(*pixels.shape[:2], self.channels)
        except UserError as failure:
            what = f"{self.shards.key(index)}: not a readable picture ({failure.what})"
            hint = f"run: {door('make_shards verify', self.shards.directory)}"
            raise UserError(what, hint=hint, code=DATA) from None

    def load(self, slots: list[Slot]) -> list[np.ndarray | UserError]:
        """The picture of each slot."""
        return [or_error(self.picture, slot.index) for slot in slots]

    def join(self, slots: list[Slot], samples: list[np.ndarray]) -> Batch:
        """Stacked, some mirrored. Raises UserError where pictures differ in size."""
        if len({p.shape for p in samples}) > 1:
            sizes = sorted({f"{p.shape[1]}x{p.shape[0]}" for p in samples})
            what = f"pictures of different sizes in one batch ({', '.join(sizes[:4])})"
            raise UserError(what, hint="pack them with --resolution, or --buckets", code=DATA)
        data = torch.from_numpy(np.stack(samples)).permute(0, 3, 1, 2)
        if self.flip:
            data = torch.where(coin(slots, self.seed, "flip")[:, None, None, None], data.flip(-1), data)
        return Batch(data, ids(slots), [""] * len(slots))
