"""A frozen, loaded Hugging Face model as a text encoder: its hidden states are the context, a pooling the vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.conditioning import Cond
from ldm.text.encoders import Reading, TextConfig, TextEncoder, masked_mean


@dataclass(frozen=True, kw_only=True)
class HuggingFace(TextConfig):
    """Config of a frozen Hugging Face encoder: CLIP's text half, a T5 encoder, or one like BERT.

    `pooling`: "auto" (the model's own projected or pooled text where it was trained to give one, as CLIP's; else the
    mean), "mean" over real tokens, "eos" (last real token) or "none". `layer`: -1 the last hidden state, after the
    final norm; otherwise an index into hidden_states, -2 the penultimate. `lower`: lower-case and strip, as PixArt
    does. `masked = False` lets padding be attended to, as Stable Diffusion's U-Nets do: neither the encoder nor the
    backbone is told of it. By `mask_rule` 1, which came first, the encoder still was.
    """

    kind: Literal["huggingface"] = "huggingface"
    length: int = 77
    pooling: Literal["auto", "mean", "eos", "none"] = "auto"
    layer: int = -1
    lower: bool = False
    masked: bool = True
    mask_rule: int = 2
    limits: ClassVar = {"length": "(0, inf)", "mask_rule": "[1, 2]"}

    def build(self, model: nn.Module, tokenizer: Any) -> HuggingFaceTextEncoder:
        """The encoder around a loaded transformers model, which it freezes; ValueError on a misfit."""
        return HuggingFaceTextEncoder(self, model, tokenizer)


class HuggingFaceTextEncoder(TextEncoder):
    """A frozen transformers text model; its outputs are given as float32 whatever its dtype."""

    def __init__(self, config: HuggingFace, model: nn.Module, tokenizer: Any) -> None:
        shape: Any = model.config
        positions = getattr(shape, "max_position_embeddings", config.length)
        if config.length > positions:
            raise ValueError(f"length {config.length} is more than the text encoder's {positions} positions")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token, so captions cannot be batched")
        pooling = _pooling(config.pooling, model)
        pooled_dim = shape.projection_dim if pooling == "projected" else shape.hidden_size
        super().__init__(context_dim=shape.hidden_size, pooled_dim=None if pooling == "none" else pooled_dim,
                         trainable=False)
        self.config, self.pooling = config, pooling
        self.model, self.tokenizer = model.requires_grad_(False), tokenizer

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Cond:
        """See `TextEncoder.encode`."""
        tokens = self.tokenizer(self._clean(captions), padding="max_length", max_length=self.config.length,
                                truncation=True, padding_side="right", return_tensors="pt")
        device = next(self.model.parameters()).device
        numbers, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        self.model.eval()  # a trainer's train() reaches this model too, and would switch T5's dropout on
        told = mask if self.config.masked or self.config.mask_rule == 1 else None
        output = self.model(input_ids=numbers, attention_mask=told, output_hidden_states=self.config.layer != -1)
        states = output.last_hidden_state if self.config.layer == -1 else output.hidden_states[self.config.layer]
        states, real = states.float(), mask.bool()
        pooled = POOLINGS[self.pooling](output, states, real)
        return Cond(states, real if self.config.masked else torch.ones_like(real), pooled)

    def _clean(self, captions: Iterable[str]) -> list[str]:
        return [caption.lower().strip() if self.config.lower else caption for caption in captions]

    def truncated(self, captions: Iterable[str]) -> int:
        """See `TextEncoder.truncated`."""
        return sum(len(row) > self.config.length for row in self.tokenizer(self._clean(captions))["input_ids"])

    def readings(self, captions: Sequence[str]) -> list[Reading]:
        """See `TextEncoder.readings`; unknown are the pieces of a caption that all get the same number."""
        own: Any = self.tokenizer
        most, texts = self.config.length - own.num_special_tokens_to_add(), self._clean(captions)
        told = own(texts, add_special_tokens=False, return_offsets_mapping=own.is_fast)
        found = []
        for number, (text, row) in enumerate(zip(texts, told["input_ids"], strict=True)):
            places = [place for place, token in enumerate(row) if token == own.unk_token_id]
            spans = [told["offset_mapping"][number][place] for place in places] if own.is_fast else []
            unknown = [text[start:end] for start, end in spans] or [own.unk_token] * len(places)
            found.append(Reading(len(row), min(len(row), most), unknown, len(row) - len(places)))
        return found


# Of a model's output, its states (B, L, D) and which of them are real (B, L): the vector, float32.
POOLINGS: dict[str, Callable[[Any, Tensor, Tensor], Tensor | None]] = {
    "none": lambda output, states, real: None,
    "mean": lambda output, states, real: masked_mean(states, real),
    "eos": lambda output, states, real: states[torch.arange(len(states), device=states.device), real.sum(1) - 1],
    "projected": lambda output, states, real: output.text_embeds.float(),
    "pooler": lambda output, states, real: output.pooler_output.float(),
}


def _pooling(asked: str, model: nn.Module) -> str:
    """What "auto" means for this model. BERT's pooler is left out: it learned sentence order, not meaning."""
    if asked != "auto":
        return asked
    if hasattr(model, "text_projection"):
        return "projected"
    shape: Any = model.config
    return "pooler" if shape.model_type.startswith(("clip", "siglip")) else "mean"


TEXT_ENCODERS = (HuggingFace,)
