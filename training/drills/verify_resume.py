"""Proof of exact resume on a user's own config and data: a training with interruptions must end with the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import CHECKPOINT, USAGE, UserError
from training.messages import answer

if TYPE_CHECKING:
    import argparse

PROGRAM = Path(__file__).parents[1] / "__main__.py"  # `python -m training`
PRELOADED = ["torch", "accelerate", "training.stages.train", "training.stages.autoencoder"]
PRELOADED += ["training.stages.denoiser", "training.models.assembly", "lpips", "torchvision"]


def verify(args: argparse.Namespace, flags: list[str]) -> int:
    """Train `args.steps` steps without and with interruptions, `flags` passed on; the exit code.

    Raises UserError (exit 4) naming the files whose bytes differ.
    """
    words = command(args, flags)
    steps = args.steps
    if steps < 4:
        raise UserError(f"--steps: must be >= 4 (got {steps})", hint="4 steps hold a start, a middle and an end")
    every = max(1, steps // 3)
    words += ["--max-steps", str(steps), "--save-every", str(every), "--sample-every", str(steps)]
    words += ["--train.log_every", "1", "--resume", "auto"]
    home = Path(args.folder or tempfile.mkdtemp(prefix="verify-resume-"))
    straight, other_run = home / "straight", home / "interrupted"
    # Stopped after the first step and after one more; killed inside a step, inside a save, and just before its end.
    faults = ["step=term", "step=term", "step:2=kill", "checkpoint.rename=kill", "checkpoint.latest=kill"]
    run([*words, "--output", str(straight)], home / "straight.log")
    for number, fault in enumerate([*faults, ""]):
        log = home / f"interrupted-{number}.log"
        code = run([*words, "--output", str(other_run)], log, fault=fault)
        answer(f"  {fault or 'to the end'}: exit code {code}")
    if unlike := differences(straight, other_run):
        raise UserError(
            f"the interrupted training differs in {', '.join(unlike)}",
            hint=f"both are in {home}; a GPU needs deterministic kernels to repeat itself",
            code=CHECKPOINT,
        )
    answer(f"exact: {steps} steps with {len(faults)} interruptions end with the bytes of {steps} steps without")
    if not args.folder:
        shutil.rmtree(home)
    return 0


def command(args: argparse.Namespace, flags: list[str]) -> list[str]:
    """The training that the data asks for: its verb and flags."""
    if bool(args.data) == bool(args.latents):
        raise UserError("give --data DIR (stage one) or --latents DIR (stage two)", code=USAGE)
    stage, source = ("autoencoder", ["--data", args.data]) if args.data else ("denoiser", ["--latents", args.latents])
    if args.teacher and args.data:
        raise UserError("--teacher is of a denoiser's student, which learns from --latents DIR", code=USAGE)
    verb = ["distill_denoiser", "--teacher", args.teacher] if args.teacher else [f"train_{stage}"]
    return [*verb, *source, "--config", args.config, *flags]


def run(words: list[str], log: Path, *, fault: str = "") -> int:
    """The exit code of `python -m training WORDS` in a process of its own, -9 where it was killed.

    Raises UserError with its last words where it failed for another reason than `fault`.
    """
    process = launch(PROGRAM, words, log, {"LDM_FAULT": fault})
    process.join()
    code = process.exitcode or 0
    if code not in {"kill": (-9, 0), "term": (143, 0)}.get(fault.rpartition("=")[2], (0,)):
        raise UserError(f"the training failed (exit code {code}):\n{log.read_text()[-2000:]}", code=max(code, 1))
    return code


def launch(script: Path, words: list[str], log: Path, environment: dict[str, str]) -> BaseProcess:
    """Start `script` as a process of its own, all it says in `log`: a real process, forked from a server that has
    imported torch once and done nothing with it."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    log.parent.mkdir(parents=True, exist_ok=True)
    process = server.Process(target=_main, args=(str(script), words, str(log), environment))
    process.start()
    return process


def _main(script: str, words: list[str], log: str, environment: dict[str, str]) -> None:
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def differences(ours: Path, theirs: Path) -> list[str]:
    """What differs between two finished runs: metrics.jsonl, every file of the newest checkpoint and of final/."""
    kept = [{p.relative_to(run).as_posix(): p for p in _ends(run)} for run in (ours, theirs)]
    names = sorted(kept[0].keys() | kept[1].keys())
    return [n for n in names if n not in kept[0] or n not in kept[1] or not _same(kept[0][n], kept[1][n])]


def _ends(run: Path) -> list[Path]:
    newest = max((run / "checkpoints").glob("step-*"), default=run / "checkpoints")
    return [run / "metrics.jsonl", *(p for f in (newest, run / "final") for p in f.rglob("*") if p.is_file())]


def _same(ours: Path, theirs: Path) -> bool:
    return ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes()
