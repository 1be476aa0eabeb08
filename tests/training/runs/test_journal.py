"""What a run tells of itself: the clock's numbers under a clock of our own, and every column of both files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator

from training.files import finite
from training.runs.journal import Journal
from training.runs.trackers import Trackers
from training.settings.sections import Train


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Told(Trackers):
    """Trackers that remember what they were told."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[tuple[str, int], float] = {}
        self.pictures: list[tuple[Path, int]] = []

    def log(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        self.scalars |= {(name, step): value for step, values in rows for name, value in values.items()}

    def show(self, folder: Path, step: int) -> None:
        self.pictures.append((folder, step))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("training.runs.journal.time.perf_counter", clock.perf_counter)
    monkeypatch.setattr("training.runs.journal.time.process_time", lambda: 2 * clock.now)  # two threads at work
    return clock


@pytest.fixture
def journal(clock: Clock, tmp_path: Path) -> Journal:
    """Of a run of 20 steps on 8 images each, told of every 2 steps."""
    found = Journal(tmp_path, Train(batch_size=8, log_every=2, max_steps=20), Accelerator(cpu=True))
    found.trackers = Told()
    return found


def pass_steps(journal: Journal, clock: Clock, steps: range, seconds: float, waiting: float) -> None:
    """Steps that take so many seconds each, some of them spent waiting for data."""
    for step in steps:
        with journal.waiting():
            clock.now += waiting
        clock.now += seconds - waiting
        values = {"loss": torch.tensor(float(step)), "grad_norm/net": torch.tensor(0.5)}
        journal.record(step, values, 0.1 * step)


def told(run: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def test_images_a_second_and_the_share_of_waiting(journal: Journal, clock: Clock, tmp_path: Path) -> None:
    """Two steps of 2 s with 0.5 s of waiting: 4 images a second, a quarter waited; then each pair by itself."""
    pass_steps(journal, clock, range(1, 3), 2.0, 0.5)
    pass_steps(journal, clock, range(3, 5), 1.0, 0.75)
    first, second = told(tmp_path, "timing.jsonl")
    memory = first.pop("memory_bytes"), second.pop("memory_bytes")
    assert (first.pop("processor_seconds"), second.pop("processor_seconds")) == (8.0, 4.0)
    assert first == {"step": 2, "images_per_second": pytest.approx(4.0), "data_wait": pytest.approx(0.25)}
    assert second == {"step": 4, "images_per_second": pytest.approx(8.0), "data_wait": pytest.approx(0.75)}
    assert 50 << 20 < memory[0] <= memory[1] < 1 << 40  # bytes: a process that holds torch


def test_looking_and_what_was_before_a_resume_are_no_training_time(
    journal: Journal, clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.look(0, {"loss": 1.0}, tmp_path)
    pass_steps(journal, clock, range(1, 3), 2.0, 0.0)
    clock.now += 1000
    with journal.waiting():
        clock.now += 50
    journal.look(2, {"loss": 1.0}, tmp_path)
    pass_steps(journal, clock, range(3, 5), 2.0, 0.0)
    rows = told(tmp_path, "timing.jsonl")
    assert [(row["images_per_second"], row["data_wait"]) for row in rows] == [(4.0, 0.0), (4.0, 0.0)]
    assert [row["processor_seconds"] for row in rows] == [8.0, 8.0]
    later = Journal(tmp_path, journal.train, journal.accelerator)
    later.resume(13, {"metrics_bytes": 0})
    pass_steps(later, clock, range(14, 15), 2.0, 0.0)  # one step until the next line
    assert told(tmp_path, "timing.jsonl")[-1]["images_per_second"] == 4.0
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("step 14/20  loss 14.0000  lr 1.40e+00  2 s/step  4.0 images/s  12 s left  memory ")
    assert said[-1].endswith(" GiB  waiting for data 0%")


def test_metrics_tell_every_step_its_own_values(
    journal: Journal, clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss and rate of each step; the line on the screen has the mean loss since the last one and the latest rate."""
    pass_steps(journal, clock, range(1, 5), 1.0, 0.0)
    wanted = [{"step": n, "lr": 0.1 * n, "grad_norm/net": 0.5, "loss": float(n)} for n in range(1, 5)]
    assert told(tmp_path, "metrics.jsonl") == wanted
    lines = capsys.readouterr().err.splitlines()
    assert [line[:29] for line in lines] == ["step 2/20  loss 1.5000  lr 2.", "step 4/20  loss 3.5000  lr 4."]
    scalars = {(f"train/{name}", row["step"]): row[name] for row in wanted for name in row if name != "step"}
    assert isinstance(journal.trackers, Told) and journal.trackers.scalars == scalars


def test_a_look_is_told_to_trackers_too(journal: Journal, tmp_path: Path) -> None:
    journal.look(7, {"psnr": 20.0, "lpips": 0.5}, tmp_path)
    assert told(tmp_path, "metrics.jsonl") == [{"step": 7, "val/psnr": 20.0, "val/lpips": 0.5}]
    assert isinstance(journal.trackers, Told)
    assert journal.trackers.scalars == {("val/psnr", 7): 20.0, ("val/lpips", 7): 0.5}
    assert journal.trackers.pictures == [(tmp_path, 7)]


def test_a_resume_takes_back_what_it_gives_up(clock: Clock, tmp_path: Path) -> None:
    """Of timing.jsonl, too; a line that a killed process left unfinished is dropped."""
    train, accelerator = Train(batch_size=8, log_every=2, max_steps=20), Accelerator(cpu=True)
    before = Journal(tmp_path, train, accelerator)
    pass_steps(before, clock, range(1, 9), 1.0, 0.0)
    with (tmp_path / "timing.jsonl").open("a") as file:
        file.write('{"step": 10, "images_p')
    later = Journal(tmp_path, train, accelerator)
    later.resume(5, {"metrics_bytes": 0})
    assert [row["step"] for row in told(tmp_path, "timing.jsonl")] == [2, 4]
    pass_steps(later, clock, range(6, 11), 1.0, 0.0)
    assert [row["step"] for row in told(tmp_path, "timing.jsonl")] == [2, 4, 6, 8, 10]
    Journal(tmp_path, train, accelerator).restart()
    assert told(tmp_path, "timing.jsonl") == []


def test_a_return_to_better_weights_counts_no_step_twice(journal: Journal) -> None:
    """A rollback takes the journal back to the step it is at, a resume to the step it begins with."""
    journal.resume(5, {"metrics_bytes": 0})
    assert (journal.progress.done, journal.progress.free) == (5, 5)
    journal.progress.at(8)
    journal.resume(8, {"metrics_bytes": 0})
    assert (journal.progress.done, journal.progress.free) == (8, 5)


def test_losses_that_are_not_told_at_every_step(
    journal: Journal, clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of networks that take turns: each has its own mean, over the steps that tell of it."""
    for step in range(1, 5):
        clock.now += 1
        name = "fake" if step % 2 else "student"
        journal.record(step, {f"loss_{name}": torch.tensor(float(step)), f"grad_norm/{name}": torch.tensor(0.5)}, 0.1)
    lines = [line.partition("  lr")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"step {n + 1}/20  loss_fake {n}.0000  loss_student {n + 1}.0000" for n in (1, 3)]
    rows = told(tmp_path, "metrics.jsonl")
    assert [sorted(row.keys() - {"step", "lr"}) for row in rows] == [
        ["grad_norm/fake", "loss_fake"], ["grad_norm/student", "loss_student"]] * 2


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_the_columns_of_a_run(stage: str, autoencoder: Path, denoiser: Path) -> None:
    """metrics.jsonl has a row for each step and each look, timing.jsonl one for each time that it is told."""
    run = {"autoencoder": autoencoder, "denoiser": denoiser}[stage]
    rows, timing = tiny.rows(run), told(run, "timing.jsonl")
    steps = [row for row in rows if "loss" in row]
    losses = {"loss", "kl", "adversarial", "balance"} if stage == "autoencoder" else {"loss"}
    later = {"discriminator", "grad_norm/discriminator"}  # a network that does not learn yet tells nothing
    assert [row["step"] for row in steps] == list(range(1, 7))
    assert all(row.keys() - later == {"step", "lr", *losses, f"grad_norm/{stage}"} for row in steps)
    for name in later:
        assert [row["step"] for row in steps if name in row] == ([3, 4, 5, 6] if len(losses) > 1 else [])
    assert [row["lr"] for row in steps] == pytest.approx([1e-4 * n for n in range(1, 7)], rel=1e-6)
    assert [row["step"] for row in rows if "loss" not in row] == [0, 4, 6]
    assert [row["step"] for row in timing] == [4, 6]
    assert all(0 < row["images_per_second"] < 1e6 and 0 < row["data_wait"] < 1 for row in timing)


def strict(text: str) -> Any:
    """JSON as other programs read it, which know no Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_has_not(journal: Journal, clock: Clock, tmp_path: Path) -> None:
    """A perfect PSNR, an overflow of fp16: null, and beside it which it was."""
    clock.now += 1
    journal.record(1, {"loss": torch.tensor(torch.nan), "grad_norm/net": torch.tensor(-torch.inf)}, 0.1)
    journal.flush(1)
    (tmp_path / "pictures").mkdir()
    journal.look(1, {"psnr": float("inf"), "ssim": 1.0}, tmp_path / "pictures")
    row, look = (strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row == {
        "step": 1, "lr": 0.1, "loss": None, "loss_is": "nan", "grad_norm/net": None, "grad_norm/net_is": "-inf"
    }
    assert look == {"step": 1, "val/psnr": None, "val/psnr_is": "inf", "val/ssim": 1.0}


def test_plain_data_made_finite() -> None:
    inf, nan = float("inf"), float("nan")
    value = {"a": [1.0, inf, "x", None], "b": {"c": nan, "d": 2}, "e": (1, True), "f": [{"g": -inf}], "h": [[inf]]}
    assert strict(json.dumps(finite(value), allow_nan=False)) == {
        "a": [1.0, None, "x", None], "a_is": [None, "inf", None, None], "b": {"c": None, "c_is": "nan", "d": 2},
        "e": [1, True], "f": [{"g": None, "g_is": "-inf"}], "h": [[None]],
    }
    assert finite({"a": 1.5, "b": ["inf"]}) == {"a": 1.5, "b": ["inf"]}
