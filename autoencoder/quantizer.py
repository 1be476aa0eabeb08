"""Vector quantisation: nearest codes, straight-through gradient, code usage, and revival of dead codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCORES_AT_ONCE = 1 << 24  # elements of the (positions, codes) matrix held at a time: 64 MiB in float32


class Quantizer(nn.Module):
    """Replace the vector at each position of z (B, C, h, w) by the nearest of `codes` learned vectors.

    van den Oord et al. 2017. normalize: z and codes are scaled to length 1, so that the nearest is the most aligned
    (Yu et al. 2022, ViT-VQGAN).
    """

    def __init__(self, codes: int, dim: int, *, beta: float, normalize: bool) -> None:
        super().__init__()
        self.beta, self.normalize = beta, normalize
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def prepare(self, z: Tensor) -> Tensor:
        """z as it is compared with the codes: of length 1 over the channels if `normalize`."""
        return F.normalize(z, dim=1) if self.normalize else z

    def codebook(self) -> Tensor:
        """The codes as they are used: (codes, C), of length 1 if `normalize`."""
        return F.normalize(self.embedding.weight, dim=1) if self.normalize else self.embedding.weight

    def indices(self, z: Tensor) -> Tensor:
        """argmin_k ‖z − e_k‖² = argmin_k (½‖e_k‖² − z·e_k) per position: (B, C, h, w) -> (B, h, w) int64."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            codes = self.codebook().float()
            half = 0.5 * codes.square().sum(1)
            vectors = self.prepare(z).float().movedim(1, -1).reshape(-1, codes.shape[1])
            chunks = torch.split(vectors, max(1, SCORES_AT_ONCE // len(codes)))
            found = [torch.addmm(half, chunk, codes.T, alpha=-1).argmin(1) for chunk in chunks]
            return torch.cat(found).reshape(z.shape[0], *z.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> codes (B, C, h, w), differentiable in the codebook."""
        return F.embedding(indices, self.codebook()).movedim(-1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """z -> its codes (B, C, h, w); straight-through: z gets the gradient unchanged, the codebook none."""
        z = self.prepare(z)
        return z + (self.lookup(self.indices(z)) - z).detach()

    def terms(self, z: Tensor) -> Tensor:
        """mean (sg[z] − e)² + β·mean (z − sg[e])² per image (B,), means over (C, h, w).

        van den Oord et al. 2017, eq. 3. β belongs to the commitment term, the one that moves the encoder.
        """
        z = self.prepare(z)
        codes = self.lookup(self.indices(z))
        codebook = (codes - z.detach()).square().flatten(1).mean(1)
        return codebook + self.beta * (z - codes.detach()).square().flatten(1).mean(1)

    def revive_(self, counts: Tensor, vectors: Tensor, uniform: Tensor) -> Tensor:
        """Give codes that nothing chose (counts == 0) a vector of z, and return which they were: (codes,) bool.

        counts (codes,) over the window judged; vectors (N, C) of the encoder, the same in all processes; code k takes
        vector floor(uniform[k]·N), uniform (codes,) in [0, 1). The outcome depends on the arguments alone, so it is the
        same on every process and after a resume.
        """
        dead = counts == 0
        chosen = (uniform * len(vectors)).long().clamp(max=len(vectors) - 1)
        with torch.no_grad():
            weight = self.embedding.weight
            weight.copy_(torch.where(dead[:, None], vectors[chosen].to(weight.dtype), weight))
        return dead


def code_counts(indices: Tensor, codes: int, reduce: Callable[[Tensor], Tensor] = lambda counts: counts) -> Tensor:
    """How often each code was chosen: (codes,) int64; `reduce` sums over processes."""
    return reduce(torch.bincount(indices.flatten(), minlength=codes))


def usage(counts: Tensor) -> Tensor:
    """Share of the codes chosen at least once, in [0, 1]."""
    return (counts > 0).double().mean()


def perplexity(counts: Tensor) -> Tensor:
    """exp(−Σ p log p) of code frequencies: `codes` when equally used, 1 when one is used, 0 without counts."""
    p = counts.double() / counts.sum().clamp_min(1)
    return torch.where(counts.sum() > 0, torch.special.entr(p).sum().exp(), 0.0)
