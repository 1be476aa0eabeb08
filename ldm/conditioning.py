"""What a backbone is told besides the noisy latents: text tokens, their mask, one pooled vector, and named extras.

Every tensor has the batch first, so that a condition is chosen from, repeated, joined and dropped sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Parts = Literal["", "qk", "kv"]  # of queries, keys and values; keys bring their padding mask


class Share(NamedTuple):
    """What every second sample of a batch takes from the sample before it in self- and cross-attention, in the layers
    from `depth` in [0, 1) on: layer i of n has the depth i / n. `ldm.coupling` says what for."""

    own: Parts = ""
    cross: Parts = ""
    depth: float = 0.0

    def at(self, depth: float) -> Share:
        """For a layer of this depth."""
        return self if depth >= self.depth else NOTHING


NOTHING = Share()


class Cond(NamedTuple):
    """context (B, L, D), mask (B, L) with True for real tokens, pooled (B, P) or None; extras (B, ...) by name, such as
    "image" for a picture that the backbone is shown; what its attention layers `share` between samples."""

    context: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    extras: Mapping[str, Tensor] = {}
    share: Share = NOTHING

    @property
    def image(self) -> Tensor | None:
        """extras["image"] (B, C, H, W), None where there is none."""
        return self.extras.get("image")

    def map(self, change: Callable[[Tensor], Tensor]) -> Cond:
        """With `change` made to every tensor."""
        return Cond(change(self.context), change(self.mask), None if self.pooled is None else change(self.pooled),
                    {name: change(extra) for name, extra in self.extras.items()}, self.share)

    def select(self, index: slice | Tensor) -> Cond:
        """The samples at `index`: a slice, their numbers or a mask."""
        if isinstance(index, slice) or index.dtype == torch.bool:
            return self.map(lambda part: part[index])
        # Its gradient is summed in order; that of part[index] in any, by several threads: other bits in every run.
        places = index.to(self.context.device)
        return self.map(lambda part: part.index_select(0, places))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Cond:
        """Moved to `device`; `dtype` applies to the floating-point parts."""
        return self.map(lambda part: part.to(device, dtype if part.is_floating_point() else None, non_blocking=True))

    def expand(self, batch: int) -> Cond:
        """One condition shared by `batch` samples, without copying; a batch of that size stays as it is."""
        return self.map(lambda part: part.expand(batch, *part.shape[1:]))

    def padded(self, length: int) -> Cond:
        """With masked zero tokens up to `length`."""
        extra = length - self.context.shape[1]
        return self._replace(context=pad(self.context, (0, 0, 0, extra)), mask=pad(self.mask, (0, extra)))

    def absence(self, null: Cond) -> Cond:
        """`null` (batch 1 or B) for this batch, with our extras where it has none of their name.

        So a hint or an image condition is not dropped with the caption, unless the null carries one of its own.
        """
        other = null.expand(len(self.mask))
        return other._replace(extras={name: other.extras.get(name, extra) for name, extra in self.extras.items()})

    def where(self, keep: Tensor, null: Cond) -> Cond:
        """This condition where `keep` (B,) is True, its `absence` elsewhere: caption dropout."""
        length = max(self.context.shape[1], null.context.shape[1])
        ours, other = self.padded(length), self.absence(null).padded(length)

        def chosen(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (mine.ndim - 1)), mine, theirs)

        pooled = None if ours.pooled is None or other.pooled is None else chosen(ours.pooled, other.pooled)
        return Cond(chosen(ours.context, other.context), chosen(ours.mask, other.mask), pooled,
                    {name: chosen(extra, other.extras[name]) for name, extra in ours.extras.items()})

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """All samples in one batch, padded to the longest context. Raises ValueError where extras differ in name."""
        names = {tuple(sorted(cond.extras)) for cond in conds}
        if len(names) > 1:
            raise ValueError(f"conditions of one batch must have the same extras, got {' and '.join(map(str, names))}")
        length = max(cond.context.shape[1] for cond in conds)
        conds = [cond.padded(length) for cond in conds]
        pooled = [cond.pooled for cond in conds if cond.pooled is not None]
        return Cond(torch.cat([cond.context for cond in conds]), torch.cat([cond.mask for cond in conds]),
                    torch.cat(pooled) if pooled else None,
                    {name: torch.cat([cond.extras[name] for cond in conds]) for name in conds[0].extras})
