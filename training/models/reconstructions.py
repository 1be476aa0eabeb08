"""What an autoencoder's reconstructions are worth: PSNR, SSIM, LPIPS, codes in use, and a grid to look at."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from autoencoder.fidelity import psnr, ssim
from autoencoder.images import to_uint8, to_unit
from autoencoder.perceptual import Perceptual
from autoencoder.quantizer import code_counts, perplexity, usage
from training.messages import warn
from training.pictures import grids

SHOWN = 8  # columns of the picture grid
COLLAPSED = 0.05  # share of codes in use below which a codebook is said to have collapsed


class Fidelity:
    """PSNR, SSIM and, with a network for it, LPIPS of 8-bit pictures beside what they should be: one number a picture.

    The one measurer: training, evaluation, inspection and distillation all read their numbers from it.
    """

    def __init__(self, perceptual: Perceptual | None) -> None:
        self.perceptual = perceptual
        self.rows: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def add(self, pictures: Tensor, pixels: Tensor, crop: int = 0) -> None:
        """Pictures and their references, uint8 (B,C,H,W); PSNR and SSIM of the inner `crop` pixels, all channels.

        0 takes whole pictures; a crop leaves out padding, which is easy to reconstruct.
        """
        inner, outer = (center(part, crop) for part in (pictures, pixels))
        scores = {"psnr": psnr(inner, outer), "ssim": ssim(inner, outer)}
        if self.perceptual:
            scores["lpips"] = self.perceptual(to_unit(pictures), to_unit(pixels))
        for name, values in scores.items():
            self.rows.setdefault(name, []).append(values)

    def values(self) -> dict[str, Tensor]:
        """Every picture's numbers, (N,) by name."""
        return {name: torch.cat(parts) for name, parts in self.rows.items()}

    def means(self, prefix: str = "") -> dict[str, float]:
        """The means over pictures, by `prefix` and name."""
        return {prefix + name: values.mean().item() for name, values in self.values().items()}


def center(pixels: Tensor, side: int) -> Tensor:
    """The middle of pictures (..., H, W), `side` pixels a side; all of them where it is 0."""
    if not side:
        return pixels
    top, left = ((size - side) // 2 for size in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]


@torch.no_grad()
def reconstructed(model: Autoencoder, pixels: Tensor) -> Tensor:
    """uint8 pictures through the posterior's mean, 8-bit."""
    return to_uint8(model(to_unit(pixels), None)[0])


def mean_psnr(model: Autoencoder, batches: Iterable[Tensor]) -> float:
    """The PSNR that `measure` tells of uint8 batches, alone, on the model's device."""
    device = next(model.parameters()).device
    moved = (pixels.to(device) for pixels in batches)
    return torch.cat([psnr(reconstructed(model, pixels), pixels) for pixels in moved]).mean().item()


def measure(
    model: Autoencoder, perceptual: Perceptual | None, batches: Iterable[Tensor], folder: Path
) -> dict[str, float]:
    """`Fidelity` of reconstructions (posterior mean) of uint8 batches; a grid of input, output, error in `folder`, of
    the first of the largest: in buckets, of the one that most pictures are in."""
    fidelity, counts, largest = Fidelity(perceptual), None, 0
    for pixels in batches:
        reconstruction, moments = model(to_unit(pixels), None)
        pictures = to_uint8(reconstruction)
        if model.quantize:
            batch_counts = code_counts(model.quantize.indices(moments), model.quantize.codes)
            counts = batch_counts if counts is None else counts + batch_counts
        if len(pixels) > largest:
            largest = len(pixels)
            rows = {"input": pixels[:SHOWN], "reconstruction": pictures[:SHOWN]}
            grids.write(grids.comparison(rows), folder / "grid.png")
        fidelity.add(pictures, pixels)
    return fidelity.means() | ({} if counts is None else code_usage(counts))


def code_usage(counts: Tensor) -> dict[str, float]:
    """Usage and perplexity of code counts (codes,), and a warning where they tell of a collapse."""
    share = usage(counts).item()
    if share < COLLAPSED and share * len(counts) < 0.5 * counts.sum():  # few, though there was occasion for more
        warn(
            f"only {share:.1%} of the {len(counts):,} codes are in use; "
            "see model.normalize, model.codebook_decay and model.revive_every"
        )
    return {"usage": share, "perplexity": perplexity(counts).item()}
