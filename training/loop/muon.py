"""Muon: momentum of matrices with its singular values made equal; AdamW for all that is no matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# a x + b x^3 + c x^5, one after the other: the best odd quintics that take [0.01, 1] near 1 in three steps, each for
# what the one before leaves (Amsel et al. 2025, arXiv 2505.16932, theorem 3.1; solved by Remez' exchange).
COEFFICIENTS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
LEAST = 32  # rows and columns of a matrix: what is narrower maps to or from data, whose scale counts
# Numbers of the weights that are orthogonalised at once: about five times as many are there meanwhile. A CPU is as fast
# in pieces that its cache holds; a GPU's products must fill it.
PIECE = {"cpu": 1 << 18}
LARGE_PIECE = 1 << 24
RMS = 0.2  # of an update at rate 1, as AdamW's is: rate and decay serve both (Liu et al. 2025, arXiv 2502.16982)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (k, n, m) with their singular values, over the Frobenius norm, brought from 0.01 to 1 to 0.73 to 1.27;
    smaller ones grow 78 times at most, zeros stay zeros.

    On a CPU, whose bfloat16 products are slow, in float32, and from the smaller square X X' alone where that is less
    work.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices.float() if wide else matrices.float().mT
    x = x / x.flatten(-2).norm(dim=-1)[..., None, None].clamp(min=1e-30)
    if x.device.type != "cpu":
        x = by_products(x.bfloat16())
    else:
        x = by_squares(x) if x.shape[-1] > 1.5 * x.shape[-2] else by_products(x)
    y: Tensor = (x if wide else x.mT).to(matrices.dtype)
    return y


def by_products(x: Tensor) -> Tensor:
    """x <- (a + b X + c X^2) x with X = x x', in any precision (Jordan et al. 2024, "Muon"): of x (n, m) in
    6 m + 3 n products of n^2."""
    for a, b, c in COEFFICIENTS:
        x = _factor(x @ x.mT, a, b, c) @ x
    return x


def by_squares(x: Tensor) -> Tensor:
    """The same of x (k, n, m), n <= m: with q = a + b X + c X^2 the square becomes q X q, and x all q times x, in
    2 m + 9 n products of n^2.

    Needs float32: in less, what is left of the smallest singular values would grow.
    """
    square = x @ x.mT
    whole = q = _factor(square, *COEFFICIENTS[0])
    for more in COEFFICIENTS[1:]:
        square = q @ square @ q
        q = _factor(square, *more)
        whole = q @ whole
    return whole @ x


def _factor(square: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b X + c X^2."""
    q = torch.baddbmm(square, square, square, beta=b, alpha=c)
    q.diagonal(dim1=-2, dim2=-1).add_(a)
    return q


def matrices(modules: list[nn.Module]) -> set[Tensor]:
    """The trainable weights that Muon moves: of linear and convolutional layers, kernels flattened, no side below
    `LEAST`."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    weights = {weight for layer in layers if (weight := layer.weight).requires_grad}
    return {weight for weight in weights if min(weight.flatten(1).shape) >= LEAST}


class Muon(torch.optim.AdamW):
    """AdamW, but in groups that say `matrices`: m <- momentum m + (1 - momentum) g, u = momentum m + (1 - momentum) g,
    w <- w - rate (0.2 sqrt(max(n, m)) orthogonal(u) + decay w); Nesterov's u, weights (n, ...) flattened to (n, m)."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], momentum: float,
                 fused: bool) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=fused)
        self.momentum = momentum
        self._step_supports_amp_scaling = False  # a scaler leaves out a step that overflows, as of AdamW's loop
        self.defaults["fused"] = False  # only AdamW's kernel can be held back on the device

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all that has a gradient."""
        whole = self.param_groups
        try:
            self.param_groups = [group for group in whole if not group["matrices"]]
            super().step(closure)
        finally:
            self.param_groups = whole
        for group in whole:
            if group["matrices"]:
                self._move(group)

    def _move(self, group: dict[str, Any]) -> None:
        """Those of one shape in stacks: a hundred small products of their own would wait for each other."""
        alike: dict[torch.Size, list[Tensor]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                alike.setdefault(weight.flatten(1).shape, []).append(weight)
        for weights in alike.values():
            count = max(1, PIECE.get(weights[0].device.type, LARGE_PIECE) // weights[0].numel())
            for start in range(0, len(weights), count):
                self._turn(weights[start : start + count], group)

    def _turn(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Move weights of one shape by what their momenta are made orthogonal to."""
        momenta = [self.state[w].setdefault("momentum", torch.zeros_like(w)) for w in weights]
        gradients = [w.grad.to(w.dtype) for w in weights]  # type: ignore[union-attr]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        ahead = torch.stack([gradient.flatten(1) for gradient in gradients])
        torch._foreach_lerp_(ahead.unbind(), [m.flatten(1) for m in momenta], self.momentum)
        updates = orthogonal(ahead).unbind()
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        size = -group["lr"] * RMS * max(ahead.shape[1:]) ** 0.5
        torch._foreach_add_(weights, [u.view_as(w) for u, w in zip(updates, weights, strict=True)], alpha=size)
