"""Quantisers without a learned codebook: finite scalar quantisation and lookup-free quantisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder.quantizer import Codebook, Reduce, identity

SMALLEST = 1e-30
MARGIN = 1e-3  # keeps the outermost levels reachable by a tanh that never reaches 1


class FiniteScalar(Codebook):
    """Each channel rounded to one of its `levels`: FSQ (Mentzer et al. 2023, appendix A.1).

    z = (tanh(y + s)·h − o) / ⌊L/2⌋ lies in [-1, 1], with h = (L − 1)(1 − 1e-3)/2, o = ½ for even L, else 0, and
    s = atanh(o/h), so that y = 0 is z = 0. Codes are the integers round(z·⌊L/2⌋), over ⌊L/2⌋.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        steps = torch.tensor(levels)
        self.codes = math.prod(levels)
        self.register_buffer("levels", steps.view(-1, 1, 1), persistent=False)
        basis = torch.cat([torch.ones(1, dtype=torch.long), steps[:-1]]).cumprod(0)
        self.register_buffer("basis", basis.view(-1, 1, 1), persistent=False)

    @property
    def middle(self) -> Tensor:
        """⌊L/2⌋ per channel: (C, 1, 1)."""
        return self.levels // 2

    def prepare(self, z: Tensor) -> Tensor:
        """Any z (B, C, h, w) -> inside the grid's reach, scaled so that a step is 1/⌊L/2⌋."""
        reach = (self.levels - 1) * (1 - MARGIN) / 2
        offset = (1 - self.levels % 2) / 2
        return ((z + (offset / reach).atanh()).tanh() * reach - offset) / self.middle

    def integers(self, z: Tensor) -> Tensor:
        """z -> its levels −⌊L/2⌋ ... ⌊(L−1)/2⌋, values beyond clamped to the ends."""
        return (z * self.middle).round().maximum(-self.middle).minimum((self.levels - 1) // 2)

    def indices(self, z: Tensor) -> Tensor:
        """Σ_c (level_c + ⌊L_c/2⌋)·Π_{b<c} L_b."""
        with torch.no_grad():
            return ((self.integers(z) + self.middle).long() * self.basis).sum(1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) int64 -> codes (B, C, h, w)."""
        return (indices.unsqueeze(1) // self.basis % self.levels - self.middle) / self.middle

    def forward(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> the nearest codes; the gradient passes straight through."""
        return z + (self.integers(z) / self.middle - z).detach()

    def terms(self, z: Tensor, reduce: Reduce = identity) -> Tensor:
        """0: the grid is fixed and bounded, and needs nothing."""
        return z.new_zeros(len(z))


class LookupFree(Codebook):
    """The signs of the channels: 2^C codes ±1 (Yu et al. 2023, MAGVIT-v2, section 3.1).

    beta weighs commitment, entropy the two entropy terms, temperature τ softens q(c | z) ∝ exp(−‖z − c‖²/τ).
    """

    weights: Tensor

    def __init__(self, bits: int, *, beta: float, entropy: float, temperature: float) -> None:
        super().__init__()
        self.codes, self.beta, self.entropy, self.temperature = 1 << bits, beta, entropy, temperature
        self.register_buffer("weights", (1 << torch.arange(bits)).view(-1, 1, 1), persistent=False)

    def prepare(self, z: Tensor) -> Tensor:
        """z as it is: a sign needs no bounds."""
        return z

    def indices(self, z: Tensor) -> Tensor:
        """Σ_c 2^c [z_c > 0]."""
        with torch.no_grad():
            return ((z > 0) * self.weights).sum(1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) int64 -> codes ±1 (B, C, h, w)."""
        return (indices.unsqueeze(1) // self.weights % 2 * 2 - 1).float()

    def forward(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> its signs ±1; the gradient passes straight through."""
        return z + (torch.where(z > 0, 1.0, -1.0) - z).detach()

    def terms(self, z: Tensor, reduce: Reduce = identity) -> Tensor:
        """β·mean (z − sg[sign z])² + entropy·(mean_positions H(q(c|z)) − H(mean q)), nats: sure here, all codes in use.

        The bits of q are independent, so its entropy is the sum of theirs. The mean of q is over the positions of this
        call on all processes: `reduce` averages a detached tensor, and the average of the processes' gradients is the
        gradient of the whole.
        """
        commitment = self.beta * (z - self.forward(z).detach()).square().flatten(1).mean(1)
        if not self.entropy:
            return commitment
        logits = 4 * z / self.temperature
        each = _bit_entropy(logits).sum(1).flatten(1).mean(1)
        mean = _joint_mean(logits.sigmoid().movedim(1, -1).reshape(-1, z.shape[1]))
        mean = mean + (reduce(mean.detach()) - mean.detach())
        spread = torch.special.entr(mean.clamp_min(SMALLEST)).sum()  # the slope of entr at 0 is infinite
        loss: Tensor = commitment + self.entropy * (each - spread)
        return loss


def _bit_entropy(logits: Tensor) -> Tensor:
    """H(Bernoulli(sigmoid(l))) = softplus(−|l|) + |l|·sigmoid(−|l|), which neither overflows nor takes log 0."""
    size = logits.abs()
    return F.softplus(-size) + size * (-size).sigmoid()


def _joint_mean(ones: Tensor) -> Tensor:
    """Mean over N of the joint distribution of independent bits: P(bit = 1) (N, C) -> (2^C,).

    The joints of the two halves of the bits are multiplied as matrices: N·2^(C/2) numbers in memory instead of N·2^C.
    """
    low, high = (_joint(part) for part in (ones[:, : ones.shape[1] // 2], ones[:, ones.shape[1] // 2 :]))
    return (high.T @ low).flatten() / len(ones)


def _joint(ones: Tensor) -> Tensor:
    """(N, C) -> the probabilities (N, 2^C) of all patterns, bit c counting 2^c."""
    joint = ones.new_ones(len(ones), 1)
    for p in ones.unbind(1):
        joint = torch.cat([joint * (1 - p)[:, None], joint * p[:, None]], 1)
    return joint
