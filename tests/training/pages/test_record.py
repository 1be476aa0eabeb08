"""What is read of run folders that are whole, growing, damaged, or models alone; and that no place is told."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
from run_folders import loss, run_folder

from training.errors import UserError
from training.pages import record
from training.pages.record import read, read_log, shareable


def test_a_finished_run(tmp_path: Path) -> None:
    found = read(run_folder(tmp_path / "mine"))
    assert (found.name, found.stage, found.step) == ("mine", "denoiser", 40)
    assert found.state == "finished at step 40 of 40"
    assert found.metrics.series["loss"] == [(n, loss(n)) for n in range(1, 41)]
    assert found.metrics.series["val/loss_t0.5"] == [(0, 1.5), (20, 0.5 + 1 / 21), (40, 0.5 + 1 / 41)]
    assert list(found.grids) == ["step 0", "step 20", "step 40"]


def test_a_run_is_running_while_a_process_holds_it(tmp_path: Path) -> None:
    """The step is the last that was logged: run.json tells the one it began with."""
    folder = run_folder(tmp_path / "run", status="training")
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"step": 40', '"step": 0'))
    assert read(folder).state == "left without an end at step 40 of 40"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read(folder).state == "running at step 40 of 40"
    assert read(folder).state.startswith("left without an end")


def test_damage_is_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = ['{"step": 1, "loss": 2.0}', "nonsense", '{"loss": 1.0}', "[1]", '{"step": "2", "loss": 3.0}']
    odd = ['{"step": 3, "loss": null, "loss_is": "nan"}', '{"step": 4, "loss": NaN}', '{"step": 5, "loss": -1e999}']
    path.write_text("\n".join([*rows, *odd, '{"step": 6, "lo']))
    found = read_log(path)
    assert found.series == {"loss": [(1, 2.0)]} and found.damaged == 5
    assert found.odd == {"loss": [(3, "nan"), (4, "nan"), (5, "-inf")]}


def test_of_a_very_long_log_every_nth_step_and_all_validations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": n, "val/x" if n % 10 == 7 else "loss": float(n)} for n in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(record, "LARGEST_LOG", path.stat().st_size // 4 + 1)
    found = read_log(path)
    assert found.every == 4
    assert [step for step, _ in found.series["val/x"]] == list(range(7, 100, 10))
    assert [step for step, _ in found.series["loss"]] == [n for n in range(0, 100, 4) if n % 10 != 7]


def test_nothing_and_no_run(tmp_path: Path) -> None:
    assert read_log(tmp_path / "metrics.jsonl") == record.Log()
    for folder, what in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no run")):
        with pytest.raises(UserError, match=what):
            read(folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/ann/my data/cat.jpg", "cat.jpg"),
        ("~/data", "data"),
        ("could not read /home/ann/data/cat.jpg (OSError)", "could not read cat.jpg (OSError)"),
        ("in '/home/ann/a/b'", "in 'b'"),
        ("file:///home/ann/x.tar", "x.tar"),
        ("s3://bucket/a/b.tar", "s3://bucket/a/b.tar"),
        ("a red/blue circle, 1/2", "a red/blue circle, 1/2"),
        ("part/of/it.png", "part/of/it.png"),
    ],
)
def test_texts_are_told_without_the_folders_of_this_machine(text: str, told: str) -> None:
    assert shareable({text: [text, 1]}) == {told: [told, 1]}
