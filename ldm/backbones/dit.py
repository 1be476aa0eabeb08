"""Diffusion transformer: DiT with adaLN-zero or PixArt's shared adaLN-single, text by cross-attention or in context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.recompute import run
from ldm.backbones.attention import ACTIVATIONS, CrossAttention, FeedForward, SelfAttention, blank, key_mask, zero
from ldm.backbones.base import Backbone, BackboneConfig, need_pooled
from ldm.backbones.embed import Projection, patches, rope_table, sincos_table, sinusoid
from ldm.backbones.image import ImageInputs, with_level, with_numbers, with_size
from ldm.backbones.modulation import MODULATIONS, OwnModulation, modulate
from ldm.backbones.routing import ROUTE, at, kept, put_back
from ldm.conditioning import NOTHING, Cond, Share

LEVEL_FEATURES = 256


@dataclass(frozen=True, kw_only=True)
class DiT(BackboneConfig):
    """Config of a diffusion transformer.

    `base_size`: the latent size whose position grid is not scaled; give the training size. `pooled` adds the text
    encoder's pooled vector to the time embedding: through a learned projection, or as it comes with
    `pooled_projection = False` (the published class embedding; pooled_dim must equal width). `cross_norm = False`:
    cross-attention reads un-normalised tokens, as PixArt's does. `mlp = "gelu-tanh"` is what was published; exact GELU
    is five times faster on a CPU. SwiGLU keeps the parameter count with 2/3 of the hidden width. `frequency_shift`: the
    frequencies of the noise level are 10000^(-i / (half - shift)); diffusers' class-conditional DiT has 1.
    `value_residual`: see `SelfAttention`. `route`: the share of a picture's tokens that pass by the blocks from
    `route_from` to `depth - route_until` while it is trained (TREAD, Krause et al. 2025, arXiv 2501.04765).
    `base_width`: the width at which a learning rate was found, to be used at this one (muP, `share_rates`).
    """

    small: ClassVar[Mapping[str, Any]] = {"width": 32, "depth": 2, "heads": 2, "base_size": 8}
    kind: Literal["dit"] = "dit"
    width: int = 384
    base_width: int = 0
    depth: int = 12
    heads: int = 6
    patch: int = 2
    mlp_ratio: float = 4.0
    mlp: Literal["gelu", "gelu-tanh", "swiglu"] = "gelu"
    conditioning: Literal["adaln-zero", "adaln-single"] = "adaln-zero"
    text: Literal["cross", "in-context", "none"] = "cross"
    cross_norm: bool = True
    pooled: bool = True
    pooled_projection: bool = True
    qk_norm: bool = False
    value_residual: bool = False
    route: float = 0.0
    route_from: int = 1
    route_until: int = 1
    norm: Literal["layer", "rms"] = "layer"
    position: Literal["sincos", "rope"] = "sincos"
    base_size: int = 32
    frequency_shift: float = 0.0
    learned_variance: bool = False
    gradient_checkpointing: bool = False

    limits: ClassVar = {**dict.fromkeys(("width", "depth", "heads", "patch", "mlp_ratio", "base_size"), "(0, inf)"),
                        "route": "[0, 1)", "route_from": "[0, inf)", "route_until": "[1, inf)",
                        "base_width": "[0, inf)", "frequency_shift": f"[0, {LEVEL_FEATURES // 2})"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be divisible by heads ({self.heads})")
        divided, dim = ("width", self.width) if self.position == "sincos" else ("width/heads", self.width // self.heads)
        if dim % 4:
            raise ValueError(f"{divided} ({dim}) must be divisible by 4 for two-dimensional {self.position} positions")
        if self.base_width and (self.base_width * self.heads % self.width or not self.pooled_projection):
            raise ValueError(f"base_width ({self.base_width}) must hold whole heads of {self.width // self.heads} "
                             "channels, and pooled_projection be true")
        if self.route and not self.inner:
            raise ValueError(f"route: no block lies between the first {self.route_from} and the last "
                             f"{self.route_until} of {self.depth}; make them fewer, or the depth larger")

    @property
    def inner(self) -> range:
        """The blocks that routed tokens pass by."""
        return range(self.route_from, self.depth - self.route_until)

    @property
    def narrow(self) -> DiT | None:
        """Itself with `base_width`, where it is not of that width."""
        heads = self.base_width * self.heads // self.width
        return replace(self, width=self.base_width, base_width=0, heads=heads) if self.base_width else None

    def build(self, *, channels: int, context_dim: int, pooled_dim: int | None = None,
              **image: Unpack[ImageInputs]) -> DiffusionTransformer:
        given = channels, context_dim, need_pooled(self.pooled, pooled_dim)
        return DiffusionTransformer(self, *given).shown(**image)


class Block(nn.Module):
    """x + g₁·attention(mod₁(norm x)), + cross-attention, + g₂·mlp(mod₂(norm x)); the identity at initialisation."""

    def __init__(self, config: DiT, *, residual: bool = False) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.modulation = MODULATIONS[config.conditioning](width, 6)
        self.norm = _norm(config)
        self.attention = SelfAttention(width, config.heads, qk_norm=config.qk_norm, value_residual=residual)
        self.cross = CrossAttention(width, config.heads, qk_norm=config.qk_norm) if config.text == "cross" else None
        self.cross_norm = _norm(config) if config.cross_norm else nn.Identity()
        if config.mlp == "swiglu":  # three matrices instead of two; the multiple of 8 keeps matrix kernels aligned
            hidden = -(-hidden * 2 // 3 // 8) * 8
        self.mlp = FeedForward(width, hidden, config.mlp)

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor | None, mask: Tensor | None,
                rope: tuple[Tensor, Tensor] | None, share: Share = NOTHING, first: Tensor | None = None) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(modulation).chunk(6, dim=1)
        own_mask = mask if context is None else None
        attended = self.attention(modulate(self.norm(x), shift, scale), own_mask, rope, share.own, first)
        x = torch.addcmul(x, gate, attended)
        if self.cross is not None and context is not None:
            x = x + self.cross(self.cross_norm(x), context, mask, share.cross)
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(self.norm(x), mlp_shift, mlp_scale)))

    def values(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The values (B, heads, N, d) of its self-attention."""
        shift, scale = self.modulation(modulation)[:, :2].chunk(2, dim=1)
        values: Tensor = self.attention.values(modulate(self.norm(x), shift, scale))
        return values


def _norm(config: DiT) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.width, eps=1e-6, elementwise_affine=False)


# In context, attention over the picture is attention over the text too: neither can be shared alone.
SHARES = {"cross": frozenset({"own", "cross"}), "in-context": frozenset[str](), "none": frozenset({"own"})}


class Given(NamedTuple):
    """What all blocks read: `Block`'s modulation, context, mask and rope; `Cond.share`. What comes after them reads
    `of_end`, and leaves out the `prefix` of caption tokens."""

    of_blocks: Tensor
    of_end: Tensor
    context: Tensor | None
    mask: Tensor | None
    rope: tuple[Tensor, Tensor] | None
    prefix: int
    share: Share
    first: Tensor | None = None

    def among(self, kept: Tensor) -> Given:
        """For the tokens at `kept` (B, K) alone."""
        mask = self.mask if self.mask is None or self.context is not None else at(self.mask, kept[:, None, None], dim=3)
        rope = self.rope and (self.rope[0][kept][:, None], self.rope[1][kept][:, None])
        first = None if self.first is None else at(self.first, kept[:, None, :, None], dim=2)
        return self._replace(mask=mask, rope=rope, first=first)


class DiffusionTransformer(Backbone):
    """DiT (Peebles & Xie 2023) and PixArt-alpha (Chen et al. 2023): a transformer over patches of the latents.

    Output exactly 0 and every block the identity at initialisation. Any latent size divisible by the patch.
    """

    input_layer = "patch_embedding"

    def __init__(self, config: DiT, channels: int, context_dim: int, pooled_dim: int) -> None:
        out_channels = channels * (2 if config.learned_variance else 1)
        super().__init__(channels=channels, out_channels=out_channels, multiple=config.patch)
        self.config, width, self.shares = config, config.width, SHARES[config.text]
        self.patch_embedding = nn.Linear(channels * config.patch**2, width)
        self.time_embedding = Projection(LEVEL_FEATURES, width)
        self.pooled_projection = _pooled_projection(config, pooled_dim)
        activation, _ = ACTIVATIONS["gelu-tanh" if config.mlp == "gelu-tanh" else "gelu"]
        self.caption_projection = Projection(context_dim, width, activation) if config.text != "none" else None
        self.shared = OwnModulation(width, 6) if config.conditioning == "adaln-single" else None
        self.blocks = nn.ModuleList(
            Block(config, residual=config.value_residual and place > 0) for place in range(config.depth))
        self.norm = _norm(config)
        self.modulation = MODULATIONS[config.conditioning](width, 2)
        self.out = nn.Linear(width, out_channels * config.patch**2)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.time_embedding.linear_1, self.time_embedding.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, OwnModulation):
                zero(module)
            if isinstance(module, CrossAttention | DiffusionTransformer):
                zero(module.out)

    def units(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def predict(self, x: Tensor, noise_level: Tensor, cond: Cond, outputs: Sequence[Tensor] = ()) -> Tensor:
        """See `Backbone.predict`. Residuals: of `outputs` (B, N, D) for what the first blocks give."""
        return self.tapped(x, noise_level, cond, 1.0, outputs)[0]

    def tap_width(self, share: float) -> int:
        """See `Backbone.tap_width`."""
        last = self.blocks_until(share) - 1
        if self.config.route and last in self.config.inner:
            first = self.config.route_from / self.config.depth
            raise ValueError(f"representation.depth {share:g} is after block {last + 1}, which routed tokens pass by: "
                             f"take {first:g} or less, or set backbone.route to 0")
        return self.config.width

    def blocks_until(self, share: float) -> int:
        """The blocks in this share of the depth, at least one."""
        return max(1, round(share * self.config.depth))

    def tapped(self, x: Tensor, noise_level: Tensor, cond: Cond, share: float,
               outputs: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """See `Backbone.tapped`."""
        tokens, given = self.begin(x, noise_level, cond)
        passing, told, inner, scores = tokens, given, self.config.inner, cond.extras.get(ROUTE)
        feature, until = tokens, self.blocks_until(share)
        going = None if scores is None else kept(scores, self.config.route, given.prefix)
        for i, block in enumerate(self.blocks):
            if going is not None and i == inner.start:
                passing, tokens, told = tokens, at(tokens, going[..., None], dim=1), given.among(going)
            if going is not None and i == inner.stop:
                tokens, told = put_back(tokens, going, passing), given
            tokens = self.step(block, i, tokens, told)
            tokens = tokens + outputs[i] if i < len(outputs) else tokens
            feature = tokens if i < until else feature
        shift, scale = self.modulation(given.of_end).chunk(2, dim=1)
        tokens = modulate(self.norm(tokens[:, given.prefix :]), shift, scale)
        patches, patch = self.out(tokens).unflatten(2, (-1, self.out_channels)), self.config.patch
        sides = [side // patch for side in x.shape[2:]]
        y = F.pixel_shuffle(patches.permute(0, 3, 2, 1).flatten(1, 2).unflatten(2, sides), patch)
        return y, feature[:, given.prefix :]

    def begin(self, x: Tensor, noise_level: Tensor, cond: Cond) -> tuple[Tensor, Given]:
        """The tokens (B, N, D) that the first block reads, and what all blocks read beside them."""
        embedding = self.time_embedding(sinusoid(noise_level, LEVEL_FEATURES, shift=self.config.frequency_shift))
        embedding = with_level(embedding, self.level_embedding, cond)
        embedding = with_size(with_numbers(embedding, self.number_embeddings, cond), self.size_embedding, cond, x)
        if self.pooled_projection is not None and cond.pooled is not None:
            embedding = embedding + self.pooled_projection(cond.pooled)
        active = F.silu(embedding)
        of_blocks, of_end = (active, active) if self.shared is None else (self.shared(active), embedding[:, None])
        rows, columns = (side // self.config.patch for side in x.shape[2:])
        tokens, rope = self._place(self.patch_embedding(patches(x, self.config.patch)), rows, columns)
        tokens, given = self._tell(tokens, Given(of_blocks, of_end, None, None, rope, 0, cond.share), cond)
        if self.config.value_residual:
            first = self.blocks[0]
            assert isinstance(first, Block)
            given = given._replace(first=first.values(tokens, of_blocks))
        return tokens, given

    def step(self, block: nn.Module, i: int, tokens: Tensor, given: Given) -> Tensor:
        """A block in the place i of all."""
        share = given.share.at(i / len(self.blocks))
        return run(block, self.config.gradient_checkpointing, tokens, given.of_blocks, given.context, given.mask,
                   given.rope, share, given.first)

    def _place(self, tokens: Tensor, rows: int, columns: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        base = self.config.base_size / self.config.patch
        if self.config.position == "rope":
            return tokens, rope_table(self.config.width // self.config.heads, rows, columns, base, tokens.device)
        return tokens + sincos_table(self.config.width, rows, columns, base, tokens.device).to(tokens.dtype), None

    def _tell(self, tokens: Tensor, given: Given, cond: Cond) -> tuple[Tensor, Given]:
        """With the caption, beside the image tokens (cross) or in front of them (in context)."""
        if self.caption_projection is None:
            return tokens, given
        captions = blank(self.caption_projection(blank(cond.context, cond.mask)), cond.mask)
        if self.config.text == "cross":
            return tokens, given._replace(context=captions, mask=key_mask(cond.mask))
        prefix, count, rope = captions.shape[1], tokens.shape[1], given.rope
        tokens = torch.cat([captions.to(tokens.dtype), tokens], dim=1)
        mask = None if cond.mask is None else F.pad(cond.mask, (0, count), value=True)[:, None, None]
        if rope is not None:  # caption tokens carry their encoder's positions and are not turned
            rope = F.pad(rope[0], (0, 0, prefix, 0), value=1.0), F.pad(rope[1], (0, 0, prefix, 0))
        return tokens, given._replace(mask=mask, rope=rope, prefix=prefix)


def _pooled_projection(config: DiT, pooled_dim: int) -> nn.Module | None:
    if not config.pooled:
        return None
    if config.pooled_projection:
        return nn.Linear(pooled_dim, config.width)
    if pooled_dim != config.width:
        raise ValueError(f"pooled_projection = false adds pooled text as it comes, so its width ({pooled_dim}) must be "
                         f"the backbone's ({config.width})")
    return nn.Identity()


BACKBONES = (DiT,)
