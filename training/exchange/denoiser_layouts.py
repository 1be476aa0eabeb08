"""diffusers' classes of denoisers that have a counterpart here, each read and written: its config.json, ours, and how
tensors change."""

from __future__ import annotations

from training.exchange import transformer_layouts, unet_layout
from training.exchange.layout import Layout

LAYOUTS: dict[str, Layout] = {
    "UNet2DConditionModel": Layout(unet_layout.read, unet_layout.write),
    "PixArtTransformer2DModel": Layout(transformer_layouts.read_pixart, transformer_layouts.write_pixart),
    "DiTTransformer2DModel": Layout(transformer_layouts.read_dit, transformer_layouts.write_dit),
}
# Before diffusers 0.29 one class was both, by its norm_type.
OLDER = {"ada_norm_single": "PixArtTransformer2DModel", "ada_norm_zero": "DiTTransformer2DModel"}
