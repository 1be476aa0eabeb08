"""Which captions stage two learns from, and the numbers and pictures that it validates with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import denoiser_steps
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning import Cond
from ldm.noise import Noise
from ldm.objectives import LEVELS
from training.data.latents import joined
from training.data.order import Slot
from training.data.samples import Batch
from training.loop.loop import Loop
from training.pictures import grids
from training.stages.denoiser import SHOWN, VALIDATION_SEED, Captions, DenoiserStage

make = denoiser_steps.make
Make = Callable[..., tuple[DenoiserStage, Loop]]
KEEP = torch.tensor([True, False, True, False])
CAPTIONS = ["one", "two", "three", "four"]


class Lengths:
    """A frozen text encoder: a caption is one token, the number of its letters."""

    trainable = False

    def __call__(self, captions: list[str]) -> Cond:
        numbers = torch.tensor([float(len(caption)) for caption in captions])
        return Cond(numbers[:, None, None], torch.ones(len(captions), 1, dtype=torch.bool), numbers[:, None])


def batch(text: list[dict[str, Tensor]] | None = None) -> Batch:
    return Batch(torch.zeros(4, 8, 8, 8), torch.arange(4), CAPTIONS, text and joined(text))


def test_a_dropped_caption_is_the_empty_one_where_the_text_encoder_learns(make: Make) -> None:
    """Also of latents that hold embeddings, which it does not read."""
    stage, _ = make()
    for text in (None, [{"context": torch.ones(1, 2)}] * 4):
        assert stage.condition(batch(text), KEEP).texts == ["one", "", "three", ""]


def test_a_dropped_caption_is_the_empty_one_where_the_text_encoder_is_frozen(make: Make) -> None:
    stage, _ = make()
    stage.text = Lengths()  # type: ignore[assignment]
    cond = stage.condition(batch(), KEEP)
    assert cond.context.flatten().tolist() == cond.pooled.flatten().tolist() == [3, 0, 5, 0]


@pytest.mark.parametrize("pooled", [True, False])
def test_a_dropped_caption_is_the_empty_one_where_embeddings_are_stored(make: Make, pooled: bool) -> None:
    """Captions of one to four tokens, each token 1 to 4; the empty caption's single token is -1."""
    stage, _ = make()
    stage.text = Lengths()  # type: ignore[assignment]
    stage.null = Cond(torch.full((1, 1, 2), -1.0), torch.ones(1, 1, dtype=torch.bool), torch.full((1, 3), -1.0))
    stored = [{"context": torch.full((n, 2), float(n), dtype=torch.float16)} for n in (1, 2, 3, 4)]
    if pooled:
        stored = [{**text, "pooled": torch.full((3,), 10.0 * n)} for n, text in enumerate(stored, 1)]
    cond = stage.condition(batch(stored), KEEP)
    rows = [[1, 0, 0, 0], [-1, 0, 0, 0], [3, 3, 3, 0], [-1, 0, 0, 0]]
    assert cond.context.dtype == torch.float32 and cond.context[:, :, 0].tolist() == cond.context[:, :, 1].tolist()
    assert cond.context[:, :, 0].tolist() == rows
    assert cond.mask.tolist() == [[value != 0 for value in row] for row in rows]
    assert (cond.pooled[:, 2].tolist() if pooled else cond.pooled) == ([10, -1, 30, -1] if pooled else None)


def test_extras_stay_with_their_sample_whatever_becomes_of_its_caption(make: Make) -> None:
    """On all three ways: read by an encoder that learns, by a frozen one, and stored."""
    stage, _ = make()
    hints = {"image": torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)}
    learned = stage.condition(batch()._replace(extras=hints), KEEP)
    seen: list[Cond] = []
    stage.network.backbone.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    stage.network(torch.zeros(4, 4, 8, 8), torch.full((4,), 500.0), learned)
    stage.text = Lengths()  # type: ignore[assignment]
    frozen = stage.condition(batch()._replace(extras=hints), KEEP)
    stage.null = Cond(torch.full((1, 1, 2), -1.0), torch.ones(1, 1, dtype=torch.bool), None)
    stored = [{"context": torch.full((1, 2), 1.0)}] * 4
    kept = stage.condition(batch(stored)._replace(extras=hints), KEEP)
    assert all(torch.equal(cond.image, hints["image"]) for cond in (*seen, frozen, kept)) and len(seen) == 1
    assert len(set(learned.distinct())) == 4 and learned._replace(extras={}).distinct() == ["one", "", "three", ""]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_share_of_captions_dropped(make: Make, dropout: float) -> None:
    """Keyed by (seed, step, slot): those whose number is below conditioning.dropout, a quarter of 800."""
    stage, _ = make(conditioning__dropout=str(dropout), train__seed="5")
    kept: list[Tensor] = []

    class Seen(Exception):
        pass

    def seen(batch: Batch, keep: Tensor) -> Any:
        kept.append(keep)
        raise Seen

    stage.condition = seen  # type: ignore[method-assign]
    for step in range(100):
        slots = [Slot(i, 0, 8 * step + i) for i in range(8)]
        with pytest.raises(Seen):
            stage.backward(stage.dataset.__getitems__(slots), step, 1.0)
        numbers = Noise(torch.arange(8) + 8 * step).fold(5, step).uniform((1,), "dropout")[:, 0]
        assert torch.equal(kept[-1], numbers >= dropout)
    dropped = 1 - torch.cat(kept).float().mean().item()
    assert dropped == pytest.approx(dropout, abs=0.02) and (dropout or dropped == 0)


def shaken(stage: DenoiserStage) -> None:
    """Weights at which the network, which begins by answering 0, tells captions and noise levels apart."""
    generator = torch.Generator().manual_seed(0)
    for parameter in stage.network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def test_the_loss_of_a_step_by_hand(make: Make) -> None:
    """Mean over the samples, each with its own time, noise and posterior draw, all keyed by (seed, step, slot)."""
    stage, _ = make(conditioning__dropout="0.5", train__seed="5")
    shaken(stage)
    batch = stage.dataset.__getitems__([Slot(i, 0, 24 + i) for i in range(8)])
    noise, losses = Noise(24 + torch.arange(8)).fold(5, 3), []
    times = stage.config.times.sample(noise.uniform((), "time"), stage.config.schedule)
    kept = noise.uniform((1,), "dropout")[:, 0] >= 0.5
    for i in range(8):
        caption = batch.captions[i] if kept[i] else ""
        losses.append(error(stage, batch.data[[i]], [caption], float(times[i]), noise[i : i + 1], "eps"))
    loss, parameters = torch.stack(losses).mean(), [p for p in stage.network.parameters() if p.requires_grad]
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss / 4, parameters, materialize_grads=True)])
    told = stage.backward(batch, 3, 1 / 4)
    found = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])
    assert told["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_validation_by_hand(make: Make, tmp_path: Path) -> None:
    """One held-out sample at a time, each with its caption and its own noise, at five levels; the loss is their mean.

    The grid shows the first distinct held-out captions, drawn from seed 0 on.
    """
    stage, _ = make(train__validation_size="12")
    shaken(stage)
    asked: list[tuple[list[str], dict[str, Any]]] = []
    images = [Image.new("RGB", (32, 32), (10 * n, 0, 255 - 10 * n)) for n in range(SHOWN)]
    stage.pipeline = lambda captions, watch, **how: asked.append((captions, how)) or images  # type: ignore[assignment]
    with torch.no_grad():
        numbers = stage.evaluate(tmp_path)
        errors = {t: [by_hand(stage, index, t) for index in stage.held_out.evenly(12)] for t in LEVELS}
    wanted = {f"loss_t{t}": sum(values) / 12 for t, values in errors.items()}
    assert numbers == pytest.approx({"loss": sum(wanted.values()) / 5, **wanted}, rel=1e-5)
    captions = list(dict.fromkeys(stage.held_out.captions(i)[0] for i in range(len(stage.held_out))))
    shown = [captions[i % len(captions)] for i in range(SHOWN)]
    assert asked == [(shown, {"seeds": 0, "extras": {}, "batch_size": SHOWN})]
    grid = np.asarray(grids.grid(images, 8, captions=shown))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), grid)


def by_hand(stage: DenoiserStage, index: int, t: float) -> float:
    """The error of one held-out sample at time t."""
    sample, noise = stage.held_out.__getitems__([Slot(index, 0, index)]), Noise.from_seeds([index + VALIDATION_SEED])
    return error(stage, sample.data, sample.captions, t, noise, "eps", str(t)).item()


def error(
    stage: DenoiserStage, moments: Tensor, captions: list[str], t: float, noise: Noise, *key: int | str
) -> Tensor:
    """Mean squared error of the velocity eps - x0 of one sample."""
    mean, logvar = moments.chunk(2, dim=1)
    z = mean + (logvar / 2).exp() * noise.normal(mean.shape[1:], "posterior")
    x0, eps = (z - stage.norm.shift) / stage.norm.scale, noise.normal(mean.shape[1:], *key)
    velocity = stage.network((1 - t) * x0 + t * eps, torch.tensor([1000 * t]), Captions(captions, {}))
    assert isinstance(velocity, Tensor)
    return (velocity - (eps - x0)).square().mean()


def test_a_pairing_without_a_choice_is_told_once(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a line of its own, and nothing where two samples of the batch have one caption."""
    stage, _ = make(pairing__kind="minibatch-ot")
    batch = stage.dataset.__getitems__([Slot(i, 0, i) for i in range(4)])
    stage.backward(batch._replace(captions=["a", "b", "a", "c"]), 0, 1.0)
    assert "pairs nothing" not in capsys.readouterr().err
    for step in (1, 2):
        stage.backward(batch._replace(captions=["a", "b", "d", "c"]), step, 1.0)
    told = "warning: minibatch-ot pairs nothing: no two samples of a batch have the same condition\n"
    assert capsys.readouterr().err.count(told) == 1


def test_an_earlier_rule_of_pairing_is_told(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, other = make(pairing__kind="minibatch-ot")[0], make()[0]
    capsys.readouterr()
    stage.load_state(stage.state())
    other.load_state({})
    assert not capsys.readouterr().err
    stage.load_state({})
    assert "note: this run was begun by a version whose minibatch-ot may have paired" in capsys.readouterr().err
