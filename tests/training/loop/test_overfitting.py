"""Over-fitting is told at exactly the validations that show it; training and held-out samples are measured alike."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import autoencoder_steps
import denoiser_steps
import pytest
import tiny
import torch
from torch import nn

from training.data.images import Images
from training.data.latents import Latents
from training.files import finite
from training.loop.loop import Loop
from training.loop.overfitting import Overfitting
from training.loop.validation import validate
from training.runs.checkpoints import Checkpoints
from training.shards.reading import ShardSet

make_autoencoder, make_denoiser = autoencoder_steps.make, denoiser_steps.make
Make = Callable[..., tuple[Any, Loop]]
Pairs = Sequence[tuple[float, float]]


def told(pairs: Pairs, watch: Overfitting | None = None) -> list[int]:
    """The validations at which it is said, of (held-out, training) scores."""
    watch = watch or Overfitting()
    return [step for step, pair in enumerate(pairs) if watch.look(step, *pair)]


RISING = [(1.0, 0.9), (1.1, 0.8), (1.2, 0.7), (1.3, 0.6)]


def test_three_rises_beside_a_falling_training_score_are_told_once() -> None:
    assert told(RISING) == [3] and told([(2.0, 2.0), *RISING, (1.4, 0.5), (1.5, 0.4)]) == [4]


@pytest.mark.parametrize(
    "pairs",
    [
        RISING[:3],  # two rises
        [(1.0, 0.9), (1.1, 0.8), (1.1, 0.7), (1.3, 0.6)],  # a look at which it stood still
        [(1.0, 0.6), (1.1, 0.6), (1.2, 0.6), (1.3, 0.6)],  # training does not get better
        [(1.0, 0.98), (1.01, 0.97), (1.02, 0.96), (1.03, 0.94)],  # a gap below a tenth
        [(1.3, 0.9), (1.2, 0.8), (1.1, 0.7), (1.0, 0.1)],  # held-out scores get better
    ],
)
def test_anything_less_is_not_told(pairs: Pairs) -> None:
    assert told(pairs) == []


def test_scores_below_zero_are_judged_alike() -> None:
    """PSNR in dB, turned: held out 30 falling to 27, training rising to 31 (a gap of 4) or to 29 (of 2)."""
    held = [-30.0, -29.0, -28.0, -27.0]
    assert told(list(zip(held, [-28.0, -29.0, -30.0, -31.0], strict=True))) == [3]
    assert told(list(zip(held, [-28.0, -28.5, -28.7, -29.0], strict=True))) == []


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_says_the_same(stop: int) -> None:
    """Wherever it was stopped, through the JSON of a checkpoint: at the same validation, and not again."""
    rising = [*RISING, (1.4, 0.5)]
    first = Overfitting()
    before = told(rising[:stop], first)
    second = Overfitting()
    second.load(json.loads(json.dumps(first.state())))
    after = [stop + step for step in told(rising[stop:], second)]
    assert before + after == [3] and second.told and len(second.recent) == 4


@pytest.mark.parametrize("pair", [(math.nan, 0.8), (math.inf, 0.8), (1.1, math.nan), (-math.inf, -math.inf)])
def test_a_score_that_is_no_number_begins_anew(pair: tuple[float, float]) -> None:
    """No checkpoint keeps such a number: a resumed run would meet null in its place."""
    watch = Overfitting()
    assert told([*RISING[:3], pair, RISING[3]], watch) == [] and watch.recent == [(4, *RISING[3])]
    again = Overfitting()
    again.load(json.loads(json.dumps(finite(watch.state()))))
    assert told([(1.4, 0.5), (1.5, 0.4), (1.6, 0.3)], again) == [2]


def test_the_sentence_names_the_best_checkpoint(tmp_path: Path) -> None:
    watch = Overfitting()
    told(RISING, watch)
    for step, score in ((1, 1.0), (2, 1.1), (3, None)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"score": score, "scored_by": 2}))
    said = watch.sentence("loss", 1.0, Checkpoints(tmp_path), "; and so on")
    assert "held-out loss became worse at 3 validations in a row (1 at step 0, 1.3 at step 3)" in said
    assert f"--model {tmp_path}/checkpoints/step-00000001; or train on more pictures; and so on" in said
    assert "no checkpoint has a score" in watch.sentence("psnr", -1.0, Checkpoints(tmp_path / "none"), "")
    assert "(-1 at step 0, -1.3 at step 3)" in watch.sentence("psnr", -1.0, Checkpoints(tmp_path), "")


def test_the_gap_of_the_same_latents_is_none(make_denoiser: Make, latents: Path, tmp_path: Path) -> None:
    """Exactly: mirrored variants and the seed of captions make no difference; of other latents there is one."""
    flags = {"train__validation_size": "8", "sample__steps": "1", "sample__size": "[32, 32]"}
    stage, loop = make_denoiser(**flags)
    for p in stage.network.parameters():
        nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(0))
    stage.dataset = Latents(ShardSet(latents, "train"), flip=True, seed=7)
    other = validate(stage, loop.ema, tmp_path)[0]
    assert other["loss_gap"] == other["loss"] - other["loss_train"] != 0
    stage.held_out = Latents(ShardSet(latents, "train"))
    same = validate(stage, loop.ema, tmp_path)[0]
    assert same["loss_gap"] == 0 and same["loss"] == same["loss_train"] == other["loss_train"]


def test_the_gap_of_the_same_pictures_is_none(make_autoencoder: Make, shapes: Path, tmp_path: Path) -> None:
    stage, loop = make_autoencoder(loss__perceptual="0", loss__adversarial="0")
    stage.dataset = Images(ShardSet(shapes, "train"), flip=True, seed=7)
    other = validate(stage, loop.ema, tmp_path)[0]
    assert other["psnr_gap"] == other["psnr_train"] - other["psnr"] != 0
    stage.held_out = Images(ShardSet(shapes, "train"))
    same = validate(stage, loop.ema, tmp_path)[0]
    assert same["psnr_gap"] == 0 and same["psnr"] == same["psnr_train"] == other["psnr_train"]


def test_a_training_writes_both_and_warns(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a training whose held-out loss is told to rise; a stopped one that goes on says it once, too."""
    told = iter([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
    validated = "training.stages.denoiser.DenoiserStage.evaluate"
    monkeypatch.setattr(validated, lambda stage, folder: {"loss": next(told)})
    falling = iter([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    monkeypatch.setattr("training.stages.denoiser.DenoiserStage.loss_of_training", lambda stage: next(falling))
    words = ("--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER, "--sample-every", 1, "--save-every", 2)
    assert tiny.call("train_denoiser", *words, "--max-steps", 4) == 0
    said = capsys.readouterr().err
    assert said.count("warning: over-fitting") == 1 and "evaluate --copies tells" in said
    assert f"--model {tmp_path}/run/checkpoints/step-00000002" in said
    rows = [row for row in tiny.rows(tmp_path / "run") if "val/loss" in row]
    assert [row["val/loss_train"] for row in rows] == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert [round(row["val/loss_gap"], 6) for row in rows] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert tiny.call("train_denoiser", *words, "--max-steps", 5, "--resume", "auto") == 0
    assert "over-fitting" not in capsys.readouterr().err
