"""Switches of stage two's training beside the plain recipe, with the same latents and seeds. Finished runs are kept."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

from training.settings.flags import Parser, run_main

SWITCHES = tomllib.loads(Path(__file__).with_name("switches.toml").read_text())


def spent(*words: str) -> float:
    """Seconds of processor time of a command of this project. Raises CalledProcessError where it fails."""
    before = sum(os.times()[2:4])  # of children that ended
    subprocess.run([sys.executable, "-m", "training", *words], check=True)
    return sum(os.times()[2:4]) - before


def trial(out: Path, flags: list[str], given: list[str], judge: list[str]) -> tuple[float, float, float]:
    """Fréchet distance, share obeyed and seconds of one training, measured once."""
    if not (out / "trial.json").is_file():
        seconds = spent("train_denoiser", *given, "--output", str(out), "--resume", "auto", *flags)
        spent("evaluate", "--model", str(out), *judge, "--output", str(out / "evaluation.json"), "--overwrite")
        found = json.loads((out / "evaluation.json").read_text())
        (out / "trial.json").write_text(json.dumps([found["frechet_generated"], found["obedience"], seconds]))
    return tuple(json.loads((out / "trial.json").read_text()))


def main() -> None:
    """Train, measure, and tell a row of Markdown for each switch: means over seeds, and the distance taken off."""
    parser = Parser(__doc__ or "")
    for name in ("data", "latents", "classifier", "output"):
        parser.add_argument(f"--{name}", required=True, metavar="DIR")
    for name, default in (("config", "fashion-dit"), ("count", "2000"), ("switches", ",".join(SWITCHES))):
        parser.add_argument(f"--{name}", default=default, help="--switches a+b: both together")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.read()
    given = ["--config", args.config, "--latents", args.latents]
    judge = ["--data", args.data, "--count", args.count, "--features", args.classifier, "--obedience", args.classifier]
    print("| switch | Frechet | plain's less this | obeyed, % | s of a core |\n| --- | --- | --- | --- | --- |")
    for name in ["plain", *(name for name in args.switches.split(",") if name != "plain")]:
        flags = [word for switch in name.split("+") for word in SWITCHES[switch].split()]
        trials = ((Path(args.output) / f"{name}-{seed}", [*flags, "--seed", str(seed)]) for seed in range(args.seeds))
        distance, obeyed, seconds = zip(*(trial(*each, given, judge) for each in trials), strict=True)
        if name == "plain":
            plain = distance
        less = [one - other for one, other in zip(plain, distance, strict=True)]
        told = f"{statistics.mean(less):+.3f} ({min(less):+.3f} to {max(less):+.3f})"
        far, share, spent_on = (statistics.mean(part) for part in (distance, obeyed, seconds))
        print(f"| {name} | {far:.3f} | {told} | {100 * share:.1f} | {spent_on:.0f} |", flush=True)


if __name__ == "__main__":
    run_main(main)
