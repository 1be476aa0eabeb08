"""Endurance: a small training is killed at random moments, over and over, and must end with the bytes of a calm one."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from training.drills.verify_resume import PROGRAM, differences, launch, run
from training.errors import CHECKPOINT, UserError
from training.messages import answer

if TYPE_CHECKING:
    import argparse

SMALL = ["--config", "smoke", "--save-every", "2", "--sample-every", "20", "--train.log_every", "1", "--device", "cpu"]
SMALL += ["--train.validation_size", "8", "--train.flip", "true", "--resume", "auto"]
SMALL += ["--batch-size", "8"]
STAGES = {
    "autoencoder": ["--model.channels", "8,8,8", "--model.groups", "4", "--discriminator.width", "4"],
    "denoiser": ["--backbone.width", "16", "--backbone.depth", "1", "--text.width", "16"],
}


def soak(args: argparse.Namespace) -> int:
    """Kill trainings of `args.steps` steps `args.kills` times in all, compare each; the exit code.

    Raises UserError (exit 4) naming the files whose bytes differ and the seed that repeats the drill.
    """
    home = Path(args.folder or tempfile.mkdtemp(prefix="soak-"))
    source, moments = prepare(args.stage, home), random.Random(args.seed)
    words = [f"train_{args.stage}", *source, *SMALL, *STAGES[args.stage], "--max-steps", str(args.steps)]
    begun = time.monotonic()
    run([*words, "--output", str(home / "calm")], home / "calm.log")
    span, kills, rounds = time.monotonic() - begun, 0, 0
    while kills < args.kills:
        rounds += 1
        output = home / f"killed-{rounds}"
        kills += kill_until_done([*words, "--output", str(output)], output, span, moments, args.kills - kills)
        if unlike := differences(home / "calm", output):
            what = f"after {kills} kills {', '.join(unlike)} of {output} differ"
            raise UserError(what, hint=f"repeat with --seed {args.seed}", code=CHECKPOINT)
        twice_or_never(output, args.steps)
        outcome = f"{rounds} trainings ended with the bytes of the uninterrupted one"
        answer(f"{args.stage}: {kills} kills, {outcome}")
        shutil.rmtree(output)
    if not args.folder:
        shutil.rmtree(home)
    return 0


def kill_until_done(words: list[str], output: Path, span: float, moments: random.Random, limit: int) -> int:
    """Start a training again and again, each time killed after up to `span` seconds, until it ends; kills made."""
    log, kills = output.with_suffix(".log"), 0
    while kills < limit:
        process = launch(PROGRAM, words, log, {})
        process.join(moments.uniform(0, span))
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode != -9:
            break
        kills += 1
    run(words, log)
    return kills


def twice_or_never(output: Path, steps: int) -> None:
    """Raise UserError (exit 4) where metrics.jsonl tells a step twice or not at all."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    told = [row["step"] for row in rows if "lr" in row]
    if told != list(range(1, steps + 1)):
        raise UserError(f"{output}/metrics.jsonl holds the steps {told}", code=CHECKPOINT)


def prepare(stage: str, home: Path) -> list[str]:
    """Embedded pictures, and for stage two their latents, as the flags that name them."""
    data, latents, encoder = home / "data", home / "latents", home / "encoder"
    pack = ["make_shards", "pack", "shapes", "--samples", "48", "--val-fraction", "0.2", "--output", str(data)]
    run(pack, home / "prepare.log")
    if stage == "autoencoder":
        return ["--data", str(data)]
    train = ["train_autoencoder", "--data", str(data), *SMALL, *STAGES["autoencoder"], "--max-steps", "2"]
    train += ["--output", str(encoder)]
    run(train, home / "prepare.log")
    encode = ["encode_latents", "--autoencoder", str(encoder), "--data", str(data), "--flip", "--device", "cpu"]
    encode += ["--output", str(latents)]
    run(encode, home / "prepare.log")
    return ["--latents", str(latents)]
