"""One step of the loop by hand: what reaches the optimisers, the rate they step by, and the averages that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.loop.loop import Loop
from training.loop.power_ema import decay, exponent
from training.loop.stage import Stage
from training.settings.sections import Optimizer, Train

GRADIENTS = {"first": (3.0, 4.0), "second": (0.0, 12.0)}  # of norms 5 and 12


class Eight(list[int]):
    """A data set of as many samples as a batch, in no shards: here nothing reads it."""

    shards = SimpleNamespace(windows=(), buckets={})

    def __init__(self) -> None:
        super().__init__(range(8))


class Pair(Stage):
    """Two networks of two weights each, whose gradients in every step are `GRADIENTS`."""

    optimizers = {"first": (["first"], 1.0), "second": (["second"], 0.5)}  # noqa: RUF012  # as the base declares it
    score = ("loss", 1.0)

    def __init__(self) -> None:
        self.dataset = Eight()  # type: ignore[assignment]
        self.networks = {name: nn.Linear(2, 1, bias=False) for name in GRADIENTS}
        self.averaged = self.networks
        for network in self.networks.values():
            nn.init.constant_(network.weight, 2.0)  # type: ignore[arg-type]

    def connect(self) -> None:
        """No callable of it is wrapped."""

    def compiled_parts(self) -> tuple[nn.Module, ...]:
        return ()

    def backward(self, batch: Any, step: int, share: float) -> dict[str, Tensor]:
        raise NotImplementedError

    def after_backward(self, step: int) -> None:
        """Nothing is measured over a batch."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...

    def evaluate(self, folder: Path) -> dict[str, float]:
        raise NotImplementedError

    def weights(self, name: str) -> Tensor:
        """Those of one network, (2,)."""
        return next(self.networks[name].parameters()).detach()[0].clone()


def looped(run: Path, train: Train | None = None, **settings: Any) -> Loop:
    """A loop over `Pair`."""
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.0, **settings}
    train = train or Train(batch_size=8)
    return Loop(Pair(), train, Optimizer(**settings), Accelerator(cpu=True), run, 1, 8)


def take(loop: Loop, step: int, rate: float = 0.25, of: Sequence[str] = tuple(GRADIENTS)) -> dict[str, Tensor]:
    """One step on the gradients of all networks, or some; returns what it told."""
    for name in of:
        next(loop.stage.networks[name].parameters()).grad = torch.tensor([GRADIENTS[name]])
    loop.passes.losses = [torch.tensor(1.0)]
    return loop.step(step, rate)


def moments(loop: Loop, name: str) -> list[float]:
    """Adam's average of an optimiser's gradients, undone for one step: the gradient that it was given."""
    (state,) = loop.optimizers[name].state.values()
    return [float(value) for value in state["exp_avg"][0] / 0.1]


def test_watchers_see_a_validation_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the run folder, once a validation, its numbers in metrics.jsonl by then."""
    seen: list[tuple[str, Path, list[str]]] = []

    def watcher(name: str) -> Callable[[Path], None]:
        return lambda run: seen.append((name, run, (run / "metrics.jsonl").read_text().splitlines()))

    loop = looped(tmp_path)
    loop.watchers = [watcher("a"), watcher("b")]
    monkeypatch.setattr("training.loop.loop.validate", lambda stage, ema, folder: ({"loss": 0.5}, 0.5))
    loop.validate(4)
    assert seen == [(name, tmp_path, ['{"step": 4, "val/loss": 0.5}']) for name in "ab"]


@pytest.mark.parametrize(
    ("clip", "first", "second"),
    [(1.0, [0.6, 0.8], [0.0, 1.0]), (6.0, [3.0, 4.0], [0.0, 6.0]), (0.0, [3.0, 4.0], [0.0, 12.0])],
)
def test_gradients_are_clipped_for_each_optimiser_by_itself(
    tmp_path: Path, clip: float, first: list[float], second: list[float]
) -> None:
    """To a norm of at most optimizer.clip, 0 for not at all; told are the norms before."""
    loop = looped(tmp_path, clip=clip)
    told = take(loop, 0)
    assert moments(loop, "first") == pytest.approx(first, rel=1e-5)
    assert moments(loop, "second") == pytest.approx(second, rel=1e-5)
    assert {name: value.item() for name, value in told.items()} == {"grad_norm/first": 5.0, "grad_norm/second": 12.0}


def test_a_step_moves_by_the_rate_it_is_given(tmp_path: Path) -> None:
    """Adam's first step is the rate times the gradient's sign; the second optimiser has half of it."""
    loop = looped(tmp_path)
    take(loop, 0, 0.25)
    assert loop.stage.weights("first").tolist() == pytest.approx([1.75, 1.75])  # type: ignore[attr-defined]
    assert loop.stage.weights("second").tolist() == pytest.approx([2.0, 1.875])  # type: ignore[attr-defined]
    assert all(p.grad is None for network in loop.stage.networks.values() for p in network.parameters())


def test_averages_follow_each_step(tmp_path: Path) -> None:
    """The initial weights leave power averages with the first step, the running average as its warm-up has it."""
    loop = looped(tmp_path, Train(batch_size=8, ema=0.999, ema_lengths=(0.1,)))
    key, seen, power, running = "first.weight", [], torch.zeros(2), torch.full((2,), 2.0)
    for step in range(3):
        take(loop, step)
        seen.append(loop.stage.weights("first"))  # type: ignore[attr-defined]
        power = power + (1 - decay(exponent(0.1), step + 1)) * (seen[-1] - power)
        running = running + (1 - (1 + step) / (10 + step)) * (seen[-1] - running)
        assert loop.powers.shadows["0.100"][key][0].tolist() == pytest.approx(power.tolist(), rel=1e-6)
        assert loop.ema.shadow[key][0].tolist() == pytest.approx(running.tolist(), rel=1e-6)
        if step == 0:
            assert torch.equal(loop.powers.shadows["0.100"][key][0], seen[0])


def test_a_spike_moves_nothing_and_is_told(tmp_path: Path) -> None:
    """No weight and no moment; the gradients are dropped."""
    loop = looped(tmp_path, Train(batch_size=8, spike_factor=2.0))
    for step in range(20):
        assert "skipped" not in take(loop, step)
    before, kept = loop.stage.weights("first"), moments(loop, "first")  # type: ignore[attr-defined]
    next(loop.stage.networks["first"].parameters()).grad = torch.tensor([[30.0, 40.0]])
    loop.passes.losses = [torch.tensor(1.0)]
    assert loop.step(20, 0.25)["skipped"] == 1
    assert torch.equal(loop.stage.weights("first"), before)  # type: ignore[attr-defined]
    assert moments(loop, "first") == kept
    assert all(p.grad is None for network in loop.stage.networks.values() for p in network.parameters())


def test_the_average_moves_with_what_it_averages(tmp_path: Path) -> None:
    """Not in the turn of another network, which is told alone; averages over the time trained go by every step."""
    stage, train = Pair(), Train(batch_size=8, ema=0.999, ema_lengths=(0.1,))
    stage.averaged = {"first": stage.networks["first"]}
    loop = Loop(stage, train, Optimizer(betas=(0.9, 0.99), weight_decay=0.0), Accelerator(cpu=True), tmp_path, 1, 8)
    take(loop, 0)
    take(loop, 1)
    key, live = "first.weight", stage.weights("first")
    running, power = loop.ema.shadow[key].clone(), loop.powers.shadows["0.100"][key][0].clone()
    assert take(loop, 2, of=("second",)).keys() == {"grad_norm/second"}
    assert torch.equal(stage.weights("first"), live) and loop.ema.updates == 2
    assert torch.equal(loop.ema.shadow[key], running)
    expected = power + (1 - decay(exponent(0.1), 3)) * (live - power)
    assert loop.powers.shadows["0.100"][key][0].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
