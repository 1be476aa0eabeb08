"""A model exported: its weights are rounded exactly, its hashes are those of what is loaded, nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from training import load_autoencoder, load_pipeline
from training.models.lineage import stored_ingredients
from training.tensors import content_hash

NETWORKS = {"denoiser": ".", "autoencoder": "autoencoder", "text_encoder": "text_encoder"}


def export(model: object, output: Path, dtype: str = "bfloat16") -> Path:
    assert tiny.call("export_model", model, "--output", output, "--dtype", dtype) == 0
    return output


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_the_rounded_ones_and_known_by_their_hash(name: str, denoiser: Path, tmp_path: Path) -> None:
    made = export(denoiser, tmp_path / "made")
    file, before = (home / NETWORKS[name] / "model.safetensors" for home in (made, denoiser / "final"))
    stored, exact = load_file(file), load_file(before)
    assert stored.keys() == exact.keys() and {x.dtype for x in stored.values()} == {torch.bfloat16}
    for key, value in stored.items():
        assert torch.equal(value, exact[key].bfloat16()), key
    pipeline = load_pipeline(made, "cpu")
    parts = {"denoiser": pipeline.denoiser.backbone, "autoencoder": pipeline.autoencoder, "text_encoder": pipeline.text}
    state = parts[name].state_dict()  # type: ignore[attr-defined]
    assert {x.dtype for x in state.values()} == {torch.float32}
    assert state.keys() == stored.keys()
    assert all(torch.equal(value, stored[key].float()) for key, value in state.items())
    assert content_hash(state) == stored_ingredients(made)[name] != stored_ingredients(denoiser / "final")[name]
    if name != "text_encoder":
        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            assert opened.metadata()["hash"] == content_hash(state)


def test_every_ingredient_is_named_and_the_same_export_is_the_same_files(denoiser: Path, tmp_path: Path) -> None:
    made, again = (export(denoiser, tmp_path / name) for name in ("made", "again"))
    names, expected = (sorted(path.relative_to(home) for path in home.rglob("*") if path.is_file())
                       for home in (made, denoiser / "final"))
    assert names == expected and len(names) == 12
    assert [(made / name).read_bytes() for name in names] == [(again / name).read_bytes() for name in names]
    hashes = load_pipeline(made, "cpu").hashes
    assert stored_ingredients(made) == hashes
    assert content_hash(load_autoencoder(made / "autoencoder").state_dict()) == hashes["autoencoder"]
    assert json.loads((made / "config.json").read_text()) == json.loads((denoiser / "config.json").read_text())
    assert f"| denoiser | {hashes['denoiser']} |" in (made / "README.md").read_text()


def test_float32_changes_nothing_and_a_checkpoint_is_exported_with_its_averages(denoiser: Path, tmp_path: Path) -> None:
    whole = export(denoiser, tmp_path / "whole", "float32")
    assert stored_ingredients(whole) == stored_ingredients(denoiser / "final")
    checkpoint = max((denoiser / "checkpoints").glob("step-*"))
    made = export(checkpoint, tmp_path / "made", "float32")
    assert load_pipeline(made, "cpu").hashes == load_pipeline(checkpoint, "cpu").hashes
    assert "| steps | 6 |" in (made / "README.md").read_text()


def test_what_cannot_be_exported(denoiser: Path, autoencoder: Path, tmp_path: Path) -> None:
    assert "expected denoiser" in tiny.refused("export_model", autoencoder, "--output", tmp_path / "out").what
    (tmp_path / "taken").mkdir()
    problem = tiny.refused("export_model", denoiser, "--output", tmp_path / "taken")
    assert "already exists" in problem.what and problem.hint == "choose another --output"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
