"""Guidance by several conditions at once, each with its own weight: uncond + sum_i w_i (cond_i - uncond).

With the null's weight 1 - sum_i w_i it is one weighted sum of denoised pairs, whose weights sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Bound, Conditional, Denoise
from ldm.diffusion import Denoised
from ldm.guidance import ClassifierFree
from ldm.guiding import Guidance, together


def composed(denoiser: Conditional, conds: Sequence[tuple[Cond, float]], null: Cond) -> Denoise:
    """uncond + sum_i w_i (cond_i - uncond): one call of as many times the batch as there are conditions, and null.

    A negative weight moves away from its condition; one of weight 0 is not called, nor is `null` (batch 1 or B) where
    the weights sum to 1. Liu et al. 2022 (arXiv 2206.01714), eq. 11. Raises ValueError without conditions, and where
    they are of different batches.
    """
    used = [(cond, weight) for cond, weight in conds if weight != 0]
    if len(sizes := {len(cond.mask) for cond, _ in conds}) != 1:
        raise ValueError(f"composed guidance needs conditions of one batch size, got {sorted(sizes)}")
    rest = 1 - sum(weight for _, weight in used)
    if abs(rest) > 1e-12:
        used.append((conds[0][0].absence(null), rest))
    if len(used) == 1:
        return denoiser.bind(used[0][0])
    answers, weights = together(denoiser, [cond for cond, _ in used]), [weight for _, weight in used]

    def call(x: Tensor, t: Tensor) -> Denoised:
        each = answers(x, t)
        x0 = torch.stack([weight * ends.x0 for weight, ends in zip(weights, each, strict=True)]).sum(0)
        eps = torch.stack([weight * ends.eps for weight, ends in zip(weights, each, strict=True)]).sum(0)
        return each[0]._replace(x0=x0, eps=eps)

    return Bound(denoiser.schedule, call)


def two_scale(denoiser: Conditional, cond: Cond, without_text: Cond, without_both: Cond, text_scale: float = 7.5,
              image_scale: float = 1.5) -> Denoise:
    """Guidance by a picture and a text: e_none + s_I (e_I - e_none) + s_T (e_IT - e_I), in one call.

    Of weights s_T, s_I - s_T and 1 - s_I: both scales at 1 are the condition alone, both the same is guidance against
    none. The three conditions are of one batch. Brooks et al. 2023 (arXiv 2211.09800), eq. 3.
    """
    weights = (text_scale, image_scale - text_scale, 1 - image_scale)
    return composed(denoiser, list(zip((cond, without_text, without_both), weights, strict=True)), without_both)


def beside(guidance: Guidance, denoiser: Conditional, cond: Cond, also: Sequence[tuple[Cond, float]],
           null: Cond) -> Denoise:
    """Classifier-free guidance by further conditions too: uncond + scale (cond - uncond) + sum_i w_i (also_i - uncond).

    Raises ValueError for other guidances, and where it has an interval or rescales: both are defined for one condition.
    """
    if not isinstance(guidance, ClassifierFree) or guidance.rescale or guidance.interval != (0.0, 1.0):
        raise ValueError("several conditions need classifier-free guidance, over the whole interval and not rescaled")
    return composed(denoiser, [(cond, guidance.scale), *also], null)
