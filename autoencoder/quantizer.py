"""Codebooks: nearest learned codes with a straight-through gradient, their moving averages, usage and revival."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.precision import double

Reduce = Callable[[Tensor], Tensor]
SCORES_AT_ONCE = 1 << 24  # elements of the (positions, codes) matrix held at a time: 64 MiB in float32
FORGOTTEN = 1e-5  # average count below which a code stays where it is


def identity(values: Tensor) -> Tensor:
    """The `reduce` or `gather` of a single process."""
    return values


class Codebook(nn.Module, ABC):
    """A finite set of codes that the latents of a quantising autoencoder are replaced by.

    z (B, C, h, w) below is what `prepare` returned: continuous, the space that stage two models.
    """

    codes: int

    @abstractmethod
    def prepare(self, z: Tensor) -> Tensor:
        """The encoder's output -> z, of the same shape."""

    @abstractmethod
    def indices(self, z: Tensor) -> Tensor:
        """The code of each position: (B, C, h, w) -> (B, h, w) int64, without gradient."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> codes (B, C, h, w)."""

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """z -> its codes, straight-through: z gets the gradient unchanged, the codes none."""

    @abstractmethod
    def terms(self, z: Tensor, reduce: Reduce) -> Tensor:
        """What keeps z at the codes and the codes in use, per image (B,); `reduce` averages over processes."""


class Quantizer(Codebook):
    """Replace the vector at each position of z (B, C, h, w) by the nearest of `codes` learned vectors.

    van den Oord et al. 2017. normalize: z and codes are scaled to length 1, so that the nearest is the most aligned
    (Yu et al. 2022, ViT-VQGAN). decay: 0, codes follow gradients; else the averages of the vectors that chose them
    (appendix A.1). revive: steps after which a code that nothing chose is given a vector of z; 0 never.
    """

    window: Tensor
    counts: Tensor
    sums: Tensor
    found: tuple[tuple[object, ...], Tensor, Tensor] | None = None  # what the last search was of, its z, its outcome

    def __init__(
        self, codes: int, dim: int, *, beta: float, normalize: bool, decay: float = 0.0, revive: int = 0
    ) -> None:
        super().__init__()
        self.codes, self.beta, self.normalize, self.decay, self.revive = codes, beta, normalize, decay, revive
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)
        if decay:
            self.embedding.requires_grad_(False)
            self.register_buffer("counts", torch.ones(codes))
            self.register_buffer("sums", self.embedding.weight.clone())
        if revive:
            self.register_buffer("window", torch.zeros(codes))

    @property
    def followers(self) -> tuple[str, ...]:
        """The parameters that no gradient moves and that a run's averaged weights must hold all the same: codes that
        follow the encoder of the moment do not fit an averaged one.
        """
        return ("embedding.weight",) if self.decay else ()

    @property
    def adapts(self) -> bool:
        """Whether `adapt_` has anything to do."""
        return bool(self.decay or self.revive)

    def prepare(self, z: Tensor) -> Tensor:
        """z as it is compared with the codes: of length 1 over the channels if `normalize`."""
        return F.normalize(z, dim=1) if self.normalize else z

    def codebook(self) -> Tensor:
        """The codes as they are used: (codes, C), of length 1 if `normalize`."""
        return F.normalize(self.embedding.weight, dim=1) if self.normalize else self.embedding.weight

    def indices(self, z: Tensor) -> Tensor:
        """argmin_k ‖z − e_k‖² = argmin_k (½‖e_k‖² − z·e_k) per position: (B, C, h, w) -> (B, h, w) int64.

        A step asks three times for the codes of one z: for the picture, for the terms and for the averages. The last
        answer is kept for as long as neither z nor the codes have been written to.
        """
        weight = self.embedding.weight
        unknown = z.is_meta or z.is_inference() or torch.compiler.is_exporting()  # what is traced has no memory
        # The storage of z is held, so that its address stays its own.
        asked = () if unknown else (_identity(z), _identity(weight))
        if self.found and asked and self.found[0] == asked:
            return self.found[2]
        nearest = self._search(z)
        self.found = (asked, z.detach(), nearest) if asked else None
        return nearest

    def __getstate__(self) -> dict[str, object]:
        """Without the last answer, which belongs to this process's memory."""
        return {**vars(self), "found": None}

    def _search(self, z: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            codes = self.codebook().float()
            half = 0.5 * codes.square().sum(1)
            vectors = _vectors(self.prepare(z).float())
            # A graph has as many parts as it was traced with, whatever the number of pictures.
            most = max(1, SCORES_AT_ONCE // len(codes))
            chunks = [vectors] if torch.compiler.is_exporting() else torch.split(vectors, most)
            found = [torch.addmm(half, chunk, codes.T, alpha=-1).argmin(1) for chunk in chunks]
            return torch.cat(found).reshape(z.shape[0], *z.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> codes (B, C, h, w), differentiable in the codebook."""
        return F.embedding(indices, self.codebook()).movedim(-1, 1)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> its codes, of the same shape; the gradient passes straight through to z."""
        nearest, z = self.indices(z), self.prepare(z)
        return z + (self.lookup(nearest) - z).detach()

    def terms(self, z: Tensor, reduce: Reduce = identity) -> Tensor:
        """mean (sg[z] − e)² + β·mean (z − sg[e])² per image (B,), means over (C, h, w); the first only with gradients.

        van den Oord et al. 2017, eq. 3. β belongs to the commitment term, the one that moves the encoder.
        """
        nearest, z = self.indices(z), self.prepare(z)
        codes = self.lookup(nearest)
        commitment = self.beta * (z - codes.detach()).square().flatten(1).mean(1)
        return commitment if self.decay else (codes - z.detach()).square().flatten(1).mean(1) + commitment

    @torch.no_grad()
    def adapt_(
        self,
        step: int,
        z: Tensor,
        slots: Tensor,
        uniform: Tensor,
        total: Reduce = identity,
        gather: Reduce = identity,
        nearest: Tensor | None = None,
    ) -> None:
        """What the codebook learns outside gradients, once a step. `nearest` (B, h, w): the codes of z where known.

        z (B, C, h, w) and slots (B,), their places in the global batch, are this process's share of the step. uniform
        (codes,) in [0, 1) decides revivals. `total` sums over processes, `gather` joins them along the first axis:
        the outcome is the same on every process, for every split of the batch, and after a resume.
        """
        vectors = _vectors(self.prepare(z).float())
        chosen = (self.indices(z) if nearest is None else nearest).flatten()
        counts = total(torch.bincount(chosen, minlength=self.codes).float())
        if self.decay:
            self._follow(counts, total(torch.zeros_like(self.sums).index_add_(0, chosen, vectors)))
        if not self.revive:
            return
        self.window += counts
        if (step + 1) % self.revive == 0:
            self.revive_(self.window, _vectors(gather(self.prepare(z).float())[gather(slots).argsort()]), uniform)
            self.window.zero_()

    def _follow(self, counts: Tensor, sums: Tensor) -> None:
        """N ← γN + (1−γ)n, m ← γm + (1−γ)Σz, e = m / N; a code that nothing chose stays where it is."""
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        means = self.sums / self.counts.clamp_min(FORGOTTEN)[:, None]
        weight = self.embedding.weight
        weight.copy_(torch.where(self.counts[:, None] > FORGOTTEN, means.to(weight.dtype), weight))

    def revive_(self, counts: Tensor, vectors: Tensor, uniform: Tensor) -> Tensor:
        """Give codes that nothing chose (counts == 0) a vector of z, and return which they were: (codes,) bool.

        counts (codes,) over the window judged; vectors (N, C) of the encoder, the same in all processes; code k takes
        vector floor(uniform[k]·N), uniform (codes,) in [0, 1). The outcome depends on the arguments alone, so it is the
        same on every process and after a resume.
        """
        dead = counts == 0
        replacements = vectors[(uniform * len(vectors)).long().clamp(max=len(vectors) - 1)]
        with torch.no_grad():
            weight = self.embedding.weight
            weight.copy_(torch.where(dead[:, None], replacements.to(weight.dtype), weight))
            if self.decay:
                self.sums.copy_(torch.where(dead[:, None], replacements.to(self.sums.dtype), self.sums))
                self.counts.masked_fill_(dead, 1.0)
        return dead


def _identity(value: Tensor) -> tuple[object, ...]:
    """Equal for two views of one memory of the same shape that has not been written to in between."""
    return value.data_ptr(), value.shape, value.stride(), value.dtype, value._version


def _vectors(z: Tensor) -> Tensor:
    """(B, C, h, w) -> (B·h·w, C)."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def code_counts(indices: Tensor, codes: int, reduce: Reduce = identity) -> Tensor:
    """How often each code was chosen: (codes,) int64; `reduce` sums over processes."""
    return reduce(torch.bincount(indices.flatten(), minlength=codes))


def usage(counts: Tensor) -> Tensor:
    """Share of the codes chosen at least once, in [0, 1]."""
    return double(counts > 0).mean()


def perplexity(counts: Tensor) -> Tensor:
    """exp(−Σ p log p) of code frequencies: `codes` when equally used, 1 when one is used, 0 without counts."""
    counts = double(counts)
    p = counts / counts.sum().clamp_min(1)
    return torch.where(counts.sum() > 0, torch.special.entr(p).sum().exp(), 0.0)
