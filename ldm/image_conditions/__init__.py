"""Image conditions: what a denoiser is shown besides its captions. A new one is an `ImageCondition` in a module here,
which lists it in its `IMAGE_CONDITIONS`."""

from __future__ import annotations

from ldm.families import members
from ldm.image_conditions.base import ImageCondition, NoImage

IMAGE_CONDITIONS: tuple[type[ImageCondition], ...] = members(__name__, "IMAGE_CONDITIONS", ("none",))  # first: default

__all__ = ["IMAGE_CONDITIONS", "ImageCondition", "NoImage"]
