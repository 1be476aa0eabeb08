"""Text encoders: captions in; context tokens, padding mask and pooled vector out. A new one is a `TextConfig` in a
module here, which lists it in its `TEXT_ENCODERS`."""

from __future__ import annotations

from ldm.families import members
from ldm.text.encoders import Label, Reading, Scratch, TextConfig, TextEncoder
from ldm.text.huggingface import HuggingFace
from ldm.text.tokenizer import WordTokenizer

TEXT_ENCODERS: tuple[type[TextConfig], ...] = members(__name__, "TEXT_ENCODERS")

__all__ = ["TEXT_ENCODERS", "HuggingFace", "Label", "Reading", "Scratch", "TextConfig", "TextEncoder", "WordTokenizer"]
