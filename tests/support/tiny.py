"""The user's doors called in this process on tiny models, so that a test pays for torch once."""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from training.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}

SHORT = [
    "--batch-size",
    "32",
    "--max-steps",
    "6",
    "--save-every",
    "100",
    "--sample-every",
    "4",
    "--train.validation_size",
    "8",
    "--device",
    "cpu",
]
AUTOENCODER = [
    *["--config", "smoke", "--model.channels", "8,8,8", "--model.groups", "4", "--discriminator.width", "4"],
    *["--loss.discriminator_start", "2", "--loss.adversarial_start", "3", "--loss.adversarial_ramp", "2"],
    *SHORT,
]
DENOISER = [
    *[
        "--config",
        "smoke",
        "--backbone.width",
        "16",
        "--backbone.depth",
        "1",
        "--text.width",
        "16",
        "--text.depth",
        "1",
        "--sample.steps",
        "2",
    ],
    *SHORT,
]


@contextmanager
def heard(*numbers: signal.Signals) -> Iterator[None]:
    """Signals as a program in a terminal has them: under nohup and behind a shell's & some are ignored, here and by all
    that a test starts. Handlers are put back."""
    usual = {number: signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL for number in numbers}
    kept = {number: signal.signal(number, handler) for number, handler in usual.items()}
    try:
        yield
    finally:
        for number, before in kept.items():
            signal.signal(number, before)


def call(script: str, *words: object) -> int:
    """The exit code of `scripts/SCRIPT.py WORDS`, run here. Raises UserError as the script's main does."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    main = runpy.run_path(str(SCRIPTS / f"{script}.py"))["main"]
    try:
        with patch.object(sys, "argv", [script, *map(str, words)]):
            main()
    except SystemExit as end:
        return int(end.code or 0)
    except UserError as problem:
        problem.__context__ = None  # frames, here and in the traceback, would keep the run's lock
        raise problem.with_traceback(None) from None
    finally:
        gc.collect()
        for number, handler in kept.items():
            signal.signal(number, handler)
    return 0


def keep() -> None:
    """Leave what the imported modules hold, for good, out of the collections that end each `call`."""
    gc.collect()
    gc.freeze()


def refused(script: str, *words: object) -> UserError:
    """The UserError that `scripts/SCRIPT.py WORDS` ends with."""
    try:
        call(script, *words)
    except UserError as problem:
        return problem
    raise AssertionError(f"{script} {' '.join(map(str, words))} was not refused")


def spawn(*words: object, limit: float = 120) -> subprocess.CompletedProcess[str]:
    """A real process: `python WORDS`, output captured."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=limit, check=False)


def shake(home: Path) -> Path:
    """Add noise to all weights of a denoiser's final/: a few steps of training leave it deaf to captions."""
    import torch

    from training.models.lineage import store_ingredients
    from training.tensors import content_hash, load_tensors, save_tensors

    noise = torch.Generator().manual_seed(0)
    tensors = load_tensors(home / "model.safetensors")
    changed = {name: x + 0.3 * torch.randn(x.shape, generator=noise) for name, x in tensors.items()}
    save_tensors(home / "model.safetensors", changed)
    store_ingredients(home, {"denoiser": content_hash(changed)})
    return home


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, parsed."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_checkpoint(run: Path) -> dict[str, bytes]:
    """The bytes of every file of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step-*"))
    return {path.name: path.read_bytes() for path in sorted(newest.iterdir())}
