"""Upscaling measured on held-out pictures: each number against what the pipeline itself draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from autoencoder.fidelity import psnr
from ldm.upscaling import residual, upscaling
from training.data.images import Images
from training.encoding.shown import made_small
from training.measuring.held_out import even_indices
from training.models.assembly import load_pipeline
from training.models.judge import caption
from training.shards.reading import held_out_shards

FAST = ("--steps", 2, "--device", "cpu", "--samples", 2, "--count", 4)


def test_numbers_are_those_of_the_drawings(shapes: Path, upscaler: Path, tmp_path: Path) -> None:
    words = ("--model", upscaler, "--data", shapes, "--upscale", *FAST, "--seed", 9, "--obedience", "shapes")
    out = ("--output", tmp_path / "x.json", "--grid", tmp_path / "x.png")
    assert tiny.call("evaluate", *words, *out, "--batch-size", 3) == 0
    told = json.loads((tmp_path / "x.json").read_text())
    found, images = told["upscaled"], Images(held_out_shards(shapes))
    assert (tmp_path / "x.png").stat().st_size > 0 and told["factor"] == 4 and told["pictures"] == 4
    places = list(even_indices(images, 4))
    pixels = torch.cat([images[i].data for i in places])
    captions, small = [caption(images, i) for i in places], made_small(pixels, 4)
    pipe = load_pipeline(upscaler, "cpu")
    plan = type(pipe.sampling)(sampler=pipe.sampling.sampler, grid=pipe.sampling.grid, guidance=pipe.sampling.guidance,
                               steps=2)
    task = upscaling(pipe, small, level=0.0)
    draws = [torch.cat(list(pipe.pixels(captions, [9 + k + (n << 32) for k in range(4)], task=task, sampling=plan,
                                        batch_size=3))) for n in range(2)]
    singles = torch.cat([psnr(made, pixels) for made in draws]).mean().item()
    mean = torch.stack(draws).float().mean(0).round().byte()
    assert found["drawn"]["psnr"] == pytest.approx(singles, abs=1e-4)
    assert found["drawn"]["psnr_mean"] == pytest.approx(psnr(mean, pixels).mean().item(), abs=1e-4)
    off = torch.cat([residual(made, small, 4) for made in draws]).mean().item()
    assert found["drawn"]["residual"] == pytest.approx(off, abs=1e-4)
    assert found["projected"]["residual"] == found["box"]["residual"] == 0 < found["bicubic"]["residual"] < off
    assert found["projected"]["psnr"] > found["drawn"]["psnr"] and "psnr_mean" not in found["bicubic"]
    assert 0 <= found["bicubic"]["obeyed"] <= 1


def test_what_enlarges_nothing_is_refused(shapes: Path, denoiser: Path) -> None:
    problem = tiny.refused("evaluate", "--model", denoiser, "--data", shapes, "--upscale", *FAST)
    assert "image.kind none" in problem.what and "--model" in problem.hint
