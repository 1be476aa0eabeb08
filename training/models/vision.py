"""The frozen vision model that latents, or a denoiser's features, are aligned with: any Hugging Face folder or name, or
a classifier of ours; and what names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.alignment import VisionFeatures
from training.errors import DATA, UserError
from training.guarding import read_record
from training.models.judge import Classifier, load_classifier
from training.models.pretrained import load_model, loading
from training.settings.decoding import AutoencoderConfig
from training.tensors import content_hash

if TYPE_CHECKING:
    import argparse


def vision_of_flags(args: argparse.Namespace, config: AutoencoderConfig) -> VisionFeatures | None:
    """The model that --align-with names, if latents are aligned. Raises UserError for the flag or the weight alone."""
    if config.loss.align and not args.align_with:
        what = f"loss.align {config.loss.align:g} needs a vision model"
        raise UserError(what, hint="name its folder, say of DINOv2: --align-with DIR; or set loss.align 0")
    if args.align_with and not config.loss.align:
        raise UserError("--align-with has no effect while loss.align is 0", hint="set --loss.align, for example to 0.5")
    return load_vision(args.align_with) if args.align_with else None


def load_vision(name: str) -> VisionFeatures:
    """A frozen vision model by local folder or hub name, with the size and normalisation its preprocessor states.

    The image half of a model of two (CLIP, SigLIP). Safetensors only, no remote code. Raises UserError (exit 3) where
    it cannot be had or is no vision model.
    """
    hint = "give a folder that holds config.json, model.safetensors and preprocessor_config.json, as of DINOv2"
    with loading("vision model", name, hint) as how:
        from transformers import AutoImageProcessor

        model = load_model(name, {}, how)
        network = getattr(model, "vision_model", model)
        if network.main_input_name != "pixel_values":
            raise ValueError(f"a {model.config.model_type} model is not a vision model")
        processor = AutoImageProcessor.from_pretrained(name, **how)
        return VisionFeatures(network, side(processor), processor.image_mean, processor.image_std)


class ClassifierFeatures(nn.Module):
    """The maps of a classifier of ours in place of a vision model's: see `VisionFeatures`."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network, self.width = network, 4 * network.width

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, D, *grid) float32."""
        return F.interpolate(self.network.places(images).float(), grid, mode="bilinear", antialias=True)


def load_features(name: str) -> VisionFeatures | ClassifierFeatures:
    """A frozen vision model as `load_vision` has it, or the folder of a classifier. Raises UserError as it does."""
    config = Path(name) / "config.json"
    if config.is_file() and "classes" in read_record(config, {}, code=DATA):
        return ClassifierFeatures(load_classifier(name))
    return load_vision(name)


def side(processor: Any) -> int:
    """Pixels a side of what the model is given. ValueError where its preprocessor does not tell."""
    crops = getattr(processor, "do_center_crop", False)
    size: Any = (getattr(processor, "crop_size", None) if crops else None) or processor.size
    for key in ("height", "shortest_edge"):
        if value := (size.get(key) if hasattr(size, "get") else getattr(size, key, None)):
            return int(value)
    raise ValueError("preprocessor_config.json states no size")


def vision_hash(vision: VisionFeatures | ClassifierFeatures | None) -> dict[str, str]:
    """What names the model, for the facts of a run; empty where there is none."""
    return {"weights": content_hash(vision.network.state_dict())} if vision else {}
