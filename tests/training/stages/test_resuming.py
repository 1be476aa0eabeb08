"""A run that was stopped, killed or resumed ends with the bytes of one that was not."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
from donors import frozen_encoder
from stopped import same, stop_at

from training.drills.verify_resume import launch
from training.errors import UserError
from training.loop import passes
from training.loop.loop import Loop
from training.loop.passes import Passes
from training.runs.checkpoint import Checkpoint
from training.runs.checkpoints import Checkpoints
from training.tensors import load_tensors, save_tensors

SCRIPT = {"autoencoder": "train_autoencoder", "denoiser": "train_denoiser"}
FLAGS = {"autoencoder": tiny.AUTOENCODER, "denoiser": tiny.DENOISER}


@pytest.fixture
def data(request: pytest.FixtureRequest) -> dict[str, tuple[object, ...]]:
    """How each stage is told its data."""
    latents = request.getfixturevalue("latents")
    return {"autoencoder": ("--data", request.getfixturevalue("shapes")), "denoiser": ("--latents", latents)}


def train(stage: str, data: dict[str, tuple[object, ...]], run: Path, *words: object) -> int:
    return tiny.call(SCRIPT[stage], *data[stage], "--output", run, *FLAGS[stage], "--train.flip", "true", *words)


@pytest.fixture(scope="session")
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each stage trained without interruption."""
    runs = {stage: tmp_path_factory.mktemp(stage) / "straight" for stage in SCRIPT}
    shapes, latents = request.getfixturevalue("shapes"), request.getfixturevalue("latents")
    told: dict[str, tuple[object, ...]] = {"autoencoder": ("--data", shapes), "denoiser": ("--latents", latents)}
    for stage, run in runs.items():
        assert train(stage, told, run) == 0
    return runs


# An epoch is three steps of 32 samples. The discriminator starts at step 2, its gradient reaches the decoder at step 3.
@pytest.mark.parametrize("stage", SCRIPT)
@pytest.mark.parametrize("stops", [(2,), (3,), (1, 2, 4)], ids=str)
def test_exact(
    stage: str,
    stops: tuple[int, ...],
    data: dict[str, tuple[object, ...]],
    straight: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first start finds nothing to resume, and says so."""
    stop_at(monkeypatch, *stops)
    for said in ("note: no checkpoint yet; starting fresh", *(f"resumed from step {step}" for step in stops[:-1])):
        assert train(stage, data, tmp_path / "run", "--resume", "auto") == 128 + signal.SIGTERM
        assert said in capsys.readouterr().err
    assert train(stage, data, tmp_path / "run", "--resume", "auto", "--num-workers", 2 * (stops == (2,))) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    if config["train"]["num_workers"]:  # the one thing that was meant to differ
        config["train"]["num_workers"] = 0
        exported = tmp_path / "run" / "final" / "config.json"
        exported.write_bytes((straight[stage] / "final" / "config.json").read_bytes())
    same(tmp_path / "run", straight[stage])


@pytest.mark.parametrize("stage", SCRIPT)
@pytest.mark.parametrize("save_every", [2, 100])
def test_killed(
    stage: str,
    save_every: int,
    data: dict[str, tuple[object, ...]],
    straight: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Death between checkpoints, or before the first: what was logged after the checkpoint is logged once."""

    def die(self: Loop) -> int:
        raise MemoryError

    run, every = tmp_path / "run", ("--save-every", save_every, "--train.log_every", 1)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        patch.setattr(signal, "SIGTERM", 15)
        save = Loop.save
        patch.setattr(Loop, "save", lambda self, step, wait: die(self) if step == 5 else save(self, step, wait=wait))
        with pytest.raises(MemoryError):
            train(stage, data, run, *every)
    assert len(tiny.rows(run)) > 5
    assert train(stage, data, run, *every, "--resume", "auto") == 0
    assert (run / "metrics.jsonl").read_bytes() == (straight[stage] / "metrics.jsonl").read_bytes()
    ours, theirs = tiny.last_checkpoint(run), tiny.last_checkpoint(straight[stage])
    assert all(ours[name] == theirs[name] for name in ours)


def test_a_run_begun_by_the_first_order_goes_on_by_it(
    data: dict[str, tuple[object, ...]], straight: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints name no order: there was no other."""
    place = Passes.place
    with monkeypatch.context() as patch:
        patch.setattr(passes, "RULE", 1)
        assert train("autoencoder", data, tmp_path / "whole") == 0
        patch.setattr(Passes, "place", lambda self, step: {"place": place(self, step)["place"]})
        stop_at(patch, 2)
        assert train("autoencoder", data, tmp_path / "run") == 128 + signal.SIGTERM
    assert train("autoencoder", data, tmp_path / "run", "--resume", "auto") == 0
    ours, theirs = ((path / "metrics.jsonl").read_bytes() for path in (tmp_path / "run", tmp_path / "whole"))
    assert ours == theirs != (straight["autoencoder"] / "metrics.jsonl").read_bytes()
    assert tiny.last_checkpoint(tmp_path / "run") == tiny.last_checkpoint(tmp_path / "whole")


def test_a_real_signal(latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--latents", latents, "--output", run, *tiny.DENOISER, "--max-steps", "100000", "--train.log_every", "1"]
    words += ["--sample-every", "100000", "--save-every", "100000"]
    process = launch(tiny.SCRIPTS / "train_denoiser.py", [*map(str, words)], tmp_path / "log", tiny.ENVIRONMENT)
    deadline = time.monotonic() + 240
    while not (run / "timing.jsonl").exists() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    process.join(200)
    told = (tmp_path / "log").read_text()
    assert process.exitcode == 143, told
    assert "stopped by SIGTERM: saved step " in told and "--resume auto" in told and "Traceback" not in told
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    (saved,) = (run / "checkpoints").glob("step-*")
    step = int(saved.name.partition("-")[2])
    assert tiny.rows(run)[-1]["step"] == step
    assert tiny.call("train_denoiser", *words, "--resume", "auto", "--max-steps", step + 2) == 0
    assert [row["step"] for row in tiny.rows(run) if "loss" in row] == list(range(1, step + 3))
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_what_resume_refuses(latents: Path, denoiser: Path, autoencoder: Path, shapes: Path, tmp_path: Path) -> None:
    words = ("--latents", latents, "--output", denoiser, *tiny.DENOISER)
    before = {path: path.read_bytes() for path in sorted(denoiser.rglob("*")) if path.is_file()}

    problem = tiny.refused("train_denoiser", *words)
    assert problem.code == 4 and "already holds a run" in problem.what and "--resume auto" in problem.hint
    problem = tiny.refused("train_denoiser", *words, "--resume", "auto", "--optimizer.lr", "0.5", "--train.ema", "0.5")
    assert problem.code == 4 and "optimizer.lr: 0.001 -> 0.5" in problem.what and "train.ema" in problem.what
    problem = tiny.refused("train_autoencoder", "--data", shapes, "--output", denoiser, *tiny.AUTOENCODER)
    assert problem.code == 4 and "denoiser stage" in problem.what
    assert tiny.call("train_denoiser", *words, "--resume", "auto") == 0  # finished already
    assert {path: path.read_bytes() for path in sorted(denoiser.rglob("*")) if path.is_file()} == before

    fresh = ("--latents", latents, "--output", tmp_path / "fresh", *tiny.DENOISER)
    problem = tiny.refused("train_denoiser", *fresh, "--resume", "latest")
    assert problem.code == 4 and "no checkpoint" in problem.what
    problem = tiny.refused("train_denoiser", *fresh, "--init-from", autoencoder)
    assert problem.code == 4 and "autoencoder stage" in problem.what
    assert tiny.call("train_denoiser", *fresh, "--init-from", denoiser) == 0  # nothing refused left a trace


def test_max_steps_below_the_checkpoint(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER)
    stop_at(monkeypatch, 5)
    assert tiny.call("train_denoiser", *words) == 143
    problem = tiny.refused("train_denoiser", *words, "--resume", "auto", "--max-steps", 3)
    assert problem.code == 2 and "step 5" in problem.what
    problem = tiny.refused("train_denoiser", *words, "--resume", "step-00000004")
    assert problem.code == 4 and "step-00000005" in problem.hint


def test_a_checkpoint_of_another_run(
    latents: Path, denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would fit, and then cut this run's log at the length of the other's, and drop this run's later checkpoints."""
    run = tmp_path / "run"
    words = ("--latents", latents, "--output", run, *tiny.DENOISER, "--save-every", "3", "--max-steps", "8")
    stop_at(monkeypatch, 7)
    assert tiny.call("train_denoiser", *words) == 143
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    problem = tiny.refused("train_denoiser", *words, "--resume", denoiser / "checkpoints" / "step-00000006")
    assert problem.code == 4 and "is not a checkpoint of this run" in problem.what and "--init-from" in problem.hint
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    checkpoints = Checkpoints(run)  # one that was put there by hand, of a model of another width
    ours = checkpoints.load(run / "checkpoints" / "step-00000007")
    wider = {key: value.repeat_interleave(2, -1) for key, value in ours.tensors["model"].items() if value.dim()}
    checkpoints.save(Checkpoint(8, {**ours.tensors, "model": {**ours.tensors["model"], **wider}}, ours.state))
    problem = tiny.refused("train_denoiser", *words, "--resume", "auto")
    assert problem.code == 4 and "step-00000008 does not fit" in problem.what


HEAD = '"stage": "denoiser", "status": "stopped", "step": '
LISTS = [f'{{{HEAD}5, "{key}": 7}}' for key in ("data", "versions", "resumes")]


@pytest.mark.parametrize("text", ["{}", "[]", "{", "null", f'{{{HEAD}"5"}}', *LISTS])
def test_a_record_that_is_none(text: str, tmp_path: Path) -> None:
    from training.runs.folder import Run
    from training.settings.decoding import load

    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match="run.json: (is )?not ") as caught:
        Run(tmp_path, "denoiser", load("denoiser", "smoke"), "auto")
    assert caught.value.code == 4 and (tmp_path / "run.json").read_text() == text


def test_other_data(shapes: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither other pictures, nor another autoencoder's latents, nor the same with another decoder continue a run."""
    other = tmp_path / "other"
    tiny.call("make_shards", *f"pack shapes --samples 96 --seed 7 --val-fraction 0.2 --output {other}".split())
    run = tmp_path / "run"
    stop_at(monkeypatch, 1, 1)
    assert tiny.call("train_autoencoder", "--data", shapes, "--output", run, *tiny.AUTOENCODER) == 143
    problem = tiny.refused("train_autoencoder", "--data", other, "--output", run, *tiny.AUTOENCODER, "--resume", "auto")
    assert problem.code == 4 and "data" in problem.what and "--init-from" in problem.hint

    words = ("--output", tmp_path / "denoiser", *tiny.DENOISER, "--resume", "auto", "--latents")
    assert tiny.call("train_denoiser", *words, latents) == 143
    second, foreign, mended = (tmp_path / name for name in ("second", "foreign", "mended"))
    flags = (*tiny.AUTOENCODER, "--max-steps", "1", "--seed", "9")
    assert tiny.call("train_autoencoder", "--data", shapes, "--output", second, *flags) == 0
    encode = ("--autoencoder", second, "--data", shapes, "--output", foreign, "--flip", "--device", "cpu")
    assert tiny.call("encode_latents", *encode) == 0
    problem = tiny.refused("train_denoiser", *words, foreign)
    assert problem.code == 4 and "made with data index_sha256" in problem.what and "--init-from" in problem.hint
    shutil.copytree(latents, mended)
    weights = load_tensors(mended / "autoencoder" / "model.safetensors")
    name = next(key for key in weights if key.startswith("decoder."))
    save_tensors(mended / "autoencoder" / "model.safetensors", {**weights, name: weights[name] + 1})
    problem = tiny.refused("train_denoiser", *words, mended)
    assert problem.code == 4 and "made with hashes autoencoder" in problem.what
    assert tiny.call("train_denoiser", *words, latents) == 0


def test_another_text_encoder(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that encodes the captions while training: neither another nor none continues a run."""
    config, run = tmp_path / "frozen.toml", tmp_path / "run"
    backbone = '[backbone]\nkind = "dit"\nwidth = 16\ndepth = 1\nheads = 2\nbase_size = 8\n'
    config.write_text(f'{backbone}[text]\nkind = "huggingface"\nlength = 12\n')
    words = ("--latents", latents, "--output", run, "--config", config, "--sample.steps", "2", *tiny.SHORT)
    words = ("train_denoiser", *words, "--max-steps", "2", "--resume", "auto")
    one, two = (frozen_encoder(tmp_path / str(seed), seed) for seed in (1, 2))
    stop_at(monkeypatch, 1)
    assert tiny.call(*words, "--text-encoder", one) == 143
    problem = tiny.refused(*words, "--text-encoder", two)
    assert problem.code == 4 and "made with hashes text_encoder" in problem.what and "--init-from" in problem.hint
    assert tiny.refused(*words).code == 3
    assert tiny.call(*words, "--text-encoder", one) == 0


def test_one_writer(shapes: Path, tmp_path: Path) -> None:
    from training.runs.folder import Run
    from training.settings.decoding import load

    run = Run(tmp_path / "run", "autoencoder", load("autoencoder", "smoke"), None)
    problem = tiny.refused("train_autoencoder", "--data", shapes, "--output", run.folder, *tiny.AUTOENCODER)
    assert problem.code == 4 and "in use" in problem.what
