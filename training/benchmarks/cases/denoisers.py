"""A training step of our DiT and U-Net beside diffusers' of the same weights: forward, backward, AdamW, average.

Theirs as their training scripts have it: torch's AdamW as it comes, and diffusers' EMAModel. Neither draws noise,
drops captions or clips: a batch, its noise levels and its targets are at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ldm.backbones import DiT, UNet
from ldm.conditioning import Cond
from training.benchmarks.case import NOT_YET, OF_PRODUCT, SAME_SPEED, STOCK_SPEED, Case, Contest, Place, peers
from training.benchmarks.meters import flops
from training.exchange.denoiser_layouts import LAYOUTS
from training.exchange.layout import Network
from training.loop import optim
from training.loop.ema import EMA
from training.settings.sections import Optimizer

DECAY, RATE, AVERAGE = 0.01, 1e-4, 0.9999
CLASSES = 1000


class Pair(NamedTuple):
    """Ours and theirs of the same weights, with what is trained of ours beside the network: vectors of classes."""

    ours: Any
    theirs: Any
    labels: Any


class Inputs(NamedTuple):
    """A batch of noisy latents (B, C, H, W), their levels (B,), the targets, and what the networks are told: classes
    (B,), or text (B, L, D) with its mask."""

    x: Tensor
    level: Tensor
    wanted: Tensor
    told: Tensor
    mask: Tensor

    def to(self, device: str) -> Inputs:
        """Moved to `device`."""
        return Inputs(*(part.to(device) for part in self))


class Step(Case):
    """A training step of a denoiser. `sizes`: for each size (settings of diffusers' class, latents a side, batch)."""

    name: ClassVar[str]  # of diffusers' class
    sizes: ClassVar[dict[str, tuple[dict[str, Any], int, int]]]
    tokens: ClassVar[int] = 0
    masked: ClassVar[bool] = False
    targets = (replace(STOCK_SPEED, least=1.5), replace(SAME_SPEED, least=1.3), replace(OF_PRODUCT, least=0.65))

    def build(self, place: Place) -> Contest:
        settings, side, batch = self.sizes[place.size]
        pair = equal_pair(self.name, settings, side, place.device)
        inputs = self.inputs(settings, side, batch).to(place.device)
        if place.setting == "compiled":
            pair.ours.compile()
            pair.theirs.compile()

        def agree() -> None:
            with torch.no_grad():
                wanted = self.theirs(pair, inputs)
                torch.testing.assert_close(self.ours(pair, inputs), wanted, rtol=1e-4, atol=1e-4)

        trained = [part for part in (pair.ours, pair.labels) if part is not None]
        return Contest(
            {"ours": our_step(lambda: self.ours(pair, inputs), inputs.wanted, trained),
             "peer": their_step(lambda: self.theirs(pair, inputs), inputs.wanted, pair.theirs)},
            agree, items=batch, flops=self.flops(pair, inputs))  # fmt: skip

    def inputs(self, settings: dict[str, Any], side: int, batch: int) -> Inputs:
        """The same in every process."""
        random = torch.Generator().manual_seed(1)
        x, wanted = (torch.randn(batch, 4, side, side, generator=random) for _ in range(2))
        level = torch.randint(0, 1000, (batch,), generator=random)
        if not self.tokens:
            classes = torch.randint(0, CLASSES, (batch,), generator=random)
            return Inputs(x, level, wanted, classes, torch.ones(batch, 1, dtype=torch.bool))
        width = settings.get("caption_channels") or settings["cross_attention_dim"]
        context = torch.randn(batch, self.tokens, width, generator=random)
        lengths = torch.randint(1, self.tokens + 1, (batch, 1), generator=random)
        mask = (torch.arange(self.tokens)[None] < lengths) | (not self.masked)
        return Inputs(x, level, wanted, context, mask)

    def ours(self, pair: Pair, inputs: Inputs) -> Tensor:
        """What our network answers."""
        cond = Cond(inputs.told, inputs.mask)
        if pair.labels is not None:
            pooled = pair.labels(inputs.told + 1)  # row 0 is the null
            cond = Cond(pooled[:, None], inputs.mask, pooled)
        answer: Tensor = pair.ours(inputs.x, inputs.level, cond)
        return answer

    def theirs(self, pair: Pair, inputs: Inputs) -> Tensor:
        """What diffusers' network answers."""
        told: dict[str, Any] = {"class_labels": inputs.told}
        if self.tokens:
            mask = inputs.mask if self.masked else None
            told = {"encoder_hidden_states": inputs.told, "encoder_attention_mask": mask}
        answer: Tensor = pair.theirs(inputs.x, timestep=inputs.level, **told, return_dict=False)[0]
        return answer

    def flops(self, pair: Pair, inputs: Inputs) -> float:
        """Of forward and backward, of ours, on the meta device."""
        there = Pair(copy.deepcopy(pair.ours).to("meta"), None, pair.labels and copy.deepcopy(pair.labels).to("meta"))
        told = inputs.to("meta")
        return flops(lambda: self.ours(there, told).sum().backward())  # type: ignore[no-untyped-call]


class DiTStep(Step):
    kind = "dit"
    title = "training step of a DiT with classes, S/2, on a GPU B/2 (`DiTTransformer2DModel`)"
    name = "DiTTransformer2DModel"
    small: ClassVar = {"num_attention_heads": 4, "attention_head_dim": 48, "num_layers": 4, "sample_size": 16,
                       "in_channels": 4, "out_channels": 4, "norm_eps": 1e-6}  # fmt: skip
    usual: ClassVar = small | {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "sample_size": 32}
    large: ClassVar = usual | {"num_attention_heads": 12}
    sizes: ClassVar = {"smoke": (small, 16, 4), "cpu": (usual, 32, 8), "gpu": (large, 32, 256)}


class PixArtStep(Step):
    kind = "pixart"
    title = "training step of a PixArt of that size, 120 tokens of text (`PixArtTransformer2DModel`)"
    name = "PixArtTransformer2DModel"
    tokens, masked = 120, True
    targets = (replace(STOCK_SPEED, least=1.5, checked=NOT_YET), *DiTStep.targets[1:])
    more: ClassVar = {"caption_channels": 512, "use_additional_conditions": False, "interpolation_scale": 1}
    small: ClassVar = DiTStep.small | more | {"cross_attention_dim": 192}
    usual: ClassVar = DiTStep.usual | more | {"cross_attention_dim": 384}
    large: ClassVar = DiTStep.large | more | {"cross_attention_dim": 768}
    sizes: ClassVar = {"smoke": (small, 16, 4), "cpu": (usual, 32, 8), "gpu": (large, 32, 256)}


class UNetStep(Step):
    kind = "unet"
    title = "training step of a cross-attention U-Net, 77 tokens of text (`UNet2DConditionModel`)"
    name = "UNet2DConditionModel"
    tokens = 77
    targets = (replace(STOCK_SPEED, least=1.5, checked=NOT_YET), SAME_SPEED, OF_PRODUCT)
    small: ClassVar = {
        "block_out_channels": (64, 128), "layers_per_block": 1, "cross_attention_dim": 128, "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "sample_size": 16,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
    usual: ClassVar = small | {
        "block_out_channels": (128, 192, 256), "cross_attention_dim": 256,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
    large: ClassVar = {"cross_attention_dim": 768, "sample_size": 32}  # Stable Diffusion 1's
    sizes: ClassVar = {"smoke": (small, 16, 4), "cpu": (usual, 16, 32), "gpu": (large, 32, 64)}


CASES = (DiTStep(), PixArtStep(), UNetStep())


def equal_pair(name: str, settings: dict[str, Any], side: int, device: str) -> Pair:
    """diffusers' network of these settings, no weight of which is zero, and ours with its weights."""
    torch.manual_seed(0)
    theirs = getattr(peers(), name)(**settings).eval()  # in training it drops classes, in every block others
    for parameter in theirs.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    state = theirs.state_dict()
    first = {key: value for key, value in state.items() if key.startswith("transformer_blocks.0.norm1.emb.")}
    for i in range(1, theirs.config.get("num_layers", 1)):  # each block has embedders of its own, here alike
        state |= {key.replace("blocks.0.", f"blocks.{i}."): value.clone() for key, value in first.items()}
    theirs.load_state_dict(state)
    network: Network = LAYOUTS[name].read(dict(theirs.config), {key: value.clone() for key, value in state.items()})
    shape = {key: tuple(value) if isinstance(value, list) else value for key, value in network.backbone.items()}
    kind: Any = {"dit": DiT, "unet": UNet}[str(shape["kind"])]
    ours = kind(**shape).build(channels=network.channels, context_dim=network.context_dim,
                                                   pooled_dim=network.pooled_dim)  # fmt: skip
    ours.load_state_dict(network.tensors)
    labels = None
    if network.labels is not None:
        labels = nn.Embedding(*network.labels.shape).to(device)
        labels.weight.data.copy_(network.labels)
    return Pair(ours.to(device), theirs.to(device), labels)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def our_step(answer: Callable[[], Tensor], wanted: Tensor, modules: list[nn.Module]) -> Callable[[], Tensor]:
    """A step with the loop's own optimiser and average."""
    settings = Optimizer(lr=RATE, weight_decay=DECAY, betas=(0.9, 0.999))
    optimizer, average = optim.build(settings, modules), EMA({str(i): part for i, part in enumerate(modules)}, AVERAGE)

    def step() -> Tensor:
        with autocast(wanted.device):
            loss = (answer().float() - wanted).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        average.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def their_step(answer: Callable[[], Tensor], wanted: Tensor, network: nn.Module) -> Callable[[], Tensor]:
    """A step as diffusers' training scripts write it."""
    average = peers("diffusers.training_utils").EMAModel(network.parameters(), decay=AVERAGE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)

    def step() -> Tensor:
        with autocast(wanted.device):
            loss = torch.nn.functional.mse_loss(answer().float(), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        return loss.detach()

    return step
