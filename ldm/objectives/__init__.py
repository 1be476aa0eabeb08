"""Objectives: what a network is trained to do. A new one is an `ObjectiveConfig` in a module here, which lists it in
its `OBJECTIVES`."""

from __future__ import annotations

from ldm.families import members
from ldm.objectives.base import ALONE, LEVELS, Beside, Companion, Draw, Losses, Objective, ObjectiveConfig
from ldm.objectives.denoising import Denoising, DenoisingConfig

ORDER = ("denoising",)  # first in help, and the default
OBJECTIVES: tuple[type[ObjectiveConfig], ...] = members(__name__, "OBJECTIVES", ORDER)

FEW_STEP = tuple(kind for kind in OBJECTIVES if kind.reading is not None)  # those whose models jump

__all__ = [
    "ALONE", "FEW_STEP", "LEVELS", "OBJECTIVES", "Beside", "Companion", "Denoising", "DenoisingConfig", "Draw",
    "Losses", "Objective", "ObjectiveConfig",
]
