"""Text encoders: captions in; context tokens, padding mask and pooled vector out. `TEXT_ENCODERS` lists them."""

from __future__ import annotations

from ldm.text.encoders import TEXT_ENCODERS, HuggingFace, Label, Scratch, TextEncoder
from ldm.text.tokenizer import WordTokenizer

__all__ = ["TEXT_ENCODERS", "HuggingFace", "Label", "Scratch", "TextEncoder", "WordTokenizer"]
