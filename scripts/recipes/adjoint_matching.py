"""Adjoint matching in the plane: eight clusters on a ring, a reward that grows to the right, and how much of each is
drawn, the right one first, before and after; what has to come, the data times e^reward, is known."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm.adjoint_matching import direct, matched, walked
from ldm.denoiser import Bound, Denoise
from ldm.diffusion import Denoised
from ldm.exact import F64, Mixture
from ldm.noise import Noise
from ldm.schedules import Flow
from training.settings.flags import Parser, run_main

STD, STEPS, BATCH, FLOW, PULL = 0.12, 50, 256, Flow(), torch.tensor([1.5, 0.0], dtype=F64)
CENTRES = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)], dtype=F64)
DATA = Mixture(FLOW, torch.full((8,), 1 / 8), CENTRES, (STD**2 * torch.eye(2, dtype=F64)).expand(8, 2, 2))
GRID = torch.linspace(1, 0, STEPS + 1, dtype=F64)

def reward(x: Tensor) -> Tensor:
    return x @ PULL

def taught(directly: bool, updates: int) -> Denoise:
    """The data's exact denoiser and a network beside it that has learned."""
    net = nn.Sequential(nn.Linear(3, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2)).double()
    def both(x: Tensor, t: Tensor) -> Denoised:
        x0 = DATA(x, t).x0 + t * net(torch.cat([x, t.expand(len(x), 1)], 1))
        return Denoised(x0, (x - FLOW(t).alpha * x0) / FLOW(t).sigma)
    model, optimiser = Bound(FLOW, both), torch.optim.Adam(net.parameters())
    for update in range(updates):
        x = (noise := Noise.from_seeds(range(BATCH * update, BATCH * (update + 1)))).normal((2,), "prior", dtype=F64)
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - update / updates)
        optimiser.zero_grad()
        if directly:
            direct(model, x, GRID, noise, reward).mean().backward()
        else:
            for loss in matched(model, DATA, x, GRID, noise, reward, range(STEPS - 1)):
                loss.mean().backward()
        optimiser.step()
    return model

def main() -> None:
    """Learn by both, draw, and count."""
    (parser := Parser(__doc__ or "")).add_argument("--updates", metavar="N", type=int, default=200, help="of Adam")
    updates, _, noise = parser.read().updates, torch.manual_seed(0), Noise.from_seeds(range(10**9, 10**9 + 4000))
    wanted = replace(DATA, weights=reward(CENTRES).softmax(0), means=CENTRES + STD**2 * PULL)
    models = {"data": DATA, "data times e^r": wanted, "adjoint matching": taught(False, updates)}
    for name, model in (models | {"direct gradient": taught(True, updates // 10)}).items():
        points = walked(model, noise.normal((2,), "prior", dtype=F64), GRID, noise)[-1]
        far, nearest = torch.cdist(points, CENTRES).min(1)
        shares = [f"{count / 4000:6.1%}" for count in nearest.bincount(minlength=8).tolist()]
        print(f"{name:18}", *shares, f"  in none {(far > 4 * STD).double().mean():.1%}")

if __name__ == "__main__":
    run_main(main)
