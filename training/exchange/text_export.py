"""A frozen text encoder with its tokenizer as pipelines of diffusers' have them, in two folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.text import TextEncoder
from ldm.text.huggingface import HuggingFaceTextEncoder
from training.guarding import make_folder
from training.tensors import save_tensors

PROBE = " A Red CIRCLE above É "


def is_clip(encoder: HuggingFaceTextEncoder) -> bool:
    """Whether it is CLIP's, which learned to give a vector too."""
    return type(encoder.model).__name__ == "CLIPTextModelWithProjection"


def lower_cases(encoder: HuggingFaceTextEncoder) -> bool:
    """Whether its tokenizer lower-cases and strips by itself, so that `lower` changes nothing."""
    plain, lower = (encoder.tokenizer(text)["input_ids"] for text in (PROBE, PROBE.lower().strip()))
    return bool(plain == lower)


def save_text(folder: Path, encoder: TextEncoder, *, told: bool = False) -> dict[str, list[str]]:
    """The frozen encoder and its tokenizer, which cuts prompts to the trained length. `told`: pipelines of U-Nets give
    the encoder its padding mask where its config says so, as the older rule of ours (`mask_rule` 1) does."""
    assert isinstance(encoder, HuggingFaceTextEncoder)
    about: Any = copy.deepcopy(encoder.model.config)
    tensors, name = dict(encoder.model.state_dict()), type(encoder.model).__name__
    if is_clip(encoder):  # whose first answer is the pooled text; pipelines read the first
        tensors = {key: value for key, value in tensors.items() if key != "text_projection.weight"}
        name = "CLIPTextModel"
    about.architectures = [name]
    if told and encoder.config.mask_rule == 1:
        about.use_attention_mask = True
    home = folder / "text_encoder"
    make_folder(home)
    about.save_pretrained(home)
    save_tensors(home / "model.safetensors", _once(tensors))
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.model_max_length, tokenizer.padding_side = encoder.config.length, "right"
    tokenizer.save_pretrained(folder / "tokenizer")
    kind = type(tokenizer).__name__
    if kind == "TokenizersBackend":  # transformers 5's name of a class that both 4 and 5 know
        kind = "PreTrainedTokenizerFast"
    return {"text_encoder": ["transformers", name], "tokenizer": ["transformers", kind]}


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under the first of its names: what is tied is one, and transformers ties it again."""
    first: dict[int, str] = {}
    return {key: value for key, value in tensors.items() if first.setdefault(value.data_ptr(), key) == key}
