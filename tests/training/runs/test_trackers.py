"""`--report-to`: what trackers are told by a training, over a resume, and where they fail; through Accelerate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
from accelerate import tracking
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.errors import UserError
from training.runs.trackers import HOW, Trackers, choose, flat


class Kept(tracking.GeneralTracker):
    """A tracker of a package that remembers all it was told."""

    name = "kept"
    requires_logging_directory = False
    all: ClassVar[list[Kept]] = []
    fails: ClassVar[dict[str, Exception]] = {}  # by method

    def __init__(self, project: str, **how: Any) -> None:
        super().__init__()
        self.project, self.how, self.config, self.ended = project, how, dict[str, Any](), False
        self.values: list[tuple[int, dict[str, float]]] = []
        self.shown: list[tuple[str, int, tuple[int, ...]]] = []
        self.all.append(self)

    @property
    def tracker(self) -> Kept:
        return self

    def _may_fail(self, method: str) -> None:
        if method in self.fails:
            raise self.fails[method]

    def start(self) -> None:
        print("a tracker's greeting")
        self._may_fail("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._may_fail("log")
        assert step is not None
        self.values.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._may_fail("log_images")
        assert step is not None
        self.shown += [(name, step, image.shape) for name, images in values.items() for image in images]

    def finish(self) -> None:
        self.ended = True
        self._may_fail("finish")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    """Known to Accelerate, and begun again as Weights & Biases is."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "kept", Kept)
    monkeypatch.setitem(HOW, "kept", HOW["wandb"])  # type: ignore[arg-type]
    monkeypatch.setattr(Kept, "all", [])
    monkeypatch.setattr(Kept, "fails", {})
    return Kept


def train(latents: Path, run: Path, *words: object) -> int:
    return tiny.call("train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, *words)


def board(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def as_metrics(run: Path) -> dict[tuple[str, int], float]:
    """metrics.jsonl by the names that trackers have for it."""
    found = {}
    for row in tiny.rows(run):
        for name, value in row.items():
            found[name if name.startswith("val/") else f"train/{name}", row["step"]] = value
    return {key: value for key, value in found.items() if key[0] != "train/step"}


def test_trackers_are_told_what_metrics_holds_over_a_resume(
    latents: Path, tmp_path: Path, kept: type[Kept], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step once in TensorBoard, whose later steps a resume takes back; the same run of the other, by its id."""
    run, words = tmp_path / "run", ("--report-to", "tensorboard,kept", "--save-every", 2, "--resume", "auto")
    assert train(latents, run, *words) == 0
    first = json.loads((run / "trackers.json").read_text())
    assert first == {"id": first["id"], "begun": {"tensorboard": "", "kept": ""}} and len(first["id"]) == 8
    assert train(latents, run, *words[:-1], run / "checkpoints/step-00000004", "--max-steps", 8) == 0
    assert json.loads((run / "trackers.json").read_text()) == first
    events, wanted = board(run), as_metrics(run)
    scalars = {(name, e.step): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    assert sorted(e.step for e in events.Scalars("train/loss")) == list(range(1, 9))
    assert scalars == pytest.approx(wanted, rel=1e-6)
    assert [e.step for e in events.Images("grid")] == [0, 4, 8]
    grid = Image.open(run / "samples/step-00000008/grid.png")
    assert (events.Images("grid")[-1].width, events.Images("grid")[-1].height) == grid.size
    before, after = kept.all
    assert before.how == after.how == {"name": f"run-{first['id']}", "id": first["id"], "resume": "allow"}
    assert before.project == "latent-diffusion" and before.ended and after.ended
    assert before.config["train.max_steps"] == 6 and before.config["optimizer.betas"] == "[0.9, 0.99]"
    assert after.config == {}  # it is the same run there
    told = {(name, step): value for step, values in after.values for name, value in values.items()}
    assert told == {key: value for key, value in wanted.items() if key[1] > 4}
    assert [step for step, _ in before.values] == [0, 1, 2, 3, 4, 4, 5, 6, 6]
    assert before.shown == [("grid", step, (*grid.size[::-1], 3)) for step in (0, 4, 6)]
    assert "greeting" not in capsys.readouterr().out
    assert "report_to" not in (run / "config.json").read_text()


@pytest.mark.parametrize("method", ["start", "log", "log_images", "finish"])
def test_a_tracker_that_fails_is_left_out_and_said_once(
    method: str, latents: Path, tmp_path: Path, kept: type[Kept], capsys: pytest.CaptureFixture[str]
) -> None:
    kept.fails[method] = ConnectionError("the quota is used up\nTraceback")
    assert train(latents, tmp_path / "run", "--report-to", "kept,tensorboard") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: kept")]
    assert said == [
        "warning: kept is told nothing from here on (the quota is used up); metrics.jsonl holds everything"
    ]
    assert [row["step"] for row in tiny.rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in board(tmp_path / "run").Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert len(kept.all) == 1 and kept.all[0].ended == (method == "finish")


def test_a_tracker_that_was_told_nothing_is_not_begun(tmp_path: Path, kept: type[Kept]) -> None:
    """As of a training that ends before its first line: it has no run among those of the tracker."""
    with Trackers(["kept"], tmp_path):
        pass
    assert kept.all == [] and list(tmp_path.iterdir()) == []


def test_a_log_of_earlier_versions_is_named_and_can_be_gone_on_with(
    denoiser: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = tmp_path / "run", ("--save-every", 2, "--resume", "auto")
    assert train(latents, run, "--report-to", "tensorboard", "--max-steps", 2, *words) == 0
    (run / "trackers.json").unlink()  # which they had not
    assert train(latents, run, "--max-steps", 4, *words) == 0
    note = f"note: {run / 'tensorboard'} is not gone on with; --report-to tensorboard does that"
    assert note in capsys.readouterr().err.splitlines()
    assert train(latents, run, "--report-to", "tensorboard, tensorboard", *words) == 0
    assert note not in capsys.readouterr().err.splitlines()
    assert [e.step for e in board(run).Scalars("train/loss")] == [1, 2, 5, 6]


def test_names_are_checked_before_anything_is_loaded(latents: Path, tmp_path: Path) -> None:
    problem = tiny.refused("train_autoencoder", "--data", tmp_path, "--output", tmp_path / "run", "--report-to", "wand")
    assert problem.code == 3  # no data is told first, by the parser
    with pytest.raises(UserError, match="--report-to wand: there is no such tracker; did you mean 'wandb'") as told:
        train(latents, tmp_path / "run", "--report-to", "tensorboard,wand")
    assert "tensorboard, " in told.value.hint and told.value.hint.endswith(", or none")
    assert not (tmp_path / "run").exists()
    assert choose("none") == [] and choose("tensorboard, tensorboard") == ["tensorboard"]


def test_a_package_that_is_missing_is_told_with_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    extra = "pip install 'latent-diffusion-from-scratch[trackers]'"
    for name, hint in {"wandb": extra, "tensorboard": extra, "clearml": "pip install clearml"}.items():
        with pytest.raises(UserError, match=f"--report-to {name} needs {name}, which is not installed") as told:
            choose(name)
        assert told.value.hint == hint


def test_only_the_main_process_tells(kept: type[Kept], tmp_path: Path) -> None:
    """The others hold trackers of no names."""
    with Trackers(step=3) as none:
        none.log([(1, {"train/loss": 1.0})])
        none.show(tmp_path, 1)
    assert kept.all == [] and list(tmp_path.iterdir()) == []


def test_a_config_as_hyperparameters() -> None:
    values = {"a": {"b": 1, "c": [1, 2], "d": None, "e": True}, "f": {"kind": "g"}}
    assert flat(values) == {"a.b": 1, "a.c": "[1, 2]", "a.d": "null", "a.e": True, "f.kind": "g"}
