"""Small backbones and what low-rank adapters change of them, for tests of LoRA files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.low_rank import LowRankConfig
from ldm.backbones import DiT, UNet
from ldm.conditioning import Cond

SETTINGS: dict[str, Any] = {"kind": "unet", "channels": [32, 64], "attention": [0, 1], "blocks": 1, "groups": 8,
                            "heads": 4, "depth": 1}  # fmt: skip
WIDE = ("*.to_q", "*.to_out.0", "*.proj_in", "*.ff.net.*", "conv_in", "*.time_emb_proj", "*.conv1")
STYLES = ("diffusers", "kohya")
TEXT: Any = nn.Identity()  # no layer of a text encoder is changed here


def unet(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in (SETTINGS | settings).items()}
    return shaken(UNet(**given).build(channels=4, context_dim=16))


def dit(**settings: Any) -> tuple[nn.Module, DiT]:
    torch.manual_seed(0)
    config = DiT(width=32, depth=2, heads=2, base_size=8, **settings)
    return shaken(config.build(channels=4, context_dim=16, pooled_dim=16)), config


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module.requires_grad_(False).eval()


def learned(config: LowRankConfig, backbone: Any) -> Any:
    """An adapter that has learned something; not attached."""
    adapter = config.build(backbone, TEXT)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return adapter


def answer(backbone: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, context, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, 16), (16,)))
    with torch.no_grad():
        told: Tensor = backbone(x, torch.tensor([10.0, 700.0]), Cond(context, torch.ones(2, 5).bool(), pooled))
    return told


def weights_by_hand(found: dict[str, dict[str, Tensor]], backbone: nn.Module) -> None:
    """Put W + B A, or m V / ||V||, in the place of each weight."""
    for name, part in found.items():
        weight = backbone.get_submodule(name).get_parameter("weight")
        v = weight.flatten(1) + part["B"] @ part["A"].flatten(1)
        if "m" in part:
            v = part["m"][:, None] * v / v.norm(dim=1, keepdim=True)
        weight.data = v.view_as(weight)
