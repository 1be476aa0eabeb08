"""Autoencoders of ours written as diffusers' classes, and read back."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peers import CLOSE, convert, diffusers, images, stored
from torch.nn import functional as F

from autoencoder.base import Autoencoder
from training.exchange.autoencoder_layouts import LAYOUTS
from training.guarding import read_json
from training.models.autoencoders import load_autoencoder

SHAPES: dict[str, dict[str, Any]] = {
    "attention at a level": {"channels": [8, 16], "attention_at": [2]},
    "no attention": {"channels": [8, 16], "mid_attention": False},
    "four levels": {"channels": [8, 8, 16, 16], "attention_at": [4]},
    "grey": {"channels": [8, 16], "image_channels": 1},
    "two blocks": {"channels": [8, 16], "blocks": 2, "latent_channels": 6},
}  # fmt: skip


def written(home: Path, output: Path, name: str) -> Any:
    """What export gave, as diffusers loads it: every key, and nothing else."""
    peer, outcome = getattr(diffusers, name).from_pretrained(convert("export", home, output), output_loading_info=True)
    assert not any(outcome.values()), outcome
    assert json.loads((output / "config.json").read_text())["_class_name"] == name
    return peer.eval()


def back(folder: Path, home: Path, ours: Autoencoder) -> Autoencoder:
    """What export gave, read again: of the same config and the same tensors but for those around the latents."""
    again = load_autoencoder(convert("import", folder, home))
    state, folded = ours.state_dict(), ("norm.", "quant_conv.", "post_quant_conv.", "quantize.")
    assert all(
        torch.equal(value, state[key]) for key, value in again.state_dict().items() if not key.startswith(folded)
    )
    return again


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_a_kl_run_is_written_with_its_normaliser_folded_in(name: str, tmp_path: Path) -> None:
    """diffusers' latents are ours, normalised, and so is its posterior."""
    home, ours = stored(tmp_path / "ours", {"kind": "kl", "groups": 4, "blocks": 1} | SHAPES[name])
    peer = written(home, tmp_path / "theirs", "AutoencoderKL")
    about = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (about["scaling_factor"], about["shift_factor"], about["sample_size"]) == (1, 0, 32 * ours.factor)
    assert about["force_upcast"] is False and about["use_quant_conv"] and about["use_post_quant_conv"]
    x = images(ours.image_channels)
    posterior, moments = peer.encode(x).latent_dist, ours.encode(x)
    latents = ours.norm.mean_latents(moments)
    torch.testing.assert_close(posterior.mean, latents, **CLOSE)
    spread = moments.chunk(2, dim=1)[1] - 2 * ours.norm.scale.log()
    torch.testing.assert_close(posterior.parameters.chunk(2, dim=1)[1], spread, **CLOSE)
    torch.testing.assert_close(peer.decode(latents).sample, ours.decode(latents), **CLOSE)
    again = back(tmp_path / "theirs", tmp_path / "back", ours)
    torch.testing.assert_close(again.norm.mean_latents(again.encode(x)), latents, **CLOSE)
    torch.testing.assert_close(again.decode(latents), ours.decode(latents), **CLOSE)
    assert read_json(tmp_path / "back" / "config.json")["model"] == read_json(home / "config.json")["model"]


@torch.no_grad()
@pytest.mark.parametrize("name", [*SHAPES, "codes of length 1", "codes that follow averages"])
def test_a_vq_run_is_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diffusers' z are ours, under the one factor; of codes of length 1 in their direction. Pictures are the same."""
    odd = {"codes of length 1": {"normalize": True}, "codes that follow averages": {"codebook_decay": 0.9}}
    shape = {"channels": [8, 16], **SHAPES.get(name, {}), **odd.get(name, {}), "latent_channels": 3}
    model = {"kind": "vq", "groups": 4, "blocks": 1, "codes": 32, "encoder_channels": 5} | shape
    home, ours = stored(tmp_path / "ours", model, shift=0.0)
    peer = written(home, tmp_path / "theirs", "VQModel")
    assert (peer.config.scaling_factor, peer.config.sample_size) == (2, 32 * ours.factor)
    assert ("but for their length" in capsys.readouterr().err) == (name == "codes of length 1")
    x = images(ours.image_channels)
    z, theirs = ours.encode(x), peer.encode(x).latents
    torch.testing.assert_close(F.normalize(theirs, dim=1) if shape.get("normalize") else theirs, z, **CLOSE)
    picture = ours.decode(ours.norm(z))
    for latents in (theirs, z, 3 * z) if shape.get("normalize") else (theirs,):
        torch.testing.assert_close(peer.decode(latents).sample, picture, **CLOSE)
    again = back(tmp_path / "theirs", tmp_path / "back", ours)
    assert torch.equal(again.norm.scale, ours.norm.scale)
    torch.testing.assert_close(again.decode(again.norm(theirs)), picture, **CLOSE)


UNREGULARISED: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("AutoencoderTiny", {"kind": "tiny", "width": 8, "encoder_blocks": [1, 2, 0], "latent_channels": 3,
                                 "decoder_blocks": [2, 1, 1]}),
    "tiny grey": ("AutoencoderTiny", {"kind": "tiny", "width": 8, "encoder_blocks": [1, 1], "decoder_blocks": [1, 1],
                                      "image_channels": 1}),
    "dc": ("AutoencoderDC", {"kind": "dc", "channels": [8, 16, 32], "encoder_blocks": [0, 1, 1],
                             "decoder_blocks": [1, 1, 2], "latent_channels": 4, "attention_at": [4]}),
    "dc as sana": ("AutoencoderDC", {"kind": "dc", "channels": [8, 32, 32], "encoder_blocks": [1, 1, 1],
                                     "decoder_blocks": [1, 1, 1], "latent_channels": 4, "attention_at": [2, 4],
                                     "scales": [3, 5], "resample": "conv"}),
    "dc as ImageNet's": ("AutoencoderDC", {"kind": "dc", "channels": [8, 16, 32], "encoder_blocks": [0, 1, 1],
                                           "decoder_blocks": [0, 2, 1], "latent_channels": 4, "attention_at": [4],
                                           "scales": [], "batch_norm_at": [1, 2]}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", UNREGULARISED)
def test_a_tiny_or_deep_run_is_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One scale for all channels is exact, there and back again; else the nearest one is written, and told."""
    kind, model = UNREGULARISED[name]
    home, ours = stored(tmp_path / "ours", model, 0.0, 0.5)
    peer = written(home, tmp_path / "theirs", kind)
    assert peer.config.scaling_factor == 2 and "note:" not in capsys.readouterr().err
    x = images(ours.image_channels)
    z = peer.encode(x)[0]
    torch.testing.assert_close(z, ours.encode(x), **CLOSE)
    torch.testing.assert_close(peer.decode(z).sample, ours.decode(z * 2), **CLOSE)
    again = back(tmp_path / "theirs", tmp_path / "back", ours).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.state_dict().items())
    values = [read_json(folder / "config.json")["model"] for folder in (tmp_path / "back", home)]
    assert values[0] == values[1]

    home, ours = stored(tmp_path / "uneven", model)
    peer = written(home, tmp_path / "theirs-uneven", kind)
    assert "1 / rms(scale) is written" in capsys.readouterr().err
    rms = ours.norm.scale.double().square().mean().sqrt().item()
    assert peer.config.scaling_factor == pytest.approx(1 / rms, rel=1e-6)
    latents = ours.norm(ours.encode(x))
    torch.testing.assert_close(peer.decode(ours.norm.inverse(latents)).sample, ours.decode(latents), **CLOSE)


KINDS: dict[str, dict[str, Any]] = {
    "kl": {"channels": [8, 16], "groups": 4, "blocks": 1},
    "vq": {"channels": [8, 16], "groups": 4, "blocks": 1, "codes": 32, "latent_channels": 3},
    "tiny": UNREGULARISED["tiny"][1], "dc": UNREGULARISED["dc"][1],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("installed", [True, False])
def test_what_was_written_is_opened_again_and_compared(
    kind: str, installed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By our own import, and by diffusers; a layer, or the scale, that is another one leaves nothing."""
    home, _ = stored(tmp_path / "ours", {"kind": kind} | KINDS[kind], shift=0.0 if kind == "vq" else 0.7)
    if not installed:
        monkeypatch.setitem(sys.modules, "diffusers", None)
    (tmp_path / "out").mkdir()  # an empty one is as none
    convert("export", home, tmp_path / "out")
    by = r"our own import and diffusers \S+" if installed else "our own import"
    numbers = r"largest differences encode (\S+), decode (\S+), scale (\S+)\n"
    (found,) = re.findall(rf"opened again by {by}: {numbers}", capsys.readouterr().err)
    assert all(0 <= float(number) < 1e-5 for number in found)
    name, (_, usual, read, write) = next((name, one) for name, one in LAYOUTS.items() if one[0] == kind)
    for key, by_how_much in (("encoder.", 1.01), ("decoder.", 1.01), ("scale", 1.01)):

        def wrong(*given: Any, key: str = key, by: float = by_how_much) -> Any:
            about, tensors = write(*given)
            scale = {"scaling_factor": about["scaling_factor"] * by} if key == "scale" else {}
            return about | scale, {n: by * value if n.startswith(key) else value for n, value in tensors.items()}

        monkeypatch.setitem(LAYOUTS, name, (kind, usual, read, wrong))
        problem = tiny.refused("convert_autoencoder", "export", home, "--output", tmp_path / "bad")
        assert "what was written answers otherwise than the run" in problem.what and problem.code == 4
        assert {path.name for path in tmp_path.iterdir()} == {"ours", "out"}


def test_kinds_without_a_class_are_refused(tmp_path: Path) -> None:
    network = {"channels": [8], "groups": 4, "blocks": 1}
    for kind, settings in {"fsq": network, "lfq": network, "identity": {}}.items():
        home, _ = stored(tmp_path / kind, {"kind": kind, **settings})
        problem = tiny.refused("convert_autoencoder", "export", home, "--output", tmp_path / "no")
        assert f"no class for autoencoders of kind {kind}" in str(problem) and not (tmp_path / "no").exists()
