"""What only the way through several doors shows: whose weights are exported, and stage two on quantised latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from autoencoder.images import to_unit
from autoencoder.norm import LatentStatistics
from training.data.images import Images
from training.data.latents import Latents
from training.files import write_json
from training.models.assembly import load_pipeline
from training.models.autoencoders import load_autoencoder
from training.runs.checkpoints import Checkpoints
from training.settings import decoding
from training.shards.reading import ShardSet
from training.tensors import load_tensors

NETWORK: dict[str, Any] = {"blocks": 1, "mid_attention": False, "encoder_channels": 8}
QUANTISED: dict[str, dict[str, Any]] = {
    "vq": {"kind": "vq", "latent_channels": 3, "codes": 32, "codebook_decay": 0.9, "revive_every": 2},
    "fsq": {"kind": "fsq", "levels": [5, 5, 5]},
}


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_the_averages_are_exported(stage: str, autoencoder: Path, denoiser: Path) -> None:
    """final/ holds the last checkpoint's ema.safetensors, which is not its model.safetensors."""
    run = {"autoencoder": autoencoder, "denoiser": denoiser}[stage]
    newest = Checkpoints(run).newest()
    assert newest is not None
    averages, live = (load_tensors(newest / f"{name}.safetensors") for name in ("ema", "model"))
    final = load_tensors(run / "final" / "model.safetensors")
    if stage == "denoiser":
        final = {f"backbone.{key}": value for key, value in final.items()}
        text = load_tensors(run / "final" / "text_encoder" / "model.safetensors")
        final |= {f"text.{key}": value for key, value in text.items()}
    exported = {f"{stage}.{key}": value for key, value in final.items() if not key.startswith("norm.")}
    assert {key for key in exported if key in averages} == averages.keys()
    assert all(torch.equal(exported[key], value) for key, value in averages.items())
    assert not all(torch.allclose(exported[key], live[key], rtol=1e-3, atol=1e-5) for key in averages)


def test_the_normaliser_is_measured_with_what_is_exported(autoencoder: Path, shapes: Path) -> None:
    model, images = load_autoencoder(autoencoder), Images(ShardSet(shapes, "train"))
    statistics, stored = LatentStatistics(model.norm, model.latent_channels), model.norm.state_dict()
    stored = {key: value.clone() for key, value in stored.items()}
    with torch.no_grad():
        statistics.add(model.encode(to_unit(next(images.chunks(range(len(images)), len(images))).data)))
    statistics.fit()
    for key, value in model.norm.state_dict().items():
        torch.testing.assert_close(value, stored[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", QUANTISED)
def test_stage_two_on_quantised_latents(kind: str, shapes: Path, tmp_path: Path) -> None:
    """Stored is z before quantisation, its scale one number; `decode` quantises what the denoiser draws."""
    config, first, latents, second = (tmp_path / name for name in ("config.json", "first", "latents", "second"))
    smoke = decoding.to_values(decoding.load("autoencoder", "smoke", {}))
    write_json(config, {**smoke, "model": NETWORK | QUANTISED[kind]})
    words = ("--data", shapes, "--output", first, *tiny.AUTOENCODER, "--config", config)
    assert tiny.call("train_autoencoder", *words) == 0
    assert 0 < tiny.rows(first)[-1]["val/usage"] <= 1
    words = ("--autoencoder", first, "--data", shapes, "--output", latents, "--device", "cpu")
    assert tiny.call("encode_latents", *words) == 0
    model, images, stored = load_autoencoder(first), Images(ShardSet(shapes)), ShardSet(latents)
    assert stored.summary["latent"]["shape"] == [3, 8, 8] and model.norm.scale.numel() == 1
    z = model.encode(to_unit(images[0].data)).detach()
    np.testing.assert_allclose(Latents(stored).moments(0), z[0].numpy(), rtol=2e-3, atol=2e-3)
    assert model.quantize is not None and not torch.allclose(model.quantize(z), z, atol=1e-2)
    assert tiny.call("train_denoiser", "--latents", latents, "--output", second, *tiny.DENOISER) == 0
    words = ("--model", second, "--prompt", "a red circle", "--output", tmp_path / "out", "--device", "cpu")
    assert tiny.call("generate", *words) == 0
    with Image.open(tmp_path / "out" / "00000.png") as picture:
        assert picture.size == (32, 32)
    decoder = load_pipeline(second, "cpu").autoencoder
    drawn = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    codes = decoder.norm(decoder.quantize(decoder.norm.inverse(drawn)))  # type: ignore[misc]
    assert not torch.allclose(codes, drawn, atol=1e-2)
    torch.testing.assert_close(decoder.decode(codes), decoder.decode(drawn))
