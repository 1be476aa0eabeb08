"""Padding that is not masked: a frozen encoder gives what Stable Diffusion's pipelines take of the same model."""

from __future__ import annotations

from typing import Any

import pytest
import test_text as models
import torch

from ldm.text import HuggingFace

CAPTIONS = ["a red circle", "a photo of a red circle", ""]


def states(model: Any, tokenizer: Any, **told: Any) -> torch.Tensor:
    """The model's own answer, called as diffusers' Stable Diffusion pipelines call it: `text_encoder(ids, mask)`."""
    tokens = tokenizer(CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states: torch.Tensor = model.eval()(tokens.input_ids, **told).last_hidden_state
    return states


@pytest.mark.parametrize("name", ["clip", "clip-projected", "t5", "bert"])
def test_unmasked_padding_is_no_secret_to_the_encoder_either(name: str) -> None:
    model, tokenizer = models.MODELS[name]()
    tokenizer.padding_side = "right"
    cond = HuggingFace(length=12, masked=False).build(model, tokenizer)(CAPTIONS)
    assert cond.mask.all() and torch.equal(cond.context, states(model, tokenizer, attention_mask=None))
    mask = tokenizer(CAPTIONS, padding="max_length", max_length=12, return_tensors="pt")["attention_mask"]
    masked = states(model, tokenizer, attention_mask=mask)
    old = HuggingFace(length=12, masked=False, mask_rule=1).build(model, tokenizer)(CAPTIONS)
    assert old.mask.all() and torch.equal(old.context, masked)
    assert not torch.equal(masked, cond.context)
    kept = HuggingFace(length=12).build(model, tokenizer)(CAPTIONS)
    assert torch.equal(kept.context, masked) and kept.mask.equal(mask.bool())


def test_a_vector_is_made_of_real_tokens_either_way() -> None:
    model, tokenizer = models.MODELS["clip"]()
    encoder = HuggingFace(length=12, masked=False, pooling="mean").build(model, tokenizer)
    cond = encoder(["a red circle"])
    torch.testing.assert_close(cond.pooled[0], cond.context[0, :5].mean(0))
