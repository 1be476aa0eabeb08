"""Posterior samplers: draws of x0 given y = A x0 + sigma_y n. A new one is a class in a module here, which lists it in
its `POSTERIORS`.

    you want                                          method
    a calibrated posterior, A linear                  split-gibbs: no bias but that of its inner walk
    a hole filled, the rest exact                     repaint
    few calls, A linear                               ddrm
    any differentiable A, a decoder before it too     resample, dps; neither has the posterior's spread
"""

from ldm.families import members
from ldm.inverse.posterior.base import Posterior, Problem
from ldm.inverse.posterior.ddrm import DDRM
from ldm.inverse.posterior.dps import DPS
from ldm.inverse.posterior.repaint import RePaint
from ldm.inverse.posterior.resample import ReSample
from ldm.inverse.posterior.split_gibbs import SplitGibbs

# The order of help, the first being the default; kinds that are not named here come after.
ORDER = ("split-gibbs", "ddrm", "repaint", "resample", "dps")
POSTERIORS: tuple[type[Posterior], ...] = members(__name__, "POSTERIORS", ORDER)

__all__ = ["DDRM", "DPS", "POSTERIORS", "Posterior", "Problem", "RePaint", "ReSample", "SplitGibbs"]
