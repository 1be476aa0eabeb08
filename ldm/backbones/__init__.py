"""Backbones: the networks that denoise. One file each; `BACKBONES` lists their configs."""

from __future__ import annotations

from ldm.backbones.base import Backbone
from ldm.backbones.dit import DiT
from ldm.backbones.unet import UNet

BACKBONES = (UNet, DiT)

__all__ = ["BACKBONES", "Backbone", "DiT", "UNet"]
