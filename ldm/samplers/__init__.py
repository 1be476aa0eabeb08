"""Samplers: the ways from noise to a sample. A new one is a class in a module here, which lists it in its `SAMPLERS`.

All walk x_t = alpha x0 + sigma eps down a grid of times, asking the network for x0 and eps. Which to use:

    you want                                        sampler                         typical network calls
    a good picture at little cost                   dpmpp-2m, unipc                 15 to 30
    few calls on flow matching                      midpoint, heun, dpmpp-2s        10 to 40
    the exact answer of the ODE, as a judge         rk4, dopri5 (bosh3: coarser)    200 and more
    to go from a picture to its noise and back      heun, rk4, ddim                 50 and more
    variety, and errors that die out                dpmpp-sde-2m, dpmpp-sde-2s      25 to 60
    the same, of a model trained as a DDPM          ddpm, ddim with eta             250 to 1000, 50 to 100
    noise on a process of any kind                  euler-maruyama                  100 to 250
    one to eight calls, of a model distilled for    jump; consistency where noise is to come in     1 to 8
    it (distill_denoiser)                           between
    an error of few ODE steps repaired              restart, heun-churn             30 to 100
    a published result reproduced                   pndm, ipndm, deis, lms, dpm-solver-2 and -3, dpmpp-3m,
                                                    dpmpp-3s, dpmpp-sde-3m, reverse-diffusion,
                                                    predictor-corrector, langevin, euler: as their papers say
"""

from ldm.families import members
from ldm.samplers.adaptive import BogackiShampine, DormandPrince
from ldm.samplers.ancestral import DDIM, DDPM, DDIMInversion
from ldm.samplers.base import Memory, Sampler, Snapshot, check_grid, mix, prior, sample
from ldm.samplers.jumping import ConsistencySampler, JumpSampler
from ldm.samplers.multistep import DEIS, IPNDM, LMS, PNDM, DPMpp2M, DPMpp3M, DPMppSDE2M, DPMppSDE3M, UniPC
from ldm.samplers.ode import RK4, Euler, Heun, Midpoint
from ldm.samplers.renoise import HeunChurn, Restart
from ldm.samplers.singlestep import DPMpp2S, DPMpp3S, DPMppSDE2S, DPMSolver2, DPMSolver3
from ldm.samplers.stochastic import EulerMaruyama, Langevin, PredictorCorrector, ReverseDiffusion

# The order of help, the first being the default; kinds that are not named here come after.
ORDER = (
    "dpmpp-2m", "ddpm", "ddim", "euler", "midpoint", "heun", "rk4", "dpmpp-3m", "dpmpp-2s", "dpmpp-3s", "dpmpp-sde-2m",
    "dpmpp-sde-3m", "dpmpp-sde-2s", "dpm-solver-2", "dpm-solver-3", "unipc", "deis", "ipndm", "pndm", "lms",
    "euler-maruyama", "reverse-diffusion", "predictor-corrector", "langevin", "heun-churn", "restart", "dopri5",
    "bosh3", "jump", "consistency",
)
SAMPLERS: tuple[type, ...] = members(__name__, "SAMPLERS", ORDER)

__all__ = [
    "DDIM", "DDPM", "DEIS", "IPNDM", "LMS", "PNDM", "RK4", "SAMPLERS", "BogackiShampine", "ConsistencySampler",
    "DDIMInversion", "DPMSolver2", "DPMSolver3", "DPMpp2M", "DPMpp2S", "DPMpp3M", "DPMpp3S", "DPMppSDE2M",
    "DPMppSDE2S", "DPMppSDE3M", "DormandPrince", "Euler", "EulerMaruyama", "Heun", "HeunChurn", "JumpSampler",
    "Langevin", "Memory", "Midpoint", "PredictorCorrector", "Restart", "ReverseDiffusion", "Sampler", "Snapshot",
    "UniPC", "check_grid", "mix", "prior", "sample",
]
