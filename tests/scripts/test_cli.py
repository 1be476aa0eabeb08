"""The scripts as a user meets them: help at once, and one clear sentence for every mistake."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import hints
import pytest
import tiny

SCRIPTS = sorted(path.stem for path in tiny.SCRIPTS.glob("*.py") if "run_main" in path.read_text())
HEAVY = ("torch", "transformers", "accelerate", "lpips", "torchvision", "pydantic")


def run(script: str, *words: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """The finished process and the CPU seconds it used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(tiny.SCRIPTS / f"{script}.py"), *words]
    done = subprocess.run(
        command, env=tiny.ENVIRONMENT, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_there_are_scripts() -> None:
    assert {"make_shards", "train_autoencoder", "encode_latents", "train_denoiser"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_light(script: str) -> None:
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = tiny.spawn("-c", code, tiny.SCRIPTS / f"{script}.py")
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before.ru_utime
    assert done.returncode == 0 and done.stdout.startswith("usage:") and done.stderr.strip() == "[]"
    assert used < 2


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "mutation_drill"])
def test_every_door_can_be_quiet(script: str) -> None:
    verbs = [action for action in hints.parser(script)._actions if isinstance(action, argparse._SubParsersAction)]
    parsers = [parser for action in verbs for parser in action.choices.values()] or [hints.parser(script)]
    for parser in parsers:
        assert {"--quiet", "--debug"} <= set(parser._option_string_actions), (script, parser.prog)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.startswith("train_")])
def test_help_shows_defaults_and_aliases(script: str) -> None:
    text = tiny.spawn(tiny.SCRIPTS / f"{script}.py", "--help").stdout
    assert "default" in text and "==SUPPRESS==" not in text and "None" not in text
    if script != "train_classifier":
        for name in ("--train-batch-size", "--learning-rate", "--checkpointing-steps", "--resume", "--print-config"):
            assert name in "".join(text.split())  # argparse breaks lines at hyphens


MISTAKES = {
    "no such flag": ("train_autoencoder", ["--data", "x", "--frobnicate", "3"], 2, "--frobnicate"),
    "unknown key": ("train_denoiser", ["--optimizer.lrate", "1"], 2, "did you mean 'optimizer.lr'?"),
    "wrong type": ("train_denoiser", ["--lr", "fast"], 2, 'optimizer.lr: expected a number, got "fast"'),
    "no data flag": ("train_autoencoder", ["--output", "x"], 2, "--data is missing"),
    "no latents flag": ("train_denoiser", ["--output", "x"], 2, "--latents is missing"),
    "no output flag": ("train_denoiser", ["--latents", "x"], 2, "--output is missing"),
    "unknown config": ("train_denoiser", ["--config", "smok"], 2, "did you mean 'smoke'?"),
    "missing data": ("train_autoencoder", ["--data", "nowhere", "--output", "x"], 3, "nowhere: no such folder"),
    "missing latents": ("train_denoiser", ["--latents", "nowhere", "--output", "x"], 3, "nowhere: no such folder"),
    "empty data": ("train_autoencoder", ["--data", ".", "--output", "x"], 3, "holds no index.json"),
    "unknown kind": ("train_denoiser", ["--schedule.kind", "flwo"], 2, "unknown kind \"flwo\"; did you mean 'flow'?"),
    "unknown sampler": (
        *("generate", ["--model", ".", "--prompt", "x", "--output", "x", "--sampler", "eulr"]),
        *(2, "sampler.kind: unknown kind \"eulr\"; did you mean 'euler'?"),
    ),
    "no run": ("generate", ["--model", "nowhere", "--prompt", "x", "--output", "x"], 4, "nowhere: no such run"),
    "no run to measure": ("evaluate", ["--model", "nowhere"], 4, "nowhere: no such run"),
    "nothing to compare by": ("compare_steps", ["demo", "--output", "x"], 2, "nothing to measure"),
    "no sampler to compare": (
        *("compare_steps", ["demo", "--output", "x", "--sampler", "eulr"]),
        *(2, "sampler.kind: unknown kind \"eulr\"; did you mean 'euler'?"),
    ),
    "no run to compare": ("compare_steps", ["T=nowhere", "--output", "x"], 4, "nowhere: no such run"),
    "no autoencoder": (
        *("encode_latents", ["--autoencoder", "nowhere", "--data", "x", "--output", "y"]),
        *(4, "nowhere: no such run"),
    ),
    "encode flags": ("encode_latents", ["--data", "x"], 2, "--autoencoder"),
    "encode choice": ("encode_latents", ["--dtype", "int8"], 2, "invalid choice: 'int8'"),
    "verb": ("make_shards", ["pac"], 2, "invalid choice: 'pac'"),
    "no verb": ("make_shards", [], 2, "required"),
    "pack nothing": ("make_shards", ["pack", "nowhere", "--output", "x"], 3, "nowhere: no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_at_once_one_clear_sentence(name: str, tmp_path: Path) -> None:
    """Within two seconds, that is, before torch is loaded."""
    script, words, code, expected = MISTAKES[name]
    done, seconds = run(script, *words, cwd=tmp_path)
    assert seconds < 2
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), done.stderr
    assert expected in lines[0] and not done.stdout
    assert not list(tmp_path.iterdir())  # nothing was made


@pytest.mark.parametrize("words", [["--outptu", "x"], ["--output"], ["--output", ""], ["--output", "x", "y"], ["x"]])
def test_quickstart_refuses_what_it_does_not_know(words: list[str], tmp_path: Path) -> None:
    """In one sentence, before it makes an environment."""
    environment = {**tiny.ENVIRONMENT, "VENV": str(tmp_path / "venv")}
    command = ["bash", str(tiny.SCRIPTS / "quickstart.sh"), *words]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "[--output DIR]" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout and not list(tmp_path.iterdir())


def test_device_that_is_not_there(shapes: Path, tmp_path: Path) -> None:
    words = ("--data", shapes, "--output", tmp_path / "run", *tiny.AUTOENCODER)
    problem = tiny.refused("train_autoencoder", *words, "--device", "cuda")
    assert problem.code == 2 and "no CUDA device" in problem.what and "--device cpu" in problem.hint
    problem = tiny.refused("train_autoencoder", *words, "--device", "quantum")
    assert problem.code == 2 and "unknown device" in problem.what
    problem = tiny.refused("train_autoencoder", *words, "--mixed-precision", "fp16")
    assert problem.code == 2 and "needs a GPU" in problem.what


def test_print_config_needs_nothing_and_repeats_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.call("train_denoiser", "--print-config", "--lr", "0.25") == 0
    text = capsys.readouterr().out
    (tmp_path / "my.json").write_text(text)
    assert tiny.call("train_denoiser", "--print-config", "--config", tmp_path / "my.json") == 0
    assert capsys.readouterr().out == text and '"lr": 0.25' in text


def test_dry_run_writes_nothing(shapes: Path, latents: Path, tmp_path: Path) -> None:
    before = sorted(path for path in tmp_path.parent.rglob("*"))
    assert tiny.call("train_autoencoder", "--data", shapes, *tiny.AUTOENCODER, "--dry-run") == 0
    run = tmp_path / "run"
    assert tiny.call("train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, "--dry-run") == 0
    assert sorted(path for path in tmp_path.parent.rglob("*")) == before


def test_a_combination_that_cannot_be_is_refused_before_a_run_is_made(latents: Path, tmp_path: Path) -> None:
    """eps cannot be recovered where nothing of the picture is left, as at the end of a flow."""
    words = ("--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER, "--prediction.kind", "eps")
    problem = tiny.refused("train_denoiser", *words)
    assert problem.code == 2 and problem.hint and "eps" in problem.what
    assert not (tmp_path / "run" / "run.json").exists()
    assert tiny.call("train_denoiser", *words[:-1], "velocity", "--max-steps", "1") == 0  # mended, the folder serves


def test_what_a_run_holds(autoencoder: Path, denoiser: Path) -> None:
    for run in (autoencoder, denoiser):
        for name in ("config.json", "run.json", "metrics.jsonl", "timing.jsonl", "checkpoints/latest"):
            assert (run / name).is_file(), name
        assert not (run / "tensorboard").exists() and not (run / "trackers.json").exists()  # asked for by --report-to
        assert {p.name for p in (run / "samples").iterdir()} >= {"step-00000000", "step-00000004", "step-00000006"}
        assert (run / "samples" / "step-00000000" / "grid.png").is_file()
        text = "".join(p.read_text() for name in ("*.json", "final/*.json", "final/*.md") for p in run.glob(name))
        assert str(run.parent) not in text and str(Path.home()) not in text  # no path of this machine
    final = {str(p.relative_to(denoiser / "final")) for p in (denoiser / "final").rglob("*") if p.is_file()}
    assert final == {
        *(
            "config.json",
            "ingredients.json",
            "model.safetensors",
            "README.md",
            "card.json",
            "samples.png",
            "tokenizer/vocabulary.json",
            "text_encoder/model.safetensors",
        ),
        *("autoencoder/config.json", "autoencoder/model.safetensors", "autoencoder/README.md", "autoencoder/card.json"),
    }
