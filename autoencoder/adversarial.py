"""The decoder's gradient in two parts, reconstruction and adversarial, balanced at the decoder's last layer.

A training step needs the two parts apart to balance them (Esser et al. 2021, eq. 7), yet one backward pass through the
network:

    split = split_gradients(x_hat, reconstruction_loss, adversarial_loss)  # at the images, not at the weights
    rec, adv = last_layer_gradients(x_hat, last_layer, split)  # average over processes before the norm
    weight = adaptive_weight(rec.norm(), adv.norm())
    (surrogate(x_hat, split.reconstruction + ramp * weight * split.adversarial) + latent_term).backward()

Both gradients are taken beside the pass that a loss scaler guards, and the slope of a mean over N values is of the size
of 1/N: from some millions on less than float16 holds. So they are multiplied by powers of two on the way in, and
divided by them on the way out: exact in float32, and under autocast in the middle of what float16 holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Gradients of two losses at x̂, both of the shape of x̂, and the losses themselves, detached."""

    reconstruction: Tensor
    adversarial: Tensor
    reconstruction_loss: Tensor
    adversarial_loss: Tensor


def _gradient(loss: Callable[[Tensor], Tensor], x_hat: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x_hat.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf)
    if value.ndim:
        raise ValueError(f"a loss to differentiate must be a scalar, got shape {tuple(value.shape)}.")
    # Slopes at a critic's logits are then some ten to a hundred, those at the images 1/16 and less.
    scale = 2.0 ** (math.floor(math.log2(leaf.numel())) - 4)
    return torch.autograd.grad(value * scale, leaf)[0] / scale, value.detach()


def split_gradients(
    x_hat: Tensor, reconstruction: Callable[[Tensor], Tensor], adversarial: Callable[[Tensor], Tensor] | None
) -> Split:
    """∂reconstruction/∂x̂ and ∂adversarial/∂x̂, each loss a function x̂ -> scalar; adversarial None gives zeros.

    The losses see a detached x̂: nothing is added to any parameter's gradient, the discriminator's included, the graph
    of each loss is freed before the next, and the graph of the autoencoder is not touched. ValueError for a loss that
    is not a scalar.
    """
    at_images, loss = _gradient(reconstruction, x_hat)
    if adversarial is None:
        return Split(at_images, torch.zeros_like(at_images), loss, torch.zeros_like(loss))
    at_logits, adversarial_loss = _gradient(adversarial, x_hat)
    return Split(at_images, at_logits, loss, adversarial_loss)


def last_layer_gradients(x_hat: Tensor, last_layer: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """Gradients of the two losses at the last layer's weight, through that layer alone; keeps the graph of x̂."""
    rec, adv = (_at_layer(x_hat, last_layer, slope) for slope in (split.reconstruction, split.adversarial))
    return rec, adv


def _at_layer(x_hat: Tensor, last_layer: Tensor, slope: Tensor) -> Tensor:
    # A weight's gradient is a sum over all N values, up to N times as large as they are. At a root mean square of
    # 2/sqrt(N) neither the slopes nor their sum leave what float16 holds, 2^-14 to 2^16.
    scale = power_of_two(2 / slope.float().norm())
    (gradient,) = torch.autograd.grad(x_hat, last_layer, slope * scale, retain_graph=True)
    return gradient / scale


def power_of_two(value: Tensor) -> Tensor:
    """The largest power of two that is at most `value`, elementwise; 1 where that is no positive finite number."""
    mantissa, _ = value.frexp()  # in [0.5, 1)
    return torch.where((value > 0) & value.isfinite(), value / (2 * mantissa), torch.ones_like(value))


def adaptive_weight(norm_rec: Tensor, norm_adv: Tensor, maximum: float = 1e4) -> Tensor:
    """min(norm_rec / norm_adv, maximum): makes the two gradient norms equal (Esser et al. 2021, eq. 7; LDM's maximum).

    No constant is added below the line: gradients of mean losses are as small as LDM's 1e-4 and the balance would be
    lost. Where the quotient is no finite number (no adversarial gradient, NaN) the weight is 0. Detached, float32.
    """
    ratio = norm_rec.detach().float() / norm_adv.detach().float()
    return torch.where(ratio.isfinite(), ratio.clamp(max=maximum), torch.zeros_like(ratio))


def surrogate(x_hat: Tensor, gradient: Tensor) -> Tensor:
    """Σ x̂·gradient: a scalar whose backward pass puts `gradient` at x̂, through whatever wraps the network."""
    return (x_hat * gradient.detach()).sum()
