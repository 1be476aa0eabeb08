"""Samplers: the ways from noise to a sample. A new one is a class and an entry in `SAMPLERS`."""

from ldm.samplers.adams import DEIS, IPNDM, LMS, PNDM
from ldm.samplers.adaptive import BogackiShampine, DormandPrince
from ldm.samplers.ancestral import DDIM, DDPM, DDIMInversion
from ldm.samplers.base import Memory, Sampler, Snapshot, check_grid, mix, prior, sample
from ldm.samplers.dpm import (
    DPMpp2M,
    DPMpp2S,
    DPMpp3M,
    DPMpp3S,
    DPMppSDE2M,
    DPMppSDE2S,
    DPMppSDE3M,
    DPMSolver2,
    DPMSolver3,
)
from ldm.samplers.ode import RK4, Euler, Heun, Midpoint
from ldm.samplers.renoise import HeunChurn, Restart
from ldm.samplers.stochastic import EulerMaruyama, Langevin, PredictorCorrector, ReverseDiffusion
from ldm.samplers.unipc import UniPC

SAMPLERS = (DPMpp2M, DDPM, DDIM, Euler, Midpoint, Heun, RK4, DPMpp3M, DPMpp2S, DPMpp3S, DPMppSDE2M, DPMppSDE3M,
            DPMppSDE2S, DPMSolver2, DPMSolver3, UniPC, DEIS, IPNDM, PNDM, LMS, EulerMaruyama, ReverseDiffusion,
            PredictorCorrector, Langevin, HeunChurn, Restart, DormandPrince, BogackiShampine)

__all__ = [
    "DDIM", "DDPM", "DEIS", "IPNDM", "LMS", "PNDM", "RK4", "SAMPLERS", "BogackiShampine", "DDIMInversion", "DPMSolver2",
    "DPMSolver3", "DPMpp2M", "DPMpp2S", "DPMpp3M", "DPMpp3S", "DPMppSDE2M", "DPMppSDE2S", "DPMppSDE3M", "DormandPrince",
    "Euler", "EulerMaruyama", "Heun", "HeunChurn", "Langevin", "Memory", "Midpoint", "PredictorCorrector", "Restart",
    "ReverseDiffusion", "Sampler", "Snapshot", "UniPC", "check_grid", "mix", "prior", "sample",
]
