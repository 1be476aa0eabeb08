"""Power-function averages of weights, and averages of any length made from their snapshots after training.

The average of length sigma_rel weighs the weights of step tau by tau^gamma: its width is sigma_rel of the time trained,
however long that was. Every such profile is nearly a sum of the profiles that were stored, so the same sum of the
stored weights is the average that was never kept. Karras et al. 2024 (arXiv 2312.02696), section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from training.errors import CHECKPOINT, USAGE, UserError
from training.guarding import make_folder
from training.loop.sharding import gathered
from training.runs.parts import local
from training.tensors import load_tensors, save_tensors

FOLDER = "ema"  # of a run: step-00001000.safetensors, with `LENGTH/parameter` in it


class Profile(NamedTuple):
    """An average as of step t with exponent gamma: weights (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]."""

    t: float
    gamma: float

    def dot(self, other: Profile) -> float:
        """The integral of the product of both profiles."""
        early, late = sorted([self, other])
        overlap: float = (early.t / late.t) ** late.gamma / late.t
        return (self.gamma + 1) * (other.gamma + 1) / (self.gamma + other.gamma + 1) * overlap


def exponent(length: float) -> float:
    """gamma of the profile of relative width sigma_rel = `length`: the largest root of
    (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = sigma_rel^2. Raises ValueError outside (0, 0.2887]."""
    if not 0 < length <= 12**-0.5:
        raise ValueError(f"the length of an average must lie in (0, {12**-0.5:.4f}], got {length}")
    rest = length**-2
    return float(max(root.real for root in np.roots([1, 7, 16 - rest, 12 - rest]) if abs(root.imag) < 1e-9))


def decay(gamma: float, step: int) -> float:
    """beta of the update that takes in step number `step`, from 1: (1 - 1 / step)^(gamma + 1); 0 on the first."""
    return float((1 - 1 / step) ** (gamma + 1))


def mixture(profiles: Sequence[Profile], target: Profile) -> np.ndarray:
    """The weights of stored averages in `target`: the least squares of their profiles, itself where stored."""
    if target in profiles:
        return np.asarray([float(place == list(profiles).index(target)) for place in range(len(profiles))])
    products = np.array([[a.dot(b) for b in profiles] for a in profiles])
    aim = np.array([a.dot(target) for a in profiles])
    # Scaled to unit diagonal, which keeps early snapshots, of tiny overlap, from being rounded away.
    scale = 1 / np.sqrt(products.diagonal())
    solution = np.linalg.lstsq(products * scale * scale[:, None], aim * scale, rcond=None)[0]
    return np.asarray(solution * scale)


class PowerAverages:
    """Averages of several lengths beside each other: e <- beta e + (1 - beta) p. Float32, whatever the model's type."""

    def __init__(self, modules: Mapping[str, nn.Module], lengths: Sequence[float]) -> None:
        self.exponents = {f"{length:.3f}": exponent(length) for length in lengths}
        self._live = {
            f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()
            if p.requires_grad
        }
        self.shadows = {
            length: {key: p.detach().float().clone() for key, p in self._live.items()} for length in self.exponents
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the live weights after optimiser step number `step`, from 1."""
        if not self.shadows:
            return
        live = [local(p.detach()).float() for p in self._live.values()]
        for length, gamma in self.exponents.items():
            shadows = [local(shadow) for shadow in self.shadows[length].values()]
            torch._foreach_lerp_(shadows, live, 1 - decay(gamma, step))

    def tensors(self) -> dict[str, Tensor]:
        """Every average by `LENGTH/parameter`."""
        return {f"{length}/{key}": value for length, part in self.shadows.items() for key, value in part.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`; other names are passed over."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])

    def keep(self, run: Path, step: int, *, main: bool = True) -> None:
        """Store a snapshot in the run's folder, whole or not at all, in the `main` process; nothing where nothing is
        averaged. Collective where averages are shared out."""
        tensors = gathered(self.tensors(), keep=main)
        if not tensors:
            return
        folder = run / FOLDER
        make_folder(folder)
        save_tensors(folder / f"step-{step:08d}.safetensors", tensors)


def drop_after(run: Path, step: int) -> list[str]:
    """Remove the snapshots of steps after `step`, of a future that a run gives up as it goes on from there; the names
    of what was removed."""
    later = [path for number, path in snapshots(run / FOLDER).items() if number > step]
    for path in later:
        path.unlink()
    return [path.name for path in later]


def snapshots(folder: Path) -> dict[int, Path]:
    """The snapshots of a folder by their steps, in the order of these."""
    found = {path.stem.removeprefix("step-"): path for path in folder.glob("step-*.safetensors")}
    return {int(number): found[number] for number in sorted(found, key=int)}


def reconstruct(
    folder: Path, length: float, step: int | None = None, end: int | None = None
) -> tuple[dict[str, Tensor], int]:
    """The average of relative width `length` as of `step` (the last snapshot's when not given), and that step.

    Snapshots of steps after `end`, where the run ended, are not of it: it went on from before them. Reads one snapshot
    at a time. Raises UserError where there are none up to that step.
    """
    known = {n: path for n, path in snapshots(folder).items() if end is None or n <= end}
    at = max(known, default=0) if step is None else step
    files = {number: path for number, path in known.items() if number <= at}
    if not files:
        raise UserError(
            f"{folder}: no snapshots of averages" + (f" up to step {step}" if known else ""),
            hint="train with --train.ema_lengths 0.05,0.1 and --train.ema_every N"
            if not known else f"the first is of step {min(known)}", code=CHECKPOINT)
    try:
        target = Profile(at, exponent(length))
    except ValueError as failure:
        raise UserError(str(failure), hint="EDM2 used 0.05 to 0.15", code=USAGE) from None
    names = sorted({key.partition("/")[0] for key in load_tensors(next(iter(files.values())))})
    places = [(number, name) for number in files for name in names]
    weights = dict(zip(places, mixture([Profile(n, exponent(float(name))) for n, name in places], target), strict=True))
    total: dict[str, Tensor] = {}
    for number, path in files.items():
        for key, value in load_tensors(path).items():
            name, _, parameter = key.partition("/")
            part = value.double() * float(weights[number, name])
            total[parameter] = total[parameter] + part if parameter in total else part
    return {key: value.float() for key, value in total.items()}, at
