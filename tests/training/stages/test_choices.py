"""Every choice of the diffusion core by name: trained with, resumed, drawn with, and averaged after training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from ldm.denoiser import Denoiser
from ldm.grids import Uniform
from ldm.guidance import ClassifierFree
from ldm.image_tasks import inverted
from ldm.noise import Noise
from ldm.pipeline import Sampling
from ldm.samplers import DDIM
from ldm.tasks import Task
from training.models.assembly import load_pipeline
from training.runs.checkpoints import Checkpoints
from training.tensors import load_tensors

CHOICES = {
    "learned-variance": "--schedule.kind ddpm-linear --prediction.kind eps --backbone.learned_variance true "
    "--sampler.kind ddpm --sampler.variance learned --weighting.kind min-snr",
    "loss-aware": "--times.kind loss-aware --times.bins 4 --times.stratified true",
    "learned-weighting": "--weighting.kind learned --pairing.kind minibatch-ot --times.stratified true",
    "edm": "--schedule.kind edm --prediction.kind edm --times.kind log-normal --weighting.kind edm "
    "--sampler.kind heun-churn --grid.kind karras",
    "spikes": "--train.spike_factor 1.01 --max-steps 24",  # norms are judged from the 21st on
    "averages": "--train.ema_lengths 0.05,0.1 --train.ema_every 2 --sampler.kind dopri5 --sampler.tolerance 0.1",
}


class Runs(dict[str, Path]):
    """One tiny run for each set of choices, trained when it is first asked for."""

    def __init__(self, latents: Path, folder: Path) -> None:
        super().__init__()
        self.latents, self.folder = latents, folder

    def __missing__(self, name: str) -> Path:
        words = ("--latents", self.latents, "--output", self.folder / name, *tiny.DENOISER, *CHOICES[name].split())
        assert tiny.call("train_denoiser", *words) == 0
        return self.setdefault(name, self.folder / name)


@pytest.fixture(scope="module")
def runs(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(latents, tmp_path_factory.mktemp("choices"))


@pytest.mark.parametrize("name", CHOICES)
def test_a_run_stopped_and_resumed_ends_with_the_same_bytes(
    name: str, runs: Runs, latents: Path, tmp_path: Path
) -> None:
    words = ("train_denoiser", "--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER,
             *CHOICES[name].split(), "--train.save_every", "3")
    assert tiny.call(*words) == 0
    run, straight = tmp_path / "run", runs[name]
    max((run / "checkpoints").glob("step-*")).rename(tmp_path / "gone")
    (run / "run.json").write_text((run / "run.json").read_text().replace("finished", "x"))
    assert tiny.call(*words, "--resume", "auto") == 0
    ours, theirs = tiny.last_checkpoint(run), tiny.last_checkpoint(straight)
    assert ours.keys() == theirs.keys() and len(ours) == 5
    for file in ours:
        assert ours[file] == theirs[file], file
    assert (run / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    if name == "spikes":  # one at least after the resume at step 21
        assert any(row["step"] > 21 and row.get("skipped") for row in tiny.rows(run))


def test_what_was_seen_is_in_the_checkpoint(runs: Runs) -> None:
    newest = Checkpoints(runs["loss-aware"]).newest()
    assert newest is not None
    seen = Checkpoints(runs["loss-aware"]).load(newest).state["stage"]["seen"]
    assert len(seen) == 4 and all(value > 0 for value in seen)


def test_the_learned_weighting_is_trained_and_checkpointed(runs: Runs) -> None:
    newest = Checkpoints(runs["learned-weighting"]).newest()
    assert newest is not None
    model = load_tensors(newest / "model.safetensors")
    assert bool((model["denoiser.uncertainty.series"] != 0).any())


@pytest.mark.parametrize("name", CHOICES)
def test_pictures_by_name(name: str, runs: Runs, tmp_path: Path) -> None:
    words = ("--model", runs[name], "--prompt", "a red circle", "--steps", "3", "--device", "cpu")
    assert tiny.call("generate", *words, "--output", tmp_path / "own", "--strip") == 0
    with Image.open(tmp_path / "own" / "strips" / "00000.png") as strip:
        assert strip.width > 3 * 96 and strip.height > 2 * 96, strip.size
    assert tiny.call("generate", *words, "--output", tmp_path / "restart", "--sampler", "restart",
                     "--grid.kind", "exponential") == 0


def test_an_average_of_another_length(runs: Runs, tmp_path: Path) -> None:
    run, output = runs["averages"], tmp_path / "rebuilt"
    assert tiny.call("posthoc_ema", "--model", run, "--length", "0.1", "--output", output) == 0
    kept = load_tensors(run / "ema" / "step-00000006.safetensors")
    pipeline = load_pipeline(output, "cpu")
    assert isinstance(pipeline.denoiser, Denoiser)
    for key, value in pipeline.denoiser.backbone.state_dict().items():  # type: ignore[attr-defined]
        torch.testing.assert_close(value, kept[f"0.100/denoiser.backbone.{key}"])
    assert tiny.call("posthoc_ema", "--model", run, "--length", "0.15", "--output", tmp_path / "longer") == 0
    assert "already exists" in str(tiny.refused("posthoc_ema", "--model", run, "--length", "0.1", "--output", output))
    bare = tiny.refused("posthoc_ema", "--model", runs["edm"], "--length", "0.1", "--output", tmp_path / "no")
    assert "no snapshots" in str(bare) and bare.code == 4


def test_averages_of_a_future_given_up(
    runs: Runs, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on from an earlier step removes them and says so; where they were left they are not used."""
    run, output = tmp_path / "run", tmp_path / "rebuilt"
    shutil.copytree(runs["averages"], run)
    stray = run / "ema" / "step-00000900.safetensors"
    shutil.copy(run / "ema" / "step-00000006.safetensors", stray)
    assert tiny.call("posthoc_ema", "--model", run, "--length", "0.1", "--output", output) == 0
    said = capsys.readouterr()
    warning = "warning: step-00000900.safetensors not used: the run ended at step 6"
    assert "at step 6" in said.out and warning in said.err
    (run / "run.json").write_text((run / "run.json").read_text().replace("finished", "x"))
    words = ("--latents", latents, "--output", run, *tiny.DENOISER, *CHOICES["averages"].split(), "--resume", "auto")
    assert tiny.call("train_denoiser", *words) == 0 and not stray.exists()
    assert "note: removed step-00000900.safetensors: averages of what this run had" in capsys.readouterr().err


def test_autoguidance_by_name(runs: Runs, tmp_path: Path) -> None:
    words = ("--model", runs["averages"], "--prompt", "a red circle", "--device", "cpu", "--steps", "2",
             "--guidance.kind", "autoguidance", "--sampler.kind", "heun")
    assert "weaker model" in str(tiny.refused("generate", *words, "--output", tmp_path / "none"))
    weak = ("--weak-model", runs["learned-weighting"])
    assert tiny.call("generate", *words, *weak, "--output", tmp_path / "pictures") == 0
    other = tiny.refused("generate", *words, "--weak-model", runs["edm"], "--output", tmp_path / "other")
    assert other.code == 4 and "another schedule" in str(other)


def test_inversion_finds_the_noise_that_draws_a_picture(runs: Runs) -> None:
    """With more steps the picture's latents come back nearer."""
    pipeline = load_pipeline(runs["averages"], "cpu")
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    captions, noise, errors = ["a red circle"] * 2, Noise.from_seeds([0, 1]), []
    wanted = pipeline.autoencoder.norm.mean_latents(pipeline.autoencoder.encode(images))
    for steps in (5, 40):
        plan = Sampling(sampler=DDIM(), grid=Uniform(), guidance=ClassifierFree(scale=1.0), steps=steps)
        start = Task(start=inverted(pipeline, images, captions, plan))
        back = pipeline.latents(pipeline.guided(captions, plan=plan), noise, tuple(wanted.shape[1:]), plan, start)
        errors.append((back - wanted).square().mean().item())
    assert errors[1] < 0.2 * errors[0]


def test_the_samplers_agree_on_a_run(runs: Runs, tmp_path: Path) -> None:
    words = ("--model", runs["averages"], "--samplers", "heun,ddim,dopri5,ddpm", "--steps", "12")
    assert tiny.call("check_samplers", *words, "--output", tmp_path / "table.md") == 0
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 5
    assert tiny.refused("check_samplers", "--model", tmp_path / "nothing").code == 4
