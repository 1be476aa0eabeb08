"""Score distillation from `demo`: latents are moved, step by step, to where its denoiser would have those of a caption.

Writes distilled.png: a row for each seed, the latents from noise to the end, then what a sampler draws of the seed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from autoencoder.images import to_uint8
from ldm.guidance import ClassifierFree
from ldm.noise import Noise
from ldm.pipeline import Pipeline
from ldm.score_distillation import score_distillation
from ldm.teacher import Teacher
from training.guarding import make_folder
from training.models.assembly import load_pipeline
from training.pictures import grids
from training.settings.flags import Parser, run_main

RATE, LOW, HIGH = 0.03, 0.02, 0.98  # Adam's rate, falling to 0; between which times noise is added

def distilled(pipeline: Pipeline, caption: str, seeds: list[int], scale: float, steps: int) -> list[Tensor]:
    """Latents (B, C, h, w) of each seed: at the start, after a sixth and half of the steps, and after all."""
    noise, shape = Noise.from_seeds(seeds, pipeline.device), pipeline.latent_shape(pipeline.size)
    teacher = Teacher(pipeline.denoiser, ClassifierFree(scale=scale), pipeline.text([""]))
    cond, x = pipeline.told([caption] * len(seeds)), noise.normal(shape, "prior").requires_grad_()
    optimiser, shots = torch.optim.Adam([x], betas=(0.9, 0.99)), [x.detach().clone()]
    for step in range(steps):
        own = noise.fold(step)
        t = teacher.schedule.trained(LOW + (HIGH - LOW) * own.uniform((), "time"))
        optimiser.param_groups[0]["lr"] = RATE * (1 - step / steps)
        optimiser.zero_grad()
        score_distillation(x, teacher, cond, t, own.normal(shape, "eps")).sum().backward()
        optimiser.step()
        shots += [x.detach().clone()] if step + 1 in (steps // 6, steps // 2, steps) else []
    return shots


def main() -> None:
    """Optimise and draw."""
    add = (parser := Parser(__doc__ or "")).add_argument
    add("--output", metavar="DIR", required=True, help="where distilled.png goes")
    add("--prompt", default="a red circle", help="the caption")
    add("--scale", metavar="S", type=float, default=7.5, help="of its guidance; the sampler has the scale of `demo`")
    add("--steps", metavar="N", type=int, default=600, help="of Adam, 6 at least")
    args, pipeline, seeds = parser.read(), load_pipeline("demo", "cpu"), [0, 1, 2, 3]
    make_folder(folder := Path(args.output))  # before the minutes of work
    shots = distilled(pipeline, args.prompt, seeds, args.scale, args.steps)
    with torch.no_grad():
        columns = [to_uint8(pipeline.decode(latents)) for latents in shots]
    columns += pipeline.pixels([args.prompt] * 4, seeds)
    sheet = grids.grid(torch.stack(columns, 1).flatten(0, 1), len(columns), rows=[f"seed {seed}" for seed in seeds])
    grids.save(sheet, folder / "distilled.png", {"prompt": args.prompt, "scale": args.scale, "steps": args.steps})

if __name__ == "__main__":
    run_main(main)
