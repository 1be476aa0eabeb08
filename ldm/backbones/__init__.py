"""Backbones: the networks that denoise. One file each: a config derived from `BackboneConfig` is in `BACKBONES`."""

from __future__ import annotations

from ldm.backbones.base import Backbone, BackboneConfig
from ldm.backbones.dit import DiT
from ldm.backbones.unet import UNet
from ldm.families import members

BACKBONES = members(__name__, __path__, BackboneConfig, UNet)

__all__ = ["BACKBONES", "Backbone", "BackboneConfig", "DiT", "UNet"]
