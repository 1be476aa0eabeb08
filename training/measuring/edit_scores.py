"""What is measured of edited pictures of the embedded shapes: captions, silhouettes, colours and seams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoencoder.precision import double
from training.shapes.checker import check, overlap, read, silhouette
from training.shapes.edits import Edit

Numbers = dict[str, Any]


def arrays(pixels: Tensor) -> list[NDArray[np.uint8]]:
    """(H, W, 3) each."""
    return list(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())


def obeyed(pixels: Tensor, captions: Sequence[str]) -> list[bool]:
    """Whether the checker finds in each picture what its caption says."""
    return [check(image, caption)["obeyed"] for image, caption in zip(arrays(pixels), captions, strict=True)]


def overlaps(a: Tensor, b: Tensor, without: Sequence[Edit] = ()) -> list[float]:
    """IoU of the silhouettes of pictures, outside of the holes of edits where those are given."""
    found = [[silhouette(image) for image in arrays(pixels)] for pixels in (a, b)]
    side = len(found[0][0])
    left = [~edit.hole(side) for edit in without] or [np.ones((side, side), dtype=bool)] * len(a)
    return [overlap(one & rest, other & rest) for one, other, rest in zip(*found, left, strict=True)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def seam(picture: Tensor, column: int) -> tuple[float, float]:
    """How much a picture (C, H, W) changes between columns `column` - 1 and `column`, and the 95th percentile of that
    between all other neighbours: means of |difference| over rows and channels, in grey levels."""
    steps = double(picture).diff(dim=-1).abs().mean(dim=(0, 1))
    others = torch.cat([steps[: column - 1], steps[column:]])
    return steps[column - 1].item(), others.quantile(0.95).item()


def coloured(image: NDArray[np.uint8], edit: Edit) -> bool:
    """Whether the colours seen are those of the target, however many objects the caption left open."""
    return {seen.colour for seen in read(image)} == {item.colour for item in edit.target.objects}
