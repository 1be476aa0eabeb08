"""Weights that are no weights: refused by the name of the tensor, before anything is drawn or encoded with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from training.errors import UserError
from training.models.assembly import load_pipeline
from training.models.autoencoders import load_autoencoder
from training.models.folders import fill
from training.tensors import load_tensors, save_tensors


def one(value: float) -> Callable[[Tensor], Tensor]:
    """One number of a tensor replaced."""

    def change(tensor: Tensor) -> Tensor:
        flat = tensor.flatten().clone()
        flat[-1] = value
        return flat.view(tensor.shape)

    return change


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan": (one(float("nan")), "is not finite (1 of its "),
    "inf": (one(float("-inf")), "is not finite (1 of its "),
    "int8": (lambda tensor: tensor.to(torch.int8), "is int8, not floating-point numbers"),
    "bool": (lambda tensor: tensor > 0, "is bool, not floating-point numbers"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "is complex64, not floating-point numbers"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("part", ["model", "text_encoder/model", "autoencoder/model"])
def test_weights_that_are_none_never_draw(case: str, part: str, denoiser: Path, tmp_path: Path) -> None:
    change, said = WRONG[case]
    part += ".safetensors"
    final = Path(shutil.copytree(denoiser / "final", tmp_path / "final"))
    tensors = load_tensors(final / part)
    name = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point())[-1]
    save_tensors(final / part, {**tensors, name: change(tensors[name])})
    load = load_autoencoder if part.startswith("autoencoder") else load_pipeline
    with pytest.raises(UserError) as caught:
        load(final / "autoencoder" if part.startswith("autoencoder") else final, "cpu")
    assert caught.value.code == 4 and f"tensor {name} " in caught.value.what and said in caught.value.what
    problem = tiny.refused("generate", "--model", final, "--output", tmp_path / "out", "--prompt", "x")
    assert f"tensor {name} " in problem.what and not (tmp_path / "out").exists()


def test_precisions_are_no_fault_and_whole_numbers_stay_whole() -> None:
    norm = torch.nn.BatchNorm1d(2)
    state = norm.state_dict()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        fill(norm, {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, Path("x"))
    fill(norm, {**state, "num_batches_tracked": torch.tensor(1.0)}, Path("x"))  # as other programs store a counter
    with pytest.raises(UserError, match="num_batches_tracked is float32, not whole numbers"):
        fill(norm, {**state, "num_batches_tracked": torch.tensor(1.5)}, Path("x"))
