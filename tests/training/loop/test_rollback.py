"""The return to the last good state: when, to what, and that neither a resume nor several processes change it."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ranks
import tiny
from safetensors.torch import load_file

from training.drills.verify_resume import differences
from training.errors import UserError
from training.loop.loop import Loop
from training.settings import decoding
from training.stages.autoencoder import AutoencoderStage
from training.stages.checks import check_returns

FLAGS = [*tiny.AUTOENCODER, "--loss.perceptual", "0", "--loss.adversarial_start", "4", "--max-steps", "10"]
FLAGS += ["--save-every", "2", "--sample-every", "2", "--keep-last", "9", "--loss.return_margin", "1"]
FLAGS += ["--loss.discriminator_start", "4", "--loss.return_pause", "2", "--loss.augment", '["colour"]']
FLAGS += ["--loss.lecam", "0.1"]
# Worse before the adversarial gradient begins at step 4 and in the pause up to step 8: that is no wreck of its making.
WRECKED = {0: 30.0, 2: 20.0, 4: 25.0, 6: 15.0, 8: 15.0, 10: 24.5}


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The held-out PSNR that each validation finds, by step."""
    return told_scores(monkeypatch)


def told_scores(patch: pytest.MonkeyPatch) -> dict[int, float]:
    found = dict(WRECKED)
    evaluate = AutoencoderStage.evaluate

    def told(self: AutoencoderStage, folder: Path) -> dict[str, float]:
        numbers = evaluate(self, folder)
        step = folder.name.rpartition("-")[2]
        return {**numbers, "psnr": found[int(step)]} if step.isdecimal() else numbers

    patch.setattr(AutoencoderStage, "evaluate", told)
    return found


class Wrecked(NamedTuple):
    """A training that returned once: its folder, what it said, and the share of the adversarial weight by use."""

    run: Path
    said: str
    ramps: list[float]


@pytest.fixture(scope="module")
def wrecked(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Wrecked:
    run, ramps, ramp, said = tmp_path_factory.mktemp("wrecked") / "run", [], AutoencoderStage.ramp, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        told_scores(patch)
        patch.setattr(AutoencoderStage, "ramp", lambda self, step: ramps.append(ramp(self, step)) or ramps[-1])
        assert tiny.call("train_autoencoder", "--data", shapes, "--output", run, "--resume", "auto", *FLAGS) == 0
    return Wrecked(run, said.getvalue(), ramps)


def tensors(run: Path, step: int) -> dict[str, Any]:
    """All tensors of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {f"{file.stem}/{key}": t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def state(run: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text()))


def returns(run: Path) -> list[tuple[int, float]]:
    """(step, step returned to) as metrics.jsonl tells them."""
    return [(row["step"], row["val/returned_to"]) for row in tiny.rows(run) if "val/returned_to" in row]


def test_a_wreck_brings_the_best_checkpoint_back(wrecked: Wrecked) -> None:
    """Once, with all its tensors; the data go on, the gradient rests, then comes back at half its weight."""
    run = wrecked.run
    assert returns(run) == [(6, 4)]
    assert wrecked.said.count("back to its weights") == 1
    good, back, later = tensors(run, 4), tensors(run, 6), tensors(run, 8)
    assert back.keys() == good.keys() and all(back[key].equal(good[key]) for key in good)
    assert any(not later[key].equal(good[key]) for key in good)
    there, now = state(run, 4), state(run, 6)
    assert now["ema_updates"] == there["ema_updates"] == 4 and now["score"] is None
    assert now["place"] != there["place"]
    assert now["stage"]["returns"] == {"count": 1, "start": 8} and "returns" not in there["stage"]
    assert all(now["stage"][key] == there["stage"][key] for key in ("balance", "anchors"))
    losses = {row["step"]: row["adversarial"] for row in tiny.rows(run) if "adversarial" in row}
    assert [step for step, value in losses.items() if value] == [4, 5, 6, 8, 9, 10]  # the step before measures


def test_what_has_learned_only_since_then_returns_without_moments(wrecked: Wrecked) -> None:
    """A critic that starts at step 4, where the best checkpoint is: at step 6 its optimiser begins anew."""

    def steps(step: int, network: str) -> set[float]:
        """How many steps the moments of a network's optimiser hold, as a checkpoint tells."""
        found, start = tensors(wrecked.run, step), f"optimizer/{network}/"
        return {float(t) for key, t in found.items() if key.startswith(start) and key.endswith(".step")}

    assert steps(4, "discriminator") == steps(6, "discriminator") == set() and steps(8, "discriminator") == {2}
    assert [steps(step, "autoencoder") for step in (4, 6, 8)] == [{4}, {4}, {6}]


def test_the_gradient_comes_back_at_half_its_weight(wrecked: Wrecked) -> None:
    assert max(wrecked.ramps) == 1 and wrecked.ramps[-1] == 0.5 and 0.25 in wrecked.ramps


@pytest.mark.parametrize("stop", [5, 6, 7])
def test_exact_resume_across_a_return(
    stop: int, wrecked: Wrecked, shapes: Path, tmp_path: Path, scores: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--data", shapes, "--resume", "auto", *FLAGS, "--output", tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_poll_signals", lambda self: 15 * (self.done == stop))
        assert tiny.call("train_autoencoder", *words) == 143
    assert tiny.call("train_autoencoder", *words) == 0
    assert differences(wrecked.run, tmp_path / "stopped") == []
    assert returns(tmp_path / "stopped") == [(6, 4)]


def test_the_returns_run_out(shapes: Path, tmp_path: Path, scores: dict[int, float]) -> None:
    scores[10] = 23.9  # after the pause and two steps with the gradient at half
    run = tmp_path / "run"
    words = ("--data", shapes, "--output", run, *FLAGS, "--loss.return_limit", "1")
    problem = tiny.refused("train_autoencoder", *words)
    assert problem.code == 5 and returns(run) == [(6, 4)]
    assert "held-out psnr at step 10 is more than 1 below that of step-00000004" in problem.what
    assert "all 1 allowed returns are used" in problem.what and "step-00000004" in problem.hint


def test_a_score_that_is_no_number_is_a_wreck(shapes: Path, tmp_path: Path, scores: dict[int, float]) -> None:
    scores[6] = float("nan")
    assert tiny.call("train_autoencoder", "--data", shapes, "--output", tmp_path / "run", *FLAGS) == 0
    assert returns(tmp_path / "run") == [(6, 4)]


def test_two_processes_return_together(shapes: Path, tmp_path: Path) -> None:
    """A critic of a thousand times the weight really wrecks what the first steps learned, for two as for one."""
    flags = [*FLAGS, "--loss.adversarial", "1000", "--loss.return_margin", "0.01", "--lr", "3e-2", "--train.ema", "0"]
    words = ["--data", shapes, *flags, "--train.log_every", "1", "--max-steps", "6", "--seed", "1"]
    assert tiny.call("train_autoencoder", *words, "--output", tmp_path / "one") == 0
    together = ranks.start(2, tmp_path, "train_autoencoder", *words, "--output", tmp_path / "two")
    assert together == [0, 0], ranks.said(tmp_path)
    assert returns(tmp_path / "two") == returns(tmp_path / "one") and returns(tmp_path / "two")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train.keep_best": "false"}, "keep_best false"),
        ({"train.save_every": "20"}, "train.save_every 20"),
        ({"train.sample_every": "30", "train.save_every": "30"}, "a validation before loss.adversarial_start 20"),
    ],
)
def test_settings_without_a_good_state_are_refused(changes: dict[str, str], says: str) -> None:
    given = {"loss.return_margin": "1", "train.sample_every": "10", "train.save_every": "5"}
    config = decoding.load("autoencoder", "smoke", {**given, **changes})
    assert isinstance(config, decoding.AutoencoderConfig)
    with pytest.raises(UserError, match=says) as caught:
        check_returns(config.loss, config.train)
    assert caught.value.code == 2
    sound = decoding.load("autoencoder", "smoke", given)
    assert isinstance(sound, decoding.AutoencoderConfig)
    check_returns(sound.loss, sound.train)
    off = decoding.load("autoencoder", "smoke", {**given, **changes, "loss.return_margin": "0"})
    assert isinstance(off, decoding.AutoencoderConfig)
    check_returns(off.loss, off.train)
