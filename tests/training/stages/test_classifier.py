"""The small classifier: how its pictures are moved, what it is fitted to, and which captions it is measured by."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.noise import Noise
from training.data.order import DataOrder, Slot
from training.data.samples import Batch
from training.errors import UserError
from training.files import write_json
from training.loop.optim import learning_rate, set_learning_rate
from training.models.judge import KINDS, Classifier, Judge, Residual, load_classifier
from training.settings.sections import Optimizer
from training.stages.classifier import ClassifierStage, accuracy, augment, fit
from training.tensors import save_tensors


def test_each_picture_is_moved_by_its_own_numbers() -> None:
    """Shifted by floor(5 u - 2) pixels down and right, border pixels repeated, then mirrored where u < 1/2."""
    pixels = torch.arange(64 * 3 * 8 * 8).view(64, 3, 8, 8).remainder(251).to(torch.uint8)
    noise = Noise(torch.arange(64))
    u = noise.uniform((3,), "augment")
    moved = augment(pixels, noise)
    for i in range(64):
        down, right = (int((value * 5 - 2).floor()) for value in u[i, :2])
        rows = [min(max(y + down, 0), 7) for y in range(8)]
        columns = [min(max(x + right, 0), 7) for x in range(8)]
        wanted = pixels[i][:, rows][:, :, columns[::-1] if u[i, 2] < 0.5 else columns]
        assert torch.equal(moved[i], wanted), i
    assert 24 <= (u[:, 2] < 0.5).sum() <= 40
    assert {int(v) for v in (u[:, :2] * 5 - 2).floor().flatten()} == {-2, -1, 0, 1, 2}


class Brightness(torch.nn.Module):
    """Gives class k the logit -|255 k / 2 - brightness|: dark, grey or bright."""

    classes = ("dark", "grey", "bright")

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixels: Tensor) -> Tensor:
        means = pixels.float().mean((1, 2, 3))[:, None]
        return -(torch.tensor([0.0, 127.5, 255.0]) - means).abs() + self.weight


class Greys:
    """Pictures of one brightness each, with their captions."""

    values, captions = (0, 120, 250, 10, 240), ("dark", "grey", "bright", "bright", "bright")

    def __init__(self) -> None:
        self.shards = SimpleNamespace(read_field=lambda i, field: f" {self.captions[i]}\n".encode())

    def __len__(self) -> int:
        return len(self.values)

    def chunks(self, places: Any, size: int, doing: str = "") -> Any:
        data = torch.tensor([self.values[i] for i in places], dtype=torch.uint8)[:, None, None, None]
        yield SimpleNamespace(data=data.expand(-1, 3, 4, 4), slots=torch.tensor(list(places)))


class Halves(Greys):
    """Sixty-four dark and bright pictures in turn."""

    values, captions = (20, 230) * 32, ("dark", "bright") * 32

    def __init__(self) -> None:
        super().__init__()
        self.shards.windows, self.shards.remote, self.shards.buckets = (), None, {}

    def __getitems__(self, slots: list[Slot]) -> Batch:
        indices = [slot.index for slot in slots]
        data = next(self.chunks(indices, len(slots))).data
        return Batch(data, torch.tensor([slot.slot for slot in slots]), [""] * len(slots), indices=indices)


def test_a_classifier_is_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of moved pictures with their own labels, at a rate that rises and falls; then it names them all."""
    rates, moved = list[float](), list[tuple[list[int], list[int]]]()

    def move(pixels: Tensor, noise: Noise) -> Tensor:
        moved.append((pixels[:, 0, 0, 0].tolist(), noise.seeds.tolist()))
        return augment(pixels, noise)

    def rate(optimizer: Any, value: float) -> None:
        rates.append(value)
        set_learning_rate(optimizer, value)

    monkeypatch.setattr("training.stages.classifier.augment", move)
    monkeypatch.setattr("training.loop.optim.set_learning_rate", rate)
    torch.manual_seed(0)
    data, model = Halves(), Classifier(("bright", "dark"), 4)
    labels = torch.tensor([model.classes.index(name) for name in data.captions])
    stage = ClassifierStage(model, data, labels, data, 7)  # type: ignore[arg-type]
    assert fit(stage, tmp_path, 160, 8, "cpu") == 1
    settings = Optimizer(lr=2e-3, warmup=100, decay="cosine")
    assert rates == pytest.approx([learning_rate(settings, step, 160) for step in range(160)])
    for step, (values, seeds) in enumerate(moved):
        slots = DataOrder(64, 8, 7).at(step, 0, 8)
        assert values == [data.values[slot.index] for slot in slots]
        assert seeds == Noise(torch.tensor([slot.slot for slot in slots])).fold(7).seeds.tolist()
    assert not model.training and accuracy(model, data) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_either_network_learns_and_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    """Named wrongly half the time before, always rightly after; features and maps are four widths wide."""
    torch.manual_seed(0)
    data, model = Halves(), Classifier(("bright", "dark"), 4, kind)
    labels = torch.tensor([model.classes.index(name) for name in data.captions])
    assert accuracy(model.eval(), data) == 0.5  # type: ignore[arg-type]
    assert fit(ClassifierStage(model, data, labels, data, 7), tmp_path, 160, 8, "cpu") == 1  # type: ignore[arg-type]
    save_tensors(tmp_path / "model.safetensors", model.state_dict())
    write_json(tmp_path / "config.json", {"classes": ["bright", "dark"], "width": 4, "kind": kind})
    found, pixels = load_classifier(tmp_path), torch.rand(2, 1, 16, 24) * 2 - 1
    assert found.kind == kind and torch.equal(found(pixels), model(pixels))
    places = found.places(pixels)
    assert places.shape == (2, 16, 4, 6)
    torch.testing.assert_close(found.features(pixels), places.mean((2, 3)))


def test_a_residual_block_adds_to_its_skip() -> None:
    torch.manual_seed(0)
    block, x = Residual(4, 6, 2), torch.randn(2, 4, 8, 10)
    added = block(x) - block.skip(x)
    assert added.shape == (2, 6, 4, 5) and added.std() > 0.01
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    torch.testing.assert_close(block(x), block.skip(x))


def test_a_residual_judge_takes_pictures_of_any_size() -> None:
    model = Classifier(("a", "b"), 2, "residual").eval()
    pixels = torch.rand(3, 3, 30, 21)
    assert model(pixels).shape == (3, 2) and model.places(pixels).shape == (3, 8, 8, 6)


def test_an_unknown_network_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", Classifier(("a", "b"), 4).state_dict())
    write_json(tmp_path / "config.json", {"classes": ["a", "b"], "width": 4, "kind": "newer"})
    with pytest.raises(UserError, match="not the config of a classifier"):
        load_classifier(tmp_path)


def test_accuracy_is_the_share_of_captions_named() -> None:
    assert accuracy(Brightness(), Greys()) == pytest.approx(4 / 5)  # type: ignore[arg-type]


def test_the_judge_tells_the_log_probability_of_each_caption() -> None:
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 255.0)])
    logits = Brightness()(images).detach().double()
    wanted = [logits[0, 2] - logits[0].logsumexp(0), logits[1, 0] - logits[1].logsumexp(0)]
    found = Judge(Brightness())(images, ["bright", "dark"])  # type: ignore[arg-type]
    assert found.detach().tolist() == pytest.approx(torch.stack(wanted).tolist(), rel=1e-6)
