"""Tiny runs of every shape that diffusers has, made without training: no weight of theirs is zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import torch

from ldm.text import HuggingFace
from training.models import text_encoders
from training.models.folders import export
from training.settings import decoding
from training.tensors import save_tensors

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "red", "blue", "green", "circle", "square", "photo", "above", "the"]
UNET = {"kind": "unet", "channels": [16, 32], "blocks": 1, "attention": [0, 1], "heads": 2, "groups": 8}
PIXART = {"kind": "dit", "width": 32, "depth": 2, "heads": 4, "mlp": "gelu-tanh", "conditioning": "adaln-single",
          "cross_norm": False, "pooled": False, "base_size": 8}  # fmt: skip
DIT = {"kind": "dit", "width": 32, "depth": 2, "heads": 4, "mlp": "gelu-tanh", "text": "none", "base_size": 8,
       "pooled_projection": False, "frequency_shift": 1.0}  # fmt: skip
CLIP = {"kind": "huggingface", "length": 12, "masked": False, "pooling": "none"}
T5 = {"kind": "huggingface", "length": 12, "lower": True, "pooling": "none"}
EPS = {"schedule": {"kind": "ddpm-scaled-linear"}, "prediction": {"kind": "eps"}, "grid": {"kind": "trailing"}}
FLOW = {"schedule": {"kind": "flow"}, "prediction": {"kind": "velocity"}}
KL = {"kind": "kl", "channels": [8, 16], "groups": 4, "blocks": 1}


def tokenizer(lower: bool = False) -> Any:
    """Words, cut at spaces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        words.normalizer = normalizers.Lowercase()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **marks)


def encoder(kind: str, home: Path, lower: bool = False, positions: int = 16) -> Path:
    """A tiny text encoder, saved as transformers saves it."""
    import transformers as t

    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if kind == "clip":
        clip = t.CLIPTextConfig(vocab_size=13, projection_dim=8, max_position_embeddings=positions, **shape, **ids)
        model: Any = t.CLIPTextModelWithProjection(clip)
    elif kind == "t5":
        model = t.T5EncoderModel(t.T5Config(vocab_size=13, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))
    else:
        model = t.BertModel(t.BertConfig(vocab_size=13, max_position_embeddings=positions, **shape))
    model.save_pretrained(home)
    tokenizer(lower).save_pretrained(home)
    return home


def run(home: Path, text_from: Path | None = None, model: dict[str, Any] | None = None, seed: int = 0,
        labels: tuple[str, ...] = ("blue", "green square", "red"), **sections: dict[str, Any]) -> Path:  # fmt: skip
    """final/ of a denoiser's run: config, seeded weights, autoencoder with a normaliser, text encoder."""
    final = home / "final"
    _, inner = peers.stored(final / "autoencoder", model or KL)
    size = {"size": [8 * inner.factor] * 2, "steps": 8}
    values = {"sample": size, "sampler": {"kind": "ddim"}, "format": {"version": 3}} | sections
    config: Any = decoding.decode_stored("denoiser", values)
    if isinstance(config.text, HuggingFace):
        text: Any = text_encoders.load_huggingface(config.text, str(text_from))
        text_encoders.keep(text, str(text_from), final)
    else:
        import json

        words = json.dumps({"classes": list(labels)}) if config.text.kind == "label" else config.text.vocabulary(labels)
        text = config.text.build(words)
        text_encoders.keep_vocabulary(words, final)
    torch.manual_seed(seed)
    width = {"context_dim": text.context_dim, "pooled_dim": text.pooled_dim}
    width |= config.image.inputs(inner.latent_channels, inner.image_channels)
    backbone = config.backbone.build(channels=inner.latent_channels, **width)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if text.trainable:
        (final / "text_encoder").mkdir(parents=True)
        save_tensors(final / "text_encoder" / "model.safetensors", text.state_dict())
    export(final, decoding.to_values(config), backbone.state_dict(), {})
    return home
