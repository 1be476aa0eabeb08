"""A guidance, a prediction, a weighting, a backbone, a text encoder and an adapter from outside pass every test of
their family.

The first three stand in for a member wherever a test is run over the family's tuple; the last three are one new file
each, written into a folder of the family's package and found there.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import test_backbones
import test_guidance
import test_objective
import test_predictions
import test_text
import torch
from adapters import test_family
from torch import Tensor

from ldm import adapters, backbones, text
from ldm.backbones import BACKBONES
from ldm.conditioning import Cond
from ldm.denoiser import Conditional
from ldm.diffusion import Denoised, Diffusion
from ldm.families import members
from ldm.guidance import GUIDANCES, Projected
from ldm.guiding import AgainstNull
from ldm.predictions import PREDICTIONS, Prediction, V
from ldm.schedules import Level
from ldm.weighting import SNR, WEIGHTINGS, Weighting


@dataclass(frozen=True, kw_only=True)
class Sign(AgainstNull):
    """Classifier-free guidance in x0, written by both ends apart."""

    kind: Literal["sign"] = "sign"

    def spared(self, x: Tensor, t: Tensor, denoiser: Conditional, cond: Cond, null: Cond) -> Denoised | None:
        return None

    def mix(self, told: Denoised, absent: Denoised, x: Tensor, level: Level) -> Denoised:
        x0, eps = (new + (self.scale - 1) * (new - old) for new, old in zip(told[:2], absent[:2], strict=True))
        return told._replace(x0=x0, eps=eps)


@dataclass(frozen=True, kw_only=True)
class Sum(Prediction):
    """y = eps - x0, which is flow's velocity on every process."""

    kind: Literal["sum"] = "sum"

    def coefficients(self, level: Level, rates: Level) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(level.alpha), torch.ones_like(level.alpha)


@dataclass(frozen=True, kw_only=True)
class Root(Weighting):
    """The root of both errors' product."""

    kind: Literal["root"] = "root"

    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        of_x0, of_eps = diffusion.gains(t)
        return (of_x0 * of_eps).sqrt()


OUTSIDERS: dict[type, type] = {Projected: Sign, V: Sum, SNR: Root}
FAMILIES = (test_guidance, test_predictions, test_objective)


def swapped(value: object) -> object:
    if isinstance(value, type):
        return OUTSIDERS.get(value, value)
    return OUTSIDERS[type(value)]() if type(value) in OUTSIDERS and value == type(value)() else value


def cases() -> Iterator[Any]:
    """Every parametrised test of a family with each of its rows that names a member, the outsider in its place."""
    for module in FAMILIES:
        for name, function in vars(module).items():
            marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
            if not name.startswith("test_") or not marks:
                continue
            tables = []
            for mark in marks:
                names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
                rows = [row if len(names) > 1 else (row,) for row in mark.args[1]]
                tables.append([dict(zip(names, row, strict=True)) for row in rows])
            for chosen in product(*tables):
                given = {key: value for row in chosen for key, value in row.items()}
                new = {key: swapped(value) for key, value in given.items()}
                if any(new[key] is not value for key, value in given.items()):
                    yield pytest.param(function, new, id=f"{name[5:]}-{'-'.join(map(str, new.values()))[:60]}")


CASES = list(cases())


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_an_outsider_passes(function: Callable[..., None], arguments: dict[str, object]) -> None:
    function(**arguments)


def test_the_families_are_all_there() -> None:
    """The list above is made by looking; these must not fall out of it."""
    ran = {case.values[0].__name__ for case in CASES}
    assert ran >= {f"test_{name}" for name in (
        "scale_one_is_the_condition_alone_bit_for_bit", "a_guided_pair_makes_up_x_again_in_one_call",
        "a_learned_variance_stays_the_conditions_own", "guidance_is_per_sample",
        "guidance_without_what_it_needs_is_refused", "weights_are_finite_and_not_negative_everywhere",
        "a_weighting_means_the_same_for_every_prediction", "both_ends_come_back", "the_ends_of_time_are_finite",
    )}
    assert {Sign, Sum, Root}.isdisjoint({*GUIDANCES, *PREDICTIONS, *WEIGHTINGS})


BACKBONE = '''
from dataclasses import dataclass
import torch
from torch import nn
from autoencoder.recompute import run
from ldm.backbones.base import Backbone, BackboneConfig
from ldm.backbones.embed import Projection, sinusoid


@dataclass(frozen=True, kw_only=True)
class Local(BackboneConfig):
    small = {"width": 16}
    kind: str = "local"
    width: int = 64
    gradient_checkpointing: bool = False

    def build(self, *, channels, context_dim, pooled_dim=None):
        return Pointwise(self, channels, context_dim)


class Pointwise(Backbone):
    def __init__(self, config, channels, context_dim):
        super().__init__(channels=channels, out_channels=channels, multiple=1)
        self.width, self.into = config.width, nn.Conv2d(channels, config.width, 1)
        self.level, self.text = Projection(config.width, config.width), nn.Linear(context_dim, config.width)
        block = [part for _ in range(3) for part in (nn.Conv2d(config.width, config.width, 1), nn.Tanh())]
        self.block, self.saving = nn.Sequential(*block), config.gradient_checkpointing
        self.out = nn.Conv2d(config.width, channels, 1)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def predict(self, x, noise_level, cond):
        mask = cond.mask[..., None].to(cond.context.dtype)
        read = self.text((cond.context.masked_fill(~cond.mask[..., None], 0) * mask).sum(1))
        told = self.level(sinusoid(noise_level, self.width)) + read
        return self.out(run(self.block, self.saving, self.into(x) + told[:, :, None, None]))


BACKBONES = (Local,)
'''
ENCODER = '''
from dataclasses import dataclass
import torch
from torch import nn
from ldm.conditioning import Cond
from ldm.text.encoders import TextConfig, TextEncoder


@dataclass(frozen=True, kw_only=True)
class Letters(TextConfig):
    kind: str = "letters"
    width: int = 8

    def vocabulary(self, captions):
        return "".join(sorted({letter for caption in captions for letter in caption}))

    def build(self, vocabulary):
        return Sums(self, vocabulary)


class Sums(TextEncoder):
    def __init__(self, config, letters):
        super().__init__(context_dim=config.width, pooled_dim=config.width, trainable=True)
        self.letters, self.rows = letters, nn.Embedding(len(letters) + 1, config.width)

    def encode(self, captions):
        found = [[1 + self.letters.find(letter) for letter in caption] for caption in captions]
        pooled = torch.stack([self.rows(torch.tensor([0, *row])).sum(0) for row in found])
        return Cond(pooled[:, None], torch.ones(len(captions), 1, dtype=torch.bool), pooled)

    def truncated(self, captions):
        return 0


TEXT_ENCODERS = (Letters,)
'''
ADAPTER = '''
from dataclasses import dataclass
import torch
from torch import nn
from ldm.adapters.base import Adapter, AdapterConfig


@dataclass(frozen=True, kw_only=True)
class Gain(AdapterConfig):
    kind: str = "gain"

    def build(self, backbone, text):
        return Louder(next(backbone.parameters()).device)


class Louder(Adapter):
    """What the backbone says, a learned share of it more."""

    def __init__(self, device):
        super().__init__()
        self.share = nn.Parameter(torch.zeros((), device=device))

    def attach(self, backbone, text):
        backbone.register_forward_hook(lambda module, given, said: said + self.strength * self.share * said)
        return backbone, text


ADAPTERS = (Gain,)
'''


def found(package: ModuleType, family: str, name: str, source: str, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """The member that one file more in a package adds to its family."""
    (folder / f"{name}.py").write_text(source)
    patch.setattr(package, "__path__", [*package.__path__, str(folder)])
    known = getattr(package, family)
    try:
        whole = members(package.__name__, family, (known[0].kind,))
    finally:
        sys.modules.pop(f"{package.__name__}.{name}", None)
    (new,) = set(whole) - set(known)
    assert whole[0] is known[0] and len(whole) == len(set(whole)) == len(known) + 1
    return new


def test_a_backbone_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found, with what others read of its config; and every test of the family that takes a config holds for it."""
    local = found(backbones, "BACKBONES", "local", BACKBONE, tmp_path, monkeypatch)
    config = local(**local.small)
    assert not config.learned_variance and not config.pooled
    ran = 0
    for name, test in vars(test_backbones).items():
        if not name.startswith("test_") or "config" not in (wanted := inspect.signature(test).parameters):
            continue
        for dtype in (torch.bfloat16, torch.float16) if "dtype" in wanted else (None,):
            test(config, **({} if dtype is None else {"dtype": dtype}))
            ran += 1
    assert ran >= 8


def test_an_adapter_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gain = found(adapters, "ADAPTERS", "gain", ADAPTER, tmp_path, monkeypatch)
    config, ran = test_family.settings(gain), 0
    test_family.test_each_is_for_some_backbone(gain)
    for name, test in vars(test_family).items():
        if name.startswith("test_") and list(inspect.signature(test).parameters) == ["case"]:
            for backbone in BACKBONES:
                test((config, backbone.kind))
                ran += 1
    assert ran >= 5 * len(BACKBONES)


def test_a_text_encoder_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = found(text, "TEXT_ENCODERS", "letters", ENCODER, tmp_path, monkeypatch)
    monkeypatch.setitem(test_text.LEARNED, "letters", letters)
    ran = 0
    for name, test in vars(test_text).items():
        if name.startswith("test_") and list(inspect.signature(test).parameters) == ["encoder"]:
            test(test_text.make("letters"))
            ran += 1
    assert ran >= 3 and json.dumps(letters().vocabulary(["ba"])) == '"ab"'
