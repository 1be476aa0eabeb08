"""The frozen vision model that latents are aligned with: any Hugging Face folder or name, and what names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoencoder.alignment import VisionFeatures
from training.errors import DATA, UserError
from training.files import content_hash
from training.models.text_encoders import in_precision
from training.settings.decoding import AutoencoderConfig

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
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    hint = "give a folder that holds config.json, model.safetensors and preprocessor_config.json, as of DINOv2"
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise UserError(f"{name}: no such folder of a vision model", hint=hint, code=DATA)
    try:
        how = {"use_safetensors": True, "output_loading_info": True, **in_precision("float32")}
        model, report = AutoModel.from_pretrained(name, **how)
        if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):  # poolers are not used
            raise ValueError(f"its weights lack {missing[0]}")
        network = getattr(model, "vision_model", model)
        if network.main_input_name != "pixel_values":
            raise ValueError(f"a {model.config.model_type} model is not a vision model")
        processor = AutoImageProcessor.from_pretrained(name)
        return VisionFeatures(network, side(processor), processor.image_mean, processor.image_std)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as failure:
        reason = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
        raise UserError(f"vision model '{name}' cannot be used ({reason[:200]})", hint=hint, code=DATA) from None


def side(processor: Any) -> int:
    """Pixels a side of what the model is given. ValueError where its preprocessor does not tell."""
    crops = getattr(processor, "do_center_crop", False)
    size: Any = (getattr(processor, "crop_size", None) if crops else None) or processor.size
    for key in ("height", "shortest_edge"):
        if value := (size.get(key) if hasattr(size, "get") else getattr(size, key, None)):
            return int(value)
    raise ValueError("preprocessor_config.json states no size")


def vision_hash(vision: VisionFeatures | None) -> dict[str, str]:
    """What names the model, for the facts of a run; empty where there is none."""
    return {"weights": content_hash(vision.network.state_dict())} if vision else {}
