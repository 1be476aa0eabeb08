"""Critically damped Langevin diffusion on four clusters in the plane: a small network learns it, and draws them.

Writes damped.png: points at t = 1, .4, .2, .1 and 0 of their way from noise, and the data; below, their velocities.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.critically_damped import CriticallyDamped, Phase, normal
from ldm.noise import Noise
from training.guarding import make_folder
from training.pictures import grids
from training.settings.flags import Parser, run_main

CLD, STOPS, WIDTH, BATCH, RATE, SIDE = CriticallyDamped(), (1, 0.4, 0.2, 0.1, 0), 192, 512, 2e-3, 96
def clusters(noise: Noise) -> Tensor:
    """(B, 2): four, as often, of standard deviation 0.15."""
    corner = torch.stack([noise.uniform((), "left"), noise.uniform((), "up")], 1).round() * 2 - 1
    return (corner + 0.15 * noise.normal((2,), "width")).float()
def read(at: Phase, t: Tensor) -> Tensor:
    """What the network reads, (B, 20)."""
    waves = t.float().sqrt().expand(len(at.x))[:, None] * 2 ** torch.arange(8)
    return torch.cat([at.x, 2 * at.v, waves.sin(), waves.cos()], 1)
def density(points: Tensor, reach: float) -> Tensor:
    """uint8 (3, SIDE, SIDE): dark where many of the points are."""
    count = torch.histogramdd(points.double(), SIDE, range=[-reach, reach] * 2).hist.T.flip(0)
    return (255 * (1 - (count / 4).clamp(max=1))).to(torch.uint8).expand(3, -1, -1)

def main() -> None:
    """Learn and draw."""
    (parser := Parser(__doc__ or "")).add_argument("--output", metavar="DIR", required=True, help="for damped.png")
    parser.add_argument("--steps", metavar="N", type=int, default=3000, help="of Adam, each of 512 points")
    args, _ = parser.read(), torch.manual_seed(0)
    make_folder(folder := Path(args.output))
    layers = [part for width in (20, WIDTH, WIDTH) for part in (nn.Linear(width, WIDTH), nn.SiLU())]
    net = nn.Sequential(*layers, nn.Linear(WIDTH, 2))
    optimiser = torch.optim.Adam(net.parameters(), RATE)
    for step in range(args.steps):
        noise = Noise.from_seeds(range(BATCH * step, BATCH * (step + 1)))
        optimiser.param_groups[0]["lr"] = RATE * (1 - step / args.steps)
        t, eps = 1e-4 + (1 - 1e-4) * noise.uniform((), "time").double() ** 2, normal((2,), noise)
        optimiser.zero_grad()
        CLD.loss(net(read(CLD.perturb(clusters(noise), eps, t), t)), eps).mean().backward()
        optimiser.step()
    shown = [CLD.prior((2,), noise := Noise.from_seeds(range(10**9, 10**9 + 4000)))]
    score = torch.no_grad()(lambda at, t: CLD.score(net(read(at, t)), t))
    for i, (t, s) in enumerate(pairwise(STOPS)):
        times = torch.linspace(t**0.5, s**0.5, 61, dtype=torch.float64) ** 2
        shown.append(CLD.sample(score, shown[-1], times, noise.fold(i)))
    shown.append(Phase(clusters(noise), 0.1 * noise.normal((2,), "start")))
    cells = [density(at[part], 2 - part) for part in (0, 1) for at in shown]
    grids.save(grids.grid(torch.stack(cells), len(shown)), folder / "damped.png", {"steps": args.steps})

if __name__ == "__main__":
    run_main(main)
