"""Two processes: whatever happens to one happens to both, at the same step and with one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny

from training.drills.verify_resume import launch
from training.runs.checkpoints import Checkpoints

pytestmark = pytest.mark.timeout(900)  # seconds of work, but many of them where the cores are shared

ALONE = 1  # the rank that something happens to


@pytest.fixture(scope="module")
def words(latents: Path) -> list[object]:
    flags = ["--save-every", "2", "--train.log_every", "1", "--sample-every", "100", "--lr", "1e-4"]
    return ["train_denoiser", "--latents", latents, *tiny.DENOISER, *flags]


def test_a_signal_to_one_stops_both_at_the_same_step(words: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = ranks.start(2, tmp_path, *words, "--output", run, wrong={ALONE: "step:3=term"})
    assert codes == [143, 143], ranks.said(tmp_path)
    assert Checkpoints(run).newest() == run / "checkpoints" / "step-00000003"
    assert "stopped by SIGTERM: saved step 3; resume with: " in ranks.said(tmp_path)
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["step"], record["environment"]["processes"]) == ("stopped", 3, 2)


def test_a_signal_to_one_in_the_last_act_ends_both_alike(words: list[object], tmp_path: Path) -> None:
    """It alone exports; the other, which waits for it, has lost nobody."""
    run = [*words, "--output", tmp_path / "run"]
    assert ranks.start(2, tmp_path, *run, wrong={0: "export=term"}) == [143, 143], ranks.said(tmp_path)
    said = ranks.said(tmp_path)
    assert "saved step 6, which is the last, but not final/" in said and "lost another process" not in said, said
    assert ranks.start(2, tmp_path, *run, "--resume", "auto") == [0, 0], ranks.said(tmp_path)


def test_death_of_one_ends_the_other(words: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = ranks.start(2, tmp_path, *words, "--output", run, wrong={ALONE: "step:4=kill"})
    assert codes == [1, -9], ranks.said(tmp_path)
    assert "error: lost another process at step 3" in ranks.said(tmp_path)
    assert Checkpoints(run).newest() == run / "checkpoints" / "step-00000002"  # nothing was saved after the loss
    noticed = (tmp_path / "rank-0.log").stat().st_mtime - (run / "metrics.jsonl").stat().st_mtime
    assert noticed < 60  # seconds from the step before to the last word
    assert "Traceback" not in ranks.said(tmp_path)


def test_death_of_the_writer_in_a_save(words: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = ranks.start(2, tmp_path, *words, "--output", run, wrong={0: "checkpoint.file:6=kill"})
    assert codes == [-9, 1], ranks.said(tmp_path)
    assert Checkpoints(run).newest() == run / "checkpoints" / "step-00000002"
    assert list((run / "checkpoints").glob(".tmp-*"))
    assert ranks.start(2, tmp_path, *words, "--output", run, "--resume", "auto") == [0, 0]
    assert "note: removed unfinished checkpoint .tmp-step-00000004" in ranks.said(tmp_path)
    assert [row["step"] for row in tiny.rows(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("wrong", "code", "message"),
    [
        ({ALONE: "bad_sample:3"}, 3, "error: 000007: broken sample"),
        ({ALONE: "nan_loss:3"}, 5, "error: loss is not finite at step 3 (samples "),
        ({ALONE: "unsynchronised:3"}, 5, "tensors differ between processes at step 4 (first: denoiser."),
        ({0: "checkpoint.file:6=enospc"}, 6, "No space left on device"),
    ],
    ids=["bad sample", "NaN", "unsynchronised", "disk full"],
)
def test_both_stop_with_one_message(
    wrong: dict[int, str], code: int, message: str, words: list[object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    codes = ranks.start(2, tmp_path, *words, "--output", run, wrong=wrong)
    said = ranks.said(tmp_path)
    assert codes == [code, code], said
    assert said.count("error: ") == 1 and message in said and "Traceback" not in said, said
    assert Checkpoints(run).newest() == run / "checkpoints" / "step-00000002" and not list(run.rglob(".tmp-*"))
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    if "nan_loss:3" in wrong.values():  # the half of the batch that process 1 read
        report = json.loads((run / "stopped-at-step-00000003.json").read_text())
        assert len(report["samples"]) == 16 and report["by_process"][ALONE][0] == "nan"


def test_a_spike_in_one_is_skipped_by_both(words: list[object], tmp_path: Path) -> None:
    """The 23rd step: spikes are judged from the 21st on."""
    run, flags = tmp_path / "run", ["--train.spike_factor", "10", "--max-steps", "24", "--save-every", "100"]
    codes = ranks.start(2, tmp_path, *words, "--output", run, *flags, wrong={ALONE: "spike:22"})
    assert codes == [0, 0], ranks.said(tmp_path)
    rows = [row for row in tiny.rows(run) if "loss" in row]
    assert [row["step"] for row in rows if "skipped" in row] == [23]
    assert rows[22]["grad_norm/denoiser"] > 100 * rows[21]["grad_norm/denoiser"] > 0
    assert rows[23]["grad_norm/denoiser"] < 10 * rows[21]["grad_norm/denoiser"]
    assert ranks.said(tmp_path).count("warning: step 22 is skipped: grad_norm/denoiser ") == 1


@pytest.mark.parametrize("last", [2, pytest.param(4, marks=pytest.mark.many)])
def test_saved_by_two_resumed_by_one_and_by_more(last: int, words: list[object], tmp_path: Path) -> None:
    """The same samples in every step, whoever reads them: losses as those of one process all the way."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    assert tiny.call(*words, "--output", alone) == 0
    again = [*words, "--output", run, "--resume", "auto"]
    assert ranks.start(2, tmp_path, *again, wrong={ALONE: "step:2=term"}) == [143, 143], ranks.said(tmp_path)
    assert ranks.start(1, tmp_path, *again, wrong={0: "step:2=term"}) == [143], ranks.said(tmp_path)
    assert "processes 2 -> 1" in ranks.said(tmp_path)
    assert ranks.start(last, tmp_path, *again) == [0] * last, ranks.said(tmp_path)
    for ours, theirs in zip(tiny.rows(run), tiny.rows(alone), strict=True):
        assert ours["step"] == theirs["step"] and ours.keys() == theirs.keys()
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert [entry["step"] for entry in json.loads((run / "run.json").read_text())["resumes"]] == [2, 4]


def test_a_part_of_the_encoder_that_nothing_reads(words: list[object], tmp_path: Path) -> None:
    """Without pooled text its projection has no gradient: two processes must neither wait for it nor stop."""
    flags = ["--backbone.pooled", "false", "--max-steps", "2"]  # the second step would tell of the first
    codes = ranks.start(2, tmp_path, *words, "--output", tmp_path / "two", *flags)
    assert codes == [0, 0], ranks.said(tmp_path)
    assert tiny.call(*words, "--output", tmp_path / "one", *flags) == 0
    ours, theirs = ([row["loss"] for row in tiny.rows(tmp_path / name) if "loss" in row] for name in ("two", "one"))
    assert ours == pytest.approx(theirs, rel=1e-5)


DOUBLE = """
import json, os
from pathlib import Path
import torch
from training.data.latents import Latents
from training.models import assembly
from training.stages.denoiser import DenoiserStage

hashes, join, backward = assembly.autoencoder_hashes, Latents.join, DenoiserStage.backward

def built_in_double(autoencoder):
    found = hashes(autoencoder)  # of the weights as they are stored; what is built from here on is double
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # so that losses are not rounded to single precision either
    return found

def in_double(self, slots, samples):
    batch = join(self, slots, samples)
    return batch._replace(data=batch.data.double())

def told(self, batch, step, share):
    values = backward(self, batch, step, share)
    assert values["loss"].dtype == torch.float64 == next(self.network.parameters()).dtype
    with Path(os.environ["LOSSES"] + os.environ["RANK"]).open("a") as file:
        file.write(json.dumps([batch.slots.tolist(), values["loss"].item()]) + "\\n")
    return values

assembly.autoencoder_hashes, Latents.join, DenoiserStage.backward = built_in_double, in_double, told
DenoiserStage.evaluate = lambda self, folder: {"loss": 0.0}  # the pictures' noise is float32
"""

NARROW = """
import os
import torch
from training.stages.denoiser import DenoiserStage

backward = DenoiserStage.backward

def narrow(self, batch, step, share):
    values = backward(self, batch, step, share)
    if step >= 2 and len(batch.slots) > 8 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return values

DenoiserStage.backward = narrow
"""

# The search ends after two steps; who averages is told, and MEMORY is the size that runs out from the fifth step on.
SETTLED = """
import os
from pathlib import Path
import torch
from training.loop import passes
from training.stages.denoiser import DenoiserStage

average, backward, passes.HELD = passes.Passes._average, DenoiserStage.backward, 2

def told(self):
    with Path(os.environ["LOSSES"] + os.environ["RANK"]).open("a") as file:
        file.write("averaged here ")
    average(self)

def narrow(self, batch, step, share):
    values = backward(self, batch, step, share)
    if step >= 4 and os.environ["RANK"] == "1" and len(batch.slots) == MEMORY:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return values

passes.Passes._average, DenoiserStage.backward = told, narrow
"""

START = """
import runpy, sys
name, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(name, run_name="__main__")
"""


def begin_with(source: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the processes of `ranks.start` run `source` before their script; LOSSES + rank names a file of theirs."""
    (home / "begin.py").write_text(source + START)

    def begin(_: Path, words: list[str], log: Path, environment: dict[str, str]) -> Any:
        script, losses = str(tiny.SCRIPTS / f"{words[0]}.py"), str(home / f"losses-{environment['WORLD_SIZE']}-")
        return launch(home / "begin.py", [script, *words[1:]], log, {**environment, "LOSSES": losses})

    monkeypatch.setattr(ranks, "launch", begin)


def test_two_in_double_precision_train_as_one(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 steps: the same samples in every step, the mean of both halves' losses that of the whole, within 1e-9."""
    begin_with(DOUBLE, tmp_path, monkeypatch)
    flags = ["--batch-size", "8", "--max-steps", "50", "--save-every", "100"]
    seen: dict[int, list[list[tuple[list[int], float]]]] = {}
    for count in (1, 2):
        codes = ranks.start(count, tmp_path, *words, *flags, "--output", tmp_path / f"of-{count}")
        assert codes == [0] * count, ranks.said(tmp_path)
        logs = [(tmp_path / f"losses-{count}-{rank}").read_text().splitlines() for rank in range(count)]
        seen[count] = [[json.loads(line) for line in lines] for lines in zip(*logs, strict=True)]
    assert len(seen[1]) == len(seen[2]) == 50
    for ((slots, loss),), halves in zip(seen[1], seen[2], strict=True):
        assert slots == [slot for half, _ in halves for slot in half]
        assert abs(loss - sum(part for _, part in halves) / 2) < 1e-9
    assert len({step[0][1] for step in seen[1]}) == 50  # it does train: no two steps tell the same loss


def test_memory_that_runs_out_in_one_halves_the_micro_batch_of_both(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert tiny.call(*words, "--output", alone) == 0
    begin_with(NARROW, tmp_path, monkeypatch)
    codes = ranks.start(2, tmp_path, *words, "--output", run, "--micro-batch-size", "auto")
    said = ranks.said(tmp_path)
    assert codes == [0, 0], said
    note = "note: out of memory at step 2 with a micro-batch of 16; going on with 8 (the global batch stays 32)"
    assert said.count(note) == said.count("out of memory") == 1, said
    for ours, theirs in zip(tiny.rows(run), tiny.rows(alone), strict=True):
        assert ours["step"] == theirs["step"] and ours.keys() == theirs.keys()
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm/denoiser"] == pytest.approx(theirs["grad_norm/denoiser"], rel=5e-3)
    state = json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["micro"] == 8


def test_a_search_that_has_ended_leaves_the_averaging_to_the_wrapper(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over a stop: not a bit is other than with a number, and the search does not begin again."""
    auto = [*words, "--output", tmp_path / "auto", "--micro-batch-size", "auto"]
    assert ranks.start(2, tmp_path, *words, "--output", tmp_path / "number", "--micro-batch-size", "16") == [0, 0]
    begin_with(SETTLED.replace("MEMORY", "0"), tmp_path, monkeypatch)
    assert ranks.start(2, tmp_path, *auto, wrong={0: "step:3=term"}) == [143, 143], ranks.said(tmp_path)
    assert ranks.start(2, tmp_path, *auto, "--resume", "auto") == [0, 0], ranks.said(tmp_path)
    assert [(tmp_path / f"losses-2-{rank}").read_text() for rank in (0, 1)] == 2 * [2 * "averaged here "]
    assert tiny.last_checkpoint(tmp_path / "auto").keys() == tiny.last_checkpoint(tmp_path / "number").keys()
    for name, data in tiny.last_checkpoint(tmp_path / "number").items():
        assert name in ("manifest.json", "state.json") or tiny.last_checkpoint(tmp_path / "auto")[name] == data, name
    state = json.loads((tmp_path / "auto" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert (state["micro"], state["held"], state["held_on"]) == (16, 2, [2, 0])


def test_memory_that_runs_out_after_the_search_ends_both(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint, followed, ends the training."""
    begin_with(SETTLED.replace("MEMORY", "16"), tmp_path, monkeypatch)
    run = [*words, "--output", tmp_path / "run"]
    assert ranks.start(2, tmp_path, *run, "--micro-batch-size", "auto") == [6, 6], ranks.said(tmp_path)
    said = ranks.said(tmp_path)
    assert said.count("error: ") == 1 and "error: out of memory at step 4 with a micro-batch of 16" in said, said
    assert "hint: --micro-batch-size 8 trains the same with less (the global batch stays 32)" in said, said
    assert ranks.start(2, tmp_path, *run, "--resume", "auto", "--micro-batch-size", "8") == [0, 0], ranks.said(tmp_path)
