"""What a backbone is told besides the noisy latents: text tokens, their mask, and one pooled vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Cond(NamedTuple):
    """context (B, L, D), mask (B, L) with True for real tokens, pooled (B, P) or None."""

    context: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    def select(self, index: slice | Tensor) -> Cond:
        """The samples at `index`."""
        return Cond(self.context[index], self.mask[index], None if self.pooled is None else self.pooled[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Cond:
        """Moved to `device`; `dtype` applies to the floating-point parts."""
        return Cond(self.context.to(device, dtype, non_blocking=True), self.mask.to(device, non_blocking=True),
                    None if self.pooled is None else self.pooled.to(device, dtype, non_blocking=True))

    def expand(self, batch: int) -> Cond:
        """One condition shared by `batch` samples, without copying; a batch of that size stays as it is."""
        return Cond(self.context.expand(batch, -1, -1), self.mask.expand(batch, -1),
                    None if self.pooled is None else self.pooled.expand(batch, -1))

    def padded(self, length: int) -> Cond:
        """With masked zero tokens up to `length`."""
        extra = length - self.context.shape[1]
        return Cond(pad(self.context, (0, 0, 0, extra)), pad(self.mask, (0, extra)), self.pooled)

    def where(self, keep: Tensor, null: Cond) -> Cond:
        """This condition where `keep` (B,) is True, `null` (batch 1 or B) elsewhere: caption dropout."""
        length = max(self.context.shape[1], null.context.shape[1])
        ours, other = self.padded(length), null.padded(length)
        pooled = None
        if ours.pooled is not None and other.pooled is not None:
            pooled = torch.where(keep[:, None], ours.pooled, other.pooled)
        return Cond(torch.where(keep[:, None, None], ours.context, other.context),
                    torch.where(keep[:, None], ours.mask, other.mask), pooled)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """All samples in one batch, padded to the longest context."""
        length = max(cond.context.shape[1] for cond in conds)
        conds = [cond.padded(length) for cond in conds]
        pooled = [cond.pooled for cond in conds if cond.pooled is not None]
        return Cond(torch.cat([cond.context for cond in conds]), torch.cat([cond.mask for cond in conds]),
                    torch.cat(pooled) if pooled else None)
