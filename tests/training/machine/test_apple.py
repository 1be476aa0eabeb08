"""Apple's GPUs: chosen where they are, refused where they do not serve, and every step goes there without float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fake_mps import Shell, fake_mps
from torch import Tensor

from autoencoder.fidelity import psnr, ssim
from autoencoder.norm import LatentNorm, LatentStatistics
from autoencoder.quantizer import perplexity
from autoencoder.tiles import decode_tiled
from ldm.backbones.embed import rope_table, sincos_table
from ldm.diffusion_classifier import DiffusionClassifier
from ldm.noise import Noise
from ldm.pairing import MinibatchOT
from ldm.times import LossAware
from training.errors import UserError
from training.machine import processes
from training.measuring.calibration import Calibration
from training.models.assembly import load_pipeline
from training.models.autoencoders import load_autoencoder
from training.stages.classifier import augment


def test_the_simulation_refuses_what_the_device_refuses() -> None:
    with fake_mps() as device:
        x = torch.ones(3, device=device)
        assert isinstance(x, Shell) and x.device.type == "mps" and isinstance((x + 1)[1:], Shell)
        assert torch.equal((x * torch.tensor(2.0, dtype=torch.float64)).cpu(), torch.full((3,), 2.0))
        mistakes: list[Callable[[], Any]] = [
            lambda: x.double(), lambda: x + torch.ones(3), lambda: x.to("cpu", torch.float64),
            lambda: torch.ones(3, dtype=torch.float64).to(device),
            lambda: torch.zeros(3, dtype=torch.float64, device="mps"),
        ]  # fmt: skip
        for mistake in mistakes:
            with pytest.raises(TypeError):
                mistake()


def test_it_is_taken_where_there_is_no_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.resolve("auto") == processes.resolve("mps:0") == torch.device("mps")
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        processes.start("mps", "fp16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a machine has one such device"):
        processes.start("mps")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert processes.resolve("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert processes.resolve("auto") == torch.device("cuda")


def noise(x: Tensor) -> Noise:
    return Noise(torch.arange(len(x)).to(x.device))


def statistics(x: Tensor) -> Tensor:
    norm = LatentNorm(2).to(x.device)
    (found := LatentStatistics(norm, 2)).add(x)
    found.fit()
    return torch.cat([norm.shift, norm.scale])


def calibrated(x: Tensor) -> Tensor:
    pictures = (x.sigmoid() * 255).to(torch.uint8)
    (found := Calibration()).add(pictures, torch.stack([pictures, 255 - pictures, pictures // 2], 1))
    return found.rows[0]


def loss_aware(x: Tensor) -> Tensor:
    times = LossAware(bins=4)
    seen = times.updated(times.start(x.device), noise(x).uniform((), "t"), x.square().flatten(1).mean(1))
    return times.updated(seen, noise(x).uniform((), "u"), x.flatten(1).mean(1))


# Each on latents or pictures (4, 4, 8, 8): numbers that are computed in float64, or at places that are.
COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda x: noise(x).fold("a", 7).normal((3, 5), "b"),
    "uniform": lambda x: noise(x).uniform((2,), "b"),
    "psnr": lambda x: psnr(x.tanh(), x.roll(1, 0).tanh()),
    "ssim": lambda x: ssim(x.tanh(), x.roll(1, 0).tanh()),
    "normaliser": statistics,
    "calibration": calibrated,
    "loss-aware times": loss_aware,
    "optimal transport": lambda x: MinibatchOT()(x, x.roll(1, 0)),
    "positions": lambda x: sincos_table(8, 3, 4, 4.0, x.device) + 0 * x[0, 0, 0, 0],
    "rotary positions": lambda x: torch.stack(rope_table(8, 3, 4, 4.0, x.device)) + 0 * x[0, 0, 0, 0],
    "perplexity": lambda x: perplexity(torch.bincount(x.flatten().abs().long())),
    "augmentation": lambda x: augment((x.sigmoid() * 255).to(torch.uint8), noise(x)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_numbers_are_those_of_the_cpu(name: str) -> None:
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with fake_mps() as device:
        found = COMPUTED[name](x.to(device)).cpu()
    assert torch.equal(found, COMPUTED[name](x))


def test_the_demo_draws_and_recognises_the_same() -> None:
    def drawn(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        pipeline = load_pipeline("demo", device)
        captions = ["a red circle", "a blue square"]
        plan = pipeline.sampling.__class__(sampler=pipeline.sampling.sampler, grid=pipeline.sampling.grid,
                                           guidance=pipeline.sampling.guidance, steps=2)  # fmt: skip
        seeds = Noise.from_seeds([0, 1], device)
        latents = pipeline.latents(pipeline.guided(captions, plan=plan), seeds, pipeline.latent_shape((32, 32)), plan)
        judge = DiffusionClassifier(denoiser=pipeline.denoiser, diffusion=pipeline.denoiser.diffusion, draws=2)
        scores = judge(lambda _: latents, seeds, pipeline.text(captions))
        with torch.no_grad():
            whole = decode_tiled(pipeline.autoencoder, latents, tile=6, overlap=4)
        return latents.cpu(), whole.cpu(), scores.cpu()

    with fake_mps() as device:
        there = drawn(device)
    for ours, theirs in zip(there, drawn(torch.device("cpu")), strict=True):
        torch.testing.assert_close(ours, theirs)


FEW = ["--batch-size", "4", "--max-steps", "1", "--num-workers", "0", "--train.validation_size", "4"]


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_training_step_and_what_comes_of_it(
    stage: str, shapes: Path, latents: Path, tmp_path: Path
) -> None:
    """The same loss and gradients as on the CPU; averages, validation, checkpoint and export go through."""
    words = {
        "autoencoder": ["--data", shapes, *tiny.AUTOENCODER, "--loss.discriminator_start", "0"],
        "denoiser": ["--latents", latents, *tiny.DENOISER, "--times.kind", "loss-aware"],
    }[stage]
    rows = []
    for device in ("mps", "cpu"):
        more = ["--output", tmp_path / device, *FEW, "--device", device]
        if device == "mps":
            with fake_mps():
                assert tiny.call(f"train_{stage}", *words, *more) == 0
        else:
            assert tiny.call(f"train_{stage}", *words, *more) == 0
        rows.append(tiny.rows(tmp_path / device))
        assert json.loads((tmp_path / device / "run.json").read_text())["environment"]["device"] == device
    assert len(rows[0]) == len(rows[1]) >= 2
    for ours, theirs in zip(*rows, strict=True):  # Adam's first step makes a rounding error of small gradients large
        moved = theirs["step"] > 0 and "loss" not in theirs
        assert ours == pytest.approx(theirs, rel=1e-2 if moved else 1e-4, abs=1e-3 if moved else 1e-5)


def test_encoding_and_measuring(autoencoder: Path, shapes: Path, tmp_path: Path) -> None:
    with fake_mps() as device:
        assert load_autoencoder(autoencoder, device).norm.scale.device.type == "mps"
        words = ["--autoencoder", autoencoder, "--data", shapes, "--output", tmp_path / "latents"]
        assert tiny.call("encode_latents", *words, "--num-workers", "0", "--device", "mps") == 0
        measure = ["--model", autoencoder, "--data", shapes, "--count", "10", "--device", "auto"]
        assert tiny.call("evaluate", *measure, "--output", tmp_path / "there.json") == 0
    assert tiny.call("evaluate", *measure[:-1], "cpu", "--output", tmp_path / "here.json") == 0
    there, here = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("there", "here"))
    for key in ("psnr", "ssim", "frechet"):
        assert there[key] == pytest.approx(here[key], rel=1e-4)
