"""Objectives: what a network is trained to do. A new one is a file here and an entry in `OBJECTIVES`."""

from __future__ import annotations

from ldm.objectives.base import LEVELS, Draw, Losses, Objective
from ldm.objectives.denoising import Denoising

OBJECTIVES = (Denoising,)

__all__ = ["LEVELS", "OBJECTIVES", "Denoising", "Draw", "Losses", "Objective"]
