"""What comes before the first checkpoint and after the last: starts that were refused, signals, terminals that go."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from training.errors import UserError
from training.loop.optim import learning_rate
from training.machine import faults
from training.machine.signals import Signals, Stopped
from training.runs.checkpoints import Checkpoints
from training.runs.folder import Run, RunView
from training.settings.decoding import load

pytestmark = pytest.mark.timeout(600)
ENDS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def unvisited() -> Iterator[None]:
    faults.visits.clear()
    with tiny.heard(*ENDS, signal.SIGUSR1):
        yield
    faults.visits.clear()


@pytest.fixture
def words(latents: Path, tmp_path: Path) -> list[object]:
    return ["--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER]


def test_a_batch_larger_than_the_data_is_refused_before_the_folder_is_claimed(
    shapes: Path, latents: Path, tmp_path: Path
) -> None:
    for script, source, data, flags in (
        ("train_autoencoder", "--data", shapes, tiny.AUTOENCODER),
        ("train_denoiser", "--latents", latents, tiny.DENOISER),
    ):
        command = (source, data, "--output", tmp_path / "run", *flags, "--batch-size", 5000)
        for more in ((), ("--dry-run",)):
            problem = tiny.refused(script, *command, *more)
            assert problem.code == 3 and "fewer than one global batch (5000)" in problem.what
        assert not (tmp_path / "run").exists()


def test_a_run_without_a_checkpoint_begins_anew_with_whatever_is_asked_now(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setenv("LDM_FAULT", "samples=enospc")
        assert tiny.refused("train_denoiser", *words).code == 6
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    (run / "final" / "vocabulary.json").write_text("{}")  # of other captions: it must not be learned with
    other = [*words, "--text.length", "16", "--lr", "0.01"]
    capsys.readouterr()
    assert tiny.call("train_denoiser", *other) == 0
    said = capsys.readouterr().err
    assert "holds no checkpoint: begun anew" in said and f"is in {run / 'replaced'}" in said
    assert (run / "replaced" / "final" / "vocabulary.json").read_text() == "{}"
    assert json.loads((run / "config.json").read_text())["text"]["length"] == 16
    assert [row["step"] for row in tiny.rows(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert tiny.refused("train_denoiser", *words).code == 4  # now there is something to lose
    shutil.rmtree(run / "checkpoints")  # to save room: what was exported is there
    assert tiny.refused("train_denoiser", *words).code == 4
    assert {path: path.read_bytes() for path in before if path.exists()}.items() <= before.items()


def test_what_must_not_begin_anew(words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setenv("LDM_FAULT", "samples=enospc")
        tiny.refused("train_denoiser", *words)
    for resume in ("latest", "step-00000002"):
        assert "no checkpoint" in tiny.refused("train_denoiser", *words, "--resume", resume).what
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)  # damaged, but a checkpoint
    assert "already holds a run" in tiny.refused("train_denoiser", *words).what
    assert not (run / "replaced").exists()


def test_the_rate_that_jumps_is_told_and_a_new_one_is_refused_with_the_way_out(
    words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert tiny.call("train_denoiser", *words, "--lr-warmup-steps", 2) == 0
    words = [*words, "--lr-warmup-steps", 2, "--resume", "auto"]
    problem = tiny.refused("train_denoiser", *words, "--lr", "0.01", "--max-steps", 12)
    assert "optimizer.lr: 0.001 -> 0.01" in problem.what and f"--init-from {run} --output NEW" in problem.hint
    problem = tiny.refused("train_denoiser", *words, "--backbone.width", "32")
    assert "--init-from" not in problem.hint and "another --output" in problem.hint  # other networks
    capsys.readouterr()
    assert tiny.call("train_denoiser", *words, "--max-steps", 12) == 0
    said = capsys.readouterr().err
    optimizer = load("denoiser", str(run)).optimizer
    was, now = (learning_rate(optimizer, 6, steps) for steps in (6, 12))
    assert f"the learning rate at step 6 is {now:.3g}, where it was {was:.3g} for 6 steps" in said and now > was
    assert f"--init-from {run} --lr RATE --output NEW" in said
    assert tiny.call("train_denoiser", *words, "--max-steps", 12, "--save-every", 3) == 0
    assert "learning rate" not in capsys.readouterr().err
    followed = [word if word != run else tmp_path / "new" for word in words[:-2]]
    assert tiny.call("train_denoiser", *followed, "--init-from", run, "--lr", "0.01") == 0
    optimizer = load("denoiser", str(tmp_path / "new")).optimizer
    assert tiny.rows(tmp_path / "new")[-2]["lr"] == learning_rate(optimizer, 5, 6)


def test_a_refused_resume_leaves_the_run_as_it_was(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("LDM_FAULT", "step:5=term")
        assert tiny.call("train_denoiser", *words) == 143
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert tiny.refused("train_denoiser", *words, "--resume", "auto", "--max-steps", 3).code == 2
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
def test_a_signal_in_the_last_act_is_granted_and_the_resume_finishes_it(
    number: signal.Signals, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setenv("LDM_FAULT", f"export={number.name[3:].lower()}")
        assert tiny.call("train_denoiser", *words) == ENDS[number]
    said = capsys.readouterr().err
    assert f"stopped by {number.name}: saved step 6, which is the last, but not final/; resume with: " in said
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    assert not (run / "final" / "model.safetensors").exists() and not list(run.rglob("*.partial"))
    checkpoint = tiny.last_checkpoint(run)
    assert tiny.call("train_denoiser", *words, "--resume", "auto") == 0
    assert (run / "final" / "model.safetensors").exists() and tiny.last_checkpoint(run) == checkpoint


def test_a_signal_during_the_last_save_ends_before_the_export(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_FAULT", "checkpoint.file:2=term")
    assert tiny.call("train_denoiser", *words) == 143
    assert not (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert Checkpoints(tmp_path / "run").newest() == tmp_path / "run" / "checkpoints" / "step-00000006"


def test_a_hangup_saves_like_sigterm(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LDM_FAULT", "step:3=hup")
    assert tiny.call("train_denoiser", *words) == 129
    assert "stopped by SIGHUP: saved step 3; resume with: " in capsys.readouterr().err
    assert Checkpoints(tmp_path / "run").newest() == tmp_path / "run" / "checkpoints" / "step-00000003"


def test_under_nohup_a_hangup_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals()
    signals.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not signals.stop
    signals.all_saved(main=False)
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # who only waits can be ended


def test_after_the_last_save_one_signal_is_enough() -> None:
    for number in ENDS:
        signals = Signals()
        signals.listen()
        signals.all_saved(main=True)
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.number == number
    signals = Signals()
    signals.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        signals.all_saved(main=True)  # what came before is not forgotten


def start(*command: str, folder: Path, **more: str) -> subprocess.Popen[str]:
    environment = {**tiny.ENVIRONMENT, "PYTHONPATH": str(tiny.ROOT), **more}
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)


def stop_after_a_step(process: subprocess.Popen[str], run: Path, number: signal.Signals = signal.SIGHUP) -> str:
    """What a training says that is sent a signal once it has taken steps."""
    deadline = time.monotonic() + 200
    try:
        while not (run / "timing.jsonl").exists():
            assert time.monotonic() < deadline and process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, number)  # as the system sends it to all of a terminal
        said = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:  # it was told to train for hours
            os.killpg(process.pid, signal.SIGKILL)
    return next(line for line in said.splitlines() if "; resume with: " in line)


LAUNCHERS = {
    "script": [sys.executable, "{scripts}/train_denoiser.py"],
    "options": [sys.executable, "-u", "-X", "dev", "-W", "ignore", "{scripts}/train_denoiser.py"],
    "module": [sys.executable, "-m", "scripts.train_denoiser"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                 "{scripts}/train_denoiser.py"],
    "torchrun of a verb": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
                           "-m", "training", "train_denoiser"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1",
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                   "{scripts}/train_denoiser.py"],
}  # fmt: skip


SENT = {"script": signal.SIGINT, "options": signal.SIGTERM}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_told_at_a_stop_runs_as_it_stands(launcher: str, latents: Path, tmp_path: Path) -> None:
    """Pasted into a shell in the same folder, whatever started the training, with blanks and brackets in its paths."""
    folder = tmp_path / "my [old] runs"
    folder.mkdir()
    program = [word.format(scripts=tiny.SCRIPTS) for word in LAUNCHERS[launcher]]
    flags = [*map(str, tiny.DENOISER), "--train.log_every", "1", "--train.validation_size", "2"]
    flags += ["--max-steps", "100000", "--sample-every", "100000", "--save-every", "100000"]
    data = os.path.relpath(latents, folder)
    output = ["--output=a run [1]"] if launcher == "script" else ["--output", "a run [1]"]
    number = SENT.get(launcher, signal.SIGHUP)
    process = start(*program, "--latents", data, *output, *flags, folder=folder, ACCELERATE_USE_CPU="true")
    line = stop_after_a_step(process, folder / "a run [1]", number)
    assert line.startswith(f"stopped by {number.name}: saved step ")
    if not launcher.startswith(("torchrun", "accelerate")):  # which end by themselves, whatever those end with
        assert process.returncode == 128 + number
    command = line.partition("; resume with: ")[2]
    step = line.split("saved step ")[1].split(";")[0]
    assert command.endswith(" --resume auto") and "a run [1]'" in command and "ACCELERATE_USE_CPU=true " in command
    assert " ".join(program[1:3]) in command or launcher in ("script", "options")
    shell = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    goal = [command.replace("--max-steps 100000", f"--max-steps {int(step) + 1}")]
    done = subprocess.run(["bash", "-c", *goal], cwd=folder, env=shell, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"resumed from step {step}" in done.stderr and shlex.split(command)


@pytest.mark.parametrize("stream", ["2>&1 | head -1", "2>/dev/full", "2>&-", ">&- 2>&- <&-"])
def test_a_training_goes_on_without_its_terminal(stream: str, latents: Path, tmp_path: Path) -> None:
    words = ["--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER, "--train.log_every", "1"]
    command = shlex.join([sys.executable, str(tiny.SCRIPTS / "train_denoiser.py"), *map(str, words)])
    script = f"set -o pipefail; {command} {stream}"
    environment = {**tiny.ENVIRONMENT, "PYTHONPATH": str(tiny.ROOT)}
    assert subprocess.run(["bash", "-c", script], env=environment, timeout=200).returncode == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert [row["step"] for row in tiny.rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_log_cut_before_a_resume_is_told(
    words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.call("train_denoiser", *words, "--train.log_every", "1") == 0
    log = tmp_path / "run" / "metrics.jsonl"
    os.truncate(log, log.read_bytes().index(b"\n") + 1)
    capsys.readouterr()
    assert tiny.call("train_denoiser", *words, "--resume", "auto", "--max-steps", 7) == 0
    assert "metrics.jsonl has " in (said := capsys.readouterr().err) and "steps before it are missing there" in said
    assert [row["step"] for row in tiny.rows(tmp_path / "run") if "loss" in row] == [7]


def test_no_home(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, whose user the system does not know: shards at an address need a folder that is named."""
    from training.shards.remote import open_address

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(UserError, match="no home folder") as caught:
        open_address(f"file://{latents}")
    assert "--cache-dir DIR" in caught.value.hint
    assert open_address(f"file://{latents}", str(tmp_path / "cache"))  # the hint, followed


def test_only_the_writer_of_a_run_can_write_it(tmp_path: Path) -> None:
    view = RunView(tmp_path / "run", "denoiser", load("denoiser", "smoke"))
    assert not view.finished() and not hasattr(view, "describe") and not (tmp_path / "run").exists()
    assert issubclass(Run, RunView)
