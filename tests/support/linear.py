"""A linear operator whose every property is its matrix's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.inverse.operators import LinearOperator, Spectrum


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix(LinearOperator):
    """y = A x for x (B, D), A (M, D)."""

    matrix: Tensor
    kind: Literal["matrix"] = "matrix"

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        return 1, 1, self.matrix.shape[1]

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.matrix

    def pinv(self, y: Tensor) -> Tensor:
        x: Tensor = y @ torch.linalg.pinv(self.matrix).T
        return x

    def solve(self, residual: Tensor, scale: Tensor | float, noise: Tensor | float) -> Tensor:
        system = scale * self.matrix @ self.matrix.T + noise * torch.eye(len(self.matrix), dtype=residual.dtype)
        weights: Tensor = residual @ torch.linalg.pinv(system, hermitian=True)
        return weights

    def spectrum(self, shape: tuple[int, int, int], like: Tensor) -> Spectrum:
        raise NotImplementedError
