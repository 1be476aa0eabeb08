"""Low-rank adapters: what is learned of a weight is the product of two thin matrices. LoRA and DoRA."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.adapters.base import Adapter, AdapterConfig
from ldm.backbones.base import Backbone
from ldm.text import TextEncoder

Layer = nn.Linear | nn.Conv2d
ORIGINAL = "parametrizations.weight.original"  # torch's name for the weight of a parametrised layer
# The projections of the attentions of a U-Net (q, k, v, out), and of a DiT (qkv, out; q, kv, out).
ATTENTIONS = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.attention.qkv", "*.attention.out", "*.cross.*")


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(AdapterConfig):
    """What LoRA and DoRA share: B A of `rank`, times alpha / rank, or alpha / sqrt(rank) where `rank_stabilised`
    (Kalajdzievski 2023).

    `alpha` 0 is the rank. `ratio`: the learning rate of B as a multiple of A's (LoRA+, Hayou et al. 2024: 16).
    `targets` and `text`: patterns of names of Linear and Conv2d layers, of the backbone and of a text encoder that
    learns.
    """

    rank: int = 8
    alpha: float = 0.0
    rank_stabilised: bool = False
    ratio: float = 1.0
    targets: tuple[str, ...] = ATTENTIONS
    text: tuple[str, ...] = ()
    limits: ClassVar = {"rank": "(0, inf)", "alpha": "[0, inf)", "ratio": "(0, inf)"}

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return (self.alpha or self.rank) / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @abstractmethod
    def delta(self, weight: Tensor) -> Delta:
        """What is learned of one weight."""

    def build(self, backbone: Backbone, text: TextEncoder) -> LowRank:
        """See `AdapterConfig.build`. Raises ValueError for a pattern that no layer has, and for the text of a frozen
        encoder."""
        if self.text and not text.trainable:
            raise ValueError("adapter text must be empty: this text encoder is frozen, and its embeddings are stored, "
                             "or taken without gradients")
        layers = {f"backbone.{name}": layer for name, layer in _chosen(backbone, self.targets, "targets")}
        layers |= {f"text.{name}": layer for name, layer in _chosen(text, self.text, "text")}
        if not layers:
            raise ValueError("adapter targets: the backbone has no layer of such a name")
        return LowRank({name: self.delta(_weight(layer)) for name, layer in layers.items()})


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRankConfig):
    """W + scale B A (Hu et al. 2022, arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"

    def delta(self, weight: Tensor) -> Delta:
        return Delta(weight, self.rank, self.scale, self.ratio)


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRankConfig):
    """m V / ||V|| with V = W + scale B A, the norm of each output row (Liu et al. 2024, arXiv 2402.09353)."""

    kind: Literal["dora"] = "dora"

    def delta(self, weight: Tensor) -> Delta:
        return MagnitudeDelta(weight, self.rank, self.scale, self.ratio)


class Delta(nn.Module):
    """What is added to one weight W (out, in) or (out, in, k, k): scale B A, exactly 0 at the start.

    A (r, in) or (r, in, k, k), uniform in ±1/sqrt(in k k); B (out, r) or (out, r, 1, 1), zero.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, ratio: float = 1.0) -> None:
        super().__init__()
        self.scale, self.rates = scale, {"B": ratio}
        dtype = torch.promote_types(weight.dtype, torch.float32)
        ones = [1] * (weight.ndim - 2)
        self.A = nn.Parameter(torch.empty(rank, *weight.shape[1:], dtype=dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(len(weight), rank, *ones, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def fits(self, weight: Tensor) -> bool:
        """Whether this is of a weight of that shape."""
        return (len(self.B), *self.A.shape[1:]) == weight.shape

    def forward(self, weight: Tensor) -> Tensor:
        """W, as float32 at least -> what is to be added to it."""
        return self.scale * (self.B.flatten(1) @ self.A.flatten(1)).view_as(weight)


class MagnitudeDelta(Delta):
    """m V / ||V|| - W with V = W + scale B A; m (out,) begins as ||W||. Its gradient is that of the whole formula: the
    norm is not held constant."""

    def __init__(self, weight: Tensor, rank: int, scale: float, ratio: float = 1.0) -> None:
        super().__init__(weight, rank, scale, ratio)
        self.m = nn.Parameter(_norms(weight.detach().to(self.A.dtype)))

    def forward(self, weight: Tensor) -> Tensor:
        """See `Delta.forward`."""
        v = weight + super().forward(weight)
        # a row of zeros has no direction: it stays zero
        stretch = self.m / _norms(v).clamp(min=torch.finfo(v.dtype).tiny)
        return stretch.view(-1, *[1] * (v.ndim - 1)) * v - weight


class LowRank(Adapter):
    """Deltas of the weights of a base, each beneath the name of its layer: "backbone.mid_block....to_q.A"."""

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        super().__init__()
        for name, delta in deltas.items():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(last, delta)

    def deltas(self) -> Iterator[tuple[str, Delta]]:
        """Each with the name of its layer."""
        return ((name, part) for name, part in self.named_modules() if isinstance(part, Delta))

    def attach(self, backbone: Backbone, text: TextEncoder) -> tuple[Backbone, TextEncoder]:
        """See `Adapter.attach`: the same modules, their weights the sums. Raises ValueError for a base of other layers,
        and where this adapter is at work already."""
        base, found = nn.ModuleDict({"backbone": backbone, "text": text}), list[tuple[Layer, Delta]]()
        for name, delta in self.deltas():
            try:
                layer = base.get_submodule(name)
            except AttributeError:
                layer = base
            if not isinstance(layer, Layer) or not delta.fits(_weight(layer)):
                raise ValueError(f"the adapter is of another base: this one has no layer {name} of its shape")
            found.append((layer, delta))
        for layer, delta in found:  # all of them or none
            _sum(layer).add(self, delta)
        return backbone, text


class Sum(nn.Module):
    """The parametrisation of a weight: W + sum of strength · delta(W) over the adapters at work, W being the base's.

    It holds the adapters without owning them: their parameters are found in them alone.
    """

    kept: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[tuple[Adapter, Delta]] = []
        self.register_buffer("kept", None, persistent=False)  # the weight of the base while the sum stands in its place

    def add(self, adapter: Adapter, delta: Delta) -> None:
        """One more. Raises ValueError for one that is there, and while the sum is merged."""
        if any(delta is other for _, other in self.terms):
            raise ValueError("the adapter is attached already")
        if self.kept is not None:
            raise ValueError("adapters are merged into this base: unmerge them before another is attached")
        self.terms.append((adapter, delta))

    def forward(self, weight: Tensor) -> Tensor:
        """Computed in float32 at least, whatever the dtype of the weight; an adapter of strength 0 adds nothing."""
        terms = [(adapter.strength, delta) for adapter, delta in self.terms if adapter.strength]
        if not terms or self.kept is not None:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            base = total = weight.to(torch.promote_types(weight.dtype, torch.float32))
            for strength, delta in terms:
                total = total + strength * delta(base)
            return total.to(weight.dtype)


def merge(*modules: nn.Module) -> None:
    """Replace each weight that adapters work on by its sum, so that it is computed once. A strength that is set
    afterwards has no effect. Raises ValueError where that is done already."""
    parts = [part for module in modules for part in _parametrised(module)]
    if any(part.kept is not None for part, _ in parts):
        raise ValueError("the adapters are merged already")
    with torch.no_grad():
        for part, weight in parts:
            total = part(weight).detach()
            part.kept, weight.data = weight.data, total


def unmerge(*modules: nn.Module) -> None:
    """Put back the weights that `merge` kept, bit for bit."""
    for part, weight in (found for module in modules for found in _parametrised(module)):
        if part.kept is not None:
            weight.data, part.kept = part.kept, None


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a base by the names it had before adapters were attached."""
    return {name.replace(ORIGINAL, "weight"): value for name, value in module.state_dict().items()}


def _chosen(module: nn.Module, patterns: tuple[str, ...], key: str) -> list[tuple[str, Layer]]:
    """The layers whose names fit a pattern. Raises ValueError for a pattern of the user's that none fits."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}
    for pattern in set(patterns) - set(ATTENTIONS):
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"adapter {key}: no Linear or Conv2d layer has a name like {pattern!r}, as "
                             f"{next(iter(layers), 'none')!r} would be")
    return [(name, layer) for name, layer in layers.items() if any(fnmatchcase(name, p) for p in patterns)]


def _weight(layer: Layer) -> Tensor:
    """The weight of the base, whatever is attached."""
    return next(weight for _, weight in _parametrised(layer)) if parametrize.is_parametrized(layer) else layer.weight


def _sum(layer: Layer) -> Sum:
    """The parametrisation of a layer's weight, made where there is none yet."""
    if not parametrize.is_parametrized(layer):
        parametrize.register_parametrization(layer, "weight", Sum())
    return next(part for part, _ in _parametrised(layer))


def _parametrised(module: nn.Module) -> Iterator[tuple[Sum, Tensor]]:
    """Each sum inside, with the weight of the base that it begins from."""
    for part in module.modules():
        if isinstance(part, parametrize.ParametrizationList) and isinstance(part[0], Sum):
            yield part[0], part.get_parameter("original")


def _norms(weight: Tensor) -> Tensor:
    """The norm of each output row."""
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms


ADAPTERS = (LoRA, DoRA)
