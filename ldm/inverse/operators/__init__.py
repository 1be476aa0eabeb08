"""Operators A of y = A x0 + sigma_y n: what a measurement keeps of a picture. A new one is a class in a module here,
which lists it in its `OPERATORS`.

Linear ones have adjoint, pseudo-inverse, solves and singular values in closed form: mask, box, bicubic, gaussian-blur,
motion-blur, grey. The others are differentiable only: jpeg, phase, hdr, and any operator behind a decoder (`Decoded`).
"""

from ldm.families import members
from ldm.inverse.operators.base import LinearOperator, Operator, Spectrum
from ldm.inverse.operators.blurs import GaussianBlur, MotionBlur
from ldm.inverse.operators.masks import GivenMask, Mask, measure, residual
from ldm.inverse.operators.nonlinear import HDR, Decoded, Phase
from ldm.inverse.operators.quantised import JPEG
from ldm.inverse.operators.separable import Bicubic, Box, Grey

# The order of help, the first being the default; kinds that are not named here come after.
ORDER = ("mask", "box", "bicubic", "gaussian-blur", "motion-blur", "grey", "jpeg", "phase", "hdr")
OPERATORS: tuple[type[Operator], ...] = members(__name__, "OPERATORS", ORDER)

__all__ = [
    "HDR", "JPEG", "OPERATORS", "Bicubic", "Box", "Decoded", "GaussianBlur", "GivenMask", "Grey", "LinearOperator",
    "Mask", "MotionBlur", "Operator", "Phase", "Spectrum", "measure",
    "residual",
]
