"""What several runs' own files say, put together: the end of the quickstart, and autoencoders beside each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from training.errors import CHECKPOINT, UserError
from training.files import finite, write_json
from training.guarding import read_json


def quickstart(folder: Path, seconds: int) -> Iterator[str]:
    """Write summary.json of the quickstart in `folder`, which took so long, and say what it holds.

    Reads evaluation.json, as `evaluate.py --obedience shapes --output` writes it. Raises UserError where it is missing.
    """
    numbers = read_json(folder / "evaluation.json")
    obedience = {f"{count}_objects": numbers[f"obedience_{count}"] for count in (1, 2, 3)}
    one, two, three = obedience.values()
    found = {"obedience": one, "obedience_by_objects": obedience, "prompts": numbers["prompts"]}
    write_json(folder / "summary.json", finite(found | {"seconds": seconds, "grid": "grid.png"}))
    yield (f"captions never trained on, obeyed in shape, colour and position: {one:.1%} of one-object captions"
           f" (two objects {two:.1%}, three {three:.1%}), {seconds} s in all")  # fmt: skip
    yield f"picture grid: {folder / 'grid.png'}"


def autoencoders(folder: Path) -> Iterator[str]:
    """Markdown tables of the runs that scripts/recipes/compare_autoencoders.sh leaves in `folder`.

    Raises UserError where a run that a table needs is missing.
    """
    yield from _reconstructions(folder)
    held_back = next(folder.glob("*-start-hard"), None)
    if held_back is None:
        raise UserError(f"{folder}: no run *-start-hard", hint="let the recipe end", code=CHECKPOINT)
    name = held_back.name.removesuffix("-start-hard")
    yield from _latents(folder, name)
    yield from _starts(folder, name)


def _reconstructions(folder: Path) -> Iterator[str]:
    """A row of each inspected run: how it reconstructs, and what a denoiser makes of its latents."""
    yield ("| autoencoder | PSNR, dB | SSIM | LPIPS (random) | images/s | probe's loss | Frechet, reconstructed"
           " | Frechet, probe's pictures | Frechet, full training |")  # fmt: skip
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for home in sorted(file.parents[1] for file in folder.glob("*/inspection/inspection.json")):
        numbers = read_json(home / "inspection" / "inspection.json")
        told, probe = numbers["reconstruction"], numbers["probe"]
        rate = median(row["images_per_second"] for row in _lines(home / "timing.jsonl"))
        full = home / "denoiser.json"
        last = f"{read_json(full)['frechet_generated']:.2f}" if full.exists() else ""
        means = [f"{told[key]['mean']:.{digits}f}" for key, digits in (("psnr", 2), ("ssim", 3), ("lpips", 3))]
        judged = [f"{probe['loss']:.3f}", f"{probe['frechet_reconstructed']:.2f}", f"{probe['frechet']:.2f}"]
        yield f"| {' | '.join([home.name, *means, f'{rate:.0f}', *judged, last])} |"


def _latents(folder: Path, name: str) -> Iterator[str]:
    """What the regularisers do to the latents of the data set `name`."""
    yield ("\n| autoencoder | equivariance error: half the size | turned by a quarter"
           " | power of the latents above half the highest frequency |")  # fmt: skip
    yield "| --- | --- | --- | --- |"
    for home in (f"{name}-{kind}" for kind in ("kl-f4", "equivariance", "spectral")):
        numbers = read_json(folder / home / "inspection" / "inspection.json")
        moved, rings = numbers["equivariance_error"], numbers["spectrum"]["latents"]
        errors = [f"{moved[how]['mean']:.3f}" for how in ("half the size", "turned by a quarter")]
        yield f"| {home} | {' | '.join(errors)} | {sum(rings[len(rings) // 2 :]) / sum(rings):.1%} |"


def _starts(folder: Path, name: str) -> Iterator[str]:
    """Held-out PSNR and LPIPS of an adversary held back, beside one that is not."""
    yield "\n| held-out PSNR, dB (LPIPS) at step | held back | hard start |\n| --- | --- | --- |"
    held_back, hard = (
        {
            row["step"]: f"{row['val/psnr']:.2f} ({row['val/lpips']:.3f})"
            for row in _lines(folder / f"{name}-start-{kind}" / "metrics.jsonl")
            if "val/psnr" in row
        }
        for kind in ("held-back", "hard")
    )
    for step, told in held_back.items():
        yield f"| {step} | {told} | {hard.get(step, '')} |"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file of a run. Raises UserError where it is missing."""
    if not path.is_file():
        raise UserError(f"{path}: no such file", hint="is this run finished?", code=CHECKPOINT)
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
