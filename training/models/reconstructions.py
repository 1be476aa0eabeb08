"""What an autoencoder's reconstructions are worth: PSNR, SSIM, LPIPS, codes in use, and a grid to look at."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from autoencoder.fidelity import psnr, ssim
from autoencoder.images import to_uint8, to_unit
from autoencoder.perceptual import Perceptual
from autoencoder.quantizer import code_counts, perplexity, usage
from training.pictures import grids

SHOWN = 8  # columns of the picture grid
COLLAPSED = 0.05  # share of codes in use below which a codebook is said to have collapsed


def measure(
    model: Autoencoder, perceptual: Perceptual | None, batches: Iterable[Tensor], folder: Path
) -> dict[str, float]:
    """PSNR, SSIM, LPIPS of reconstructions (posterior mean, 8-bit); a grid of input, output, error in `folder`."""
    rows: dict[str, list[Tensor]] = {name: [] for name in ("psnr", "ssim", "lpips")[: 3 if perceptual else 2]}
    counts: Tensor | int = 0
    for images in batches:
        reconstruction, moments = model(images, None)
        pixels, ours = to_uint8(images), to_uint8(reconstruction)
        if model.quantize:
            counts = counts + code_counts(model.quantize.indices(moments), model.quantize.codes)
        rows["psnr"].append(psnr(ours, pixels))
        rows["ssim"].append(ssim(ours, pixels))
        if perceptual:
            rows["lpips"].append(perceptual(to_unit(ours), images))
        if len(rows["psnr"]) == 1:
            shown = {"input": pixels[:SHOWN], "reconstruction": ours[:SHOWN]}
            grids.comparison(shown).save(folder / "grid.png")
    numbers = {name: torch.cat(values).mean().item() for name, values in rows.items()}
    return numbers if isinstance(counts, int) else numbers | told_of_codes(counts)


def told_of_codes(counts: Tensor) -> dict[str, float]:
    """Usage and perplexity of code counts (codes,), and a warning where they tell of a collapse."""
    used = usage(counts).item()
    if used < COLLAPSED and used * len(counts) < 0.5 * counts.sum():  # few, though there was occasion for more
        print(
            f"warning: only {used:.1%} of the {len(counts):,} codes are in use; "
            "see model.normalize, model.codebook_decay and model.revive_every",
            file=sys.stderr,
        )
    return {"usage": used, "perplexity": perplexity(counts).item()}
