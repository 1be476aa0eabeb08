"""A device that is absent or not supported is refused at every door, in one sentence that leads on."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from training.errors import UserError
from training.machine import processes

OTHERS = ["xpu", "meta", "npu", "hpu", "xla", "mps:1", "cpu:1"]
ABSENT = ["cuda:99", "mps", "mps:0", *([] if torch.cuda.is_available() else ["cuda", "cuda:0"])]


@pytest.mark.parametrize("device", [*OTHERS, *ABSENT, "gpu", "", "cuda:-1", "cuda:x", "CUDA"])
def test_refused(device: str) -> None:
    with pytest.raises(UserError, match=f"--device {device}: ") as caught:
        processes.resolve(device)
    assert caught.value.code == 2
    assert any(processes.resolve(way) for way in ("auto", "cpu") if way in caught.value.hint)


@pytest.mark.parametrize("device", ["mps", "cuda:99"])
def test_refused_at_every_door(
    device: str, latents: Path, shapes: Path, autoencoder: Path, denoiser: Path, tmp_path: Path
) -> None:
    doors: dict[str, list[object]] = {
        "train_autoencoder": ["--data", shapes, "--dry-run", *tiny.AUTOENCODER],
        "train_denoiser": ["--latents", latents, "--dry-run", *tiny.DENOISER, "--mixed-precision", "bf16"],
        "encode_latents": ["--data", shapes, "--autoencoder", autoencoder, "--output", tmp_path / "a"],
        "generate": ["--model", denoiser, "--prompt", "x", "--output", tmp_path / "b"],
        "evaluate": ["--model", denoiser, "--data", shapes, "--output", tmp_path / "c"],
        "inspect_autoencoder": [autoencoder, "--data", shapes, "--output", tmp_path / "d"],
        "train_classifier": ["--data", shapes, "--output", tmp_path / "e"],
        "benchmark": ["autoencoder"],
    }
    for door, words in doors.items():
        problem = tiny.refused(door, *words, "--device", device)
        assert (problem.code, problem.what.partition(": ")[0]) == (2, f"--device {device}"), (door, problem)


def test_cpu_by_name_and_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.resolve("cpu") == processes.resolve("cpu:0") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert processes.resolve("auto").type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert processes.resolve("auto").type == "cpu"
    with pytest.raises(UserError, match="a CPU by ACCELERATE_USE_CPU"):
        processes.resolve("cuda")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for device, sentence in {"cuda": "3 processes were started for 2 GPU", "cuda:1": "names one GPU for 3"}.items():
        with pytest.raises(UserError, match=sentence):
            processes.start(device)
