"""Objectives: what a network is trained to do. A new one is an `ObjectiveConfig` in a module here, which lists it in
its `OBJECTIVES`."""

from __future__ import annotations

from ldm.families import members
from ldm.objectives.base import LEVELS, Draw, Losses, Objective, ObjectiveConfig
from ldm.objectives.denoising import Denoising, DenoisingConfig

OBJECTIVES: tuple[type[ObjectiveConfig], ...] = members(__name__, "OBJECTIVES", ("denoising",))  # first: default

__all__ = ["LEVELS", "OBJECTIVES", "Denoising", "DenoisingConfig", "Draw", "Losses", "Objective", "ObjectiveConfig"]
