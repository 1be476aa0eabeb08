"""Pickles of weights: those that torchvision and lpips publish, by hash and as tensors alone; no others."""

from __future__ import annotations

import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import hub

from training.errors import UserError
from training.files import file_sha256
from training.models import published
from training.models.lpips import load_perceptual
from training.tensors import load_tensors


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def as_published(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(published.FILES, "vgg", f"vgg16-{file_sha256(path)[:8]}.pth")


def test_a_pickle_is_read_under_its_published_hash_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, weights = tmp_path / "it's mine.pth", {"features.0.bias": torch.arange(3.0)}
    torch.save(weights, path)
    with pytest.raises(UserError, match="refusing to load a pickle") as caught:
        published.read_weights(path)
    assert caught.value.code == 3
    command = shlex.split(caught.value.hint.split("source: ")[1].split(", and give")[0])  # the hint, followed
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert torch.equal(published.read_weights(tmp_path / "weights.safetensors")["features.0.bias"], torch.arange(3.0))
    as_published(path, monkeypatch)
    assert torch.equal(published.read_weights(path)["features.0.bias"], torch.arange(3.0))


@pytest.mark.parametrize("form", ["bare", "torch"])
def test_even_then_nothing_is_called(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash of 8 digits can be forged."""
    path, canary = tmp_path / "weights.pth", Canary(tmp_path / "canary")
    path.write_bytes(pickle.dumps(canary)) if form == "bare" else torch.save({"w": canary}, path)
    as_published(path, monkeypatch)
    with pytest.raises(UserError, match="not a file of weights") as caught:
        published.read_weights(path)
    assert caught.value.code == 3 and not (tmp_path / "canary").exists()


def test_what_lies_in_the_cache_is_held_to_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision itself checks what it downloads, not what it finds, and unpickles that without limits."""
    monkeypatch.setattr(hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(hub, "download_url_to_file", lambda *_, **__: pytest.fail("it was there"))
    path = tmp_path / "checkpoints" / published.FILES["squeeze"]
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(UserError, match="refusing to load a pickle"):
        load_perceptual("squeeze", "standard")
    assert not (tmp_path / "canary").exists()


def test_the_names_are_torchvisions() -> None:
    from torchvision import models

    theirs = (models.VGG16_Weights, models.AlexNet_Weights, models.SqueezeNet1_1_Weights, models.Inception_V3_Weights)
    assert [published.ADDRESS + name for name in published.FILES.values()] == [w.IMAGENET1K_V1.url for w in theirs]


@pytest.mark.parametrize("net", published.HEADS)
def test_the_linear_layers_of_lpips_are_pinned(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published.check_heads(net)
    monkeypatch.setitem(published.HEADS, net, "0" * 64)
    with pytest.raises(UserError, match=f"{net}.pth of the lpips package") as caught:
        published.check_heads(net)
    assert caught.value.code == 4 and "lpips==0.1.4" in caught.value.hint
    load_perceptual(net, "random")  # which has none of them


def test_safetensors_by_any_name(tmp_path: Path) -> None:
    from training.tensors import save_tensors

    save_tensors(tmp_path / "weights.pth", {"w": torch.ones(2)})
    assert published.read_weights(tmp_path / "weights.pth").keys() == load_tensors(tmp_path / "weights.pth").keys()
