"""Backbones: the networks that denoise. A new one is a `BackboneConfig` in a module here, which lists it in its
`BACKBONES`."""

from __future__ import annotations

from ldm.backbones.base import Backbone, BackboneConfig
from ldm.backbones.dit import DiT
from ldm.backbones.unet import UNet
from ldm.families import members

BACKBONES: tuple[type[BackboneConfig], ...] = members(__name__, "BACKBONES", ("unet",))  # the first is the default

__all__ = ["BACKBONES", "Backbone", "BackboneConfig", "DiT", "UNet"]
