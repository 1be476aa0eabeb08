"""Noise schedules: the family of processes x_t = alpha(t) x0 + sigma(t) eps. A new one is a class in a
module here, which lists it in its `SCHEDULES`."""

from ldm.families import members
from ldm.schedules.base import Level, NoiseSchedule, match, per_sample
from ldm.schedules.continuous import GVP, VP, Flow, SubVP
from ldm.schedules.exploding import EDM, VE
from ldm.schedules.tables import DDPMCosine, DDPMLinear, DDPMScaledLinear, DDPMSigmoid, Table

SCHEDULES: tuple[type, ...] = members(__name__, "SCHEDULES")

__all__ = [
    "EDM", "GVP", "SCHEDULES", "VE", "VP", "DDPMCosine", "DDPMLinear", "DDPMScaledLinear", "DDPMSigmoid", "Flow",
    "Level", "NoiseSchedule", "SubVP", "Table", "match", "per_sample",
]
