"""The held-out loss of DiTs of several widths over the learning rate, with and without muP. Finished runs are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from training.pictures import charts
from training.settings.flags import Parser, run_main

BASE, HEAD = 64, 16
TRAIN = ("train_denoiser --config fashion-dit --backbone.depth 3 --text.length 34 --optimizer.warmup 30 "
         "--batch-size 32 --train.ema 0.95 --sample-every 100000 --save-every 100000 --resume auto")


def loss(out: Path, latents: str, steps: int, more: list[str]) -> float:
    """What a training ends with on held-out latents, by its averaged weights."""
    if not (out / "final").is_dir():
        given = ["--latents", latents, "--output", str(out), "--max-steps", str(steps), *more]
        subprocess.run([sys.executable, "-m", "training", *TRAIN.split(), *given], check=True)
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [line["val/loss"] for line in lines if "val/loss" in line][-1]


def main() -> None:
    """Train each width at each rate, by either rule; tell a row of Markdown for each, and draw both."""
    parser = Parser(__doc__ or "")
    for name in ("latents", "output"):
        parser.add_argument(f"--{name}", required=True, metavar="DIR")
    for name, default in (("widths", "64,128,256,512"), ("rates", "1e-3,2e-3,4e-3,8e-3,1.6e-2"), ("matrices", "adamw")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.read()
    rates, found = args.rates.split(","), dict[str, dict[str, list[float]]]()
    print(f"| rule, width | {' | '.join(rates)} | best |\n|{' --- |' * (len(rates) + 2)}")
    for rule, base in (("one rate for all", 0), (f"muP from {BASE}", BASE)):
        for width in args.widths.split(","):
            own = base if int(width) != BASE else 0
            flags = ["--backbone.width", width, "--backbone.heads", str(int(width) // HEAD), "--optimizer.matrices",
                     args.matrices, "--backbone.base_width", str(own)]  # fmt: skip
            place = f"{args.matrices}-{own}-{width}"
            row = [loss(Path(args.output) / f"{place}-{rate}", args.latents, args.steps,
                        [*flags, "--optimizer.lr", rate]) for rate in rates]  # fmt: skip
            found.setdefault(rule, {})[width] = row
            told = " | ".join(f"{x:.3f}" for x in row)
            print(f"| {rule}, {width} | {told} | {rates[row.index(min(row))]} |", flush=True)
    numbers = [float(rate) for rate in rates]
    up = charts.Axis.around("held-out loss", [x for rows in found.values() for row in rows.values() for x in row])
    panels = [charts.panel({width: [charts.Spot(rate, x, x, x) for rate, x in zip(numbers, row, strict=True)]
                            for width, row in rows.items()},
                           charts.Axis.around(f"learning rate, {rule}", numbers, log=True), up)
              for rule, rows in found.items()]  # fmt: skip
    named = charts.legend([f"width {width}" for width in args.widths.split(",")])
    charts.abreast([*panels, named]).save(Path(args.output) / "widths.png")


if __name__ == "__main__":
    run_main(main)
