"""Text encoders: captions in; context tokens, padding mask and pooled vector out. A config that derives from
`TextConfig`, in a file of its own here, is in `TEXT_ENCODERS`."""

from __future__ import annotations

from ldm.families import members
from ldm.text.encoders import Label, Scratch, TextConfig, TextEncoder
from ldm.text.huggingface import HuggingFace
from ldm.text.tokenizer import WordTokenizer

TEXT_ENCODERS = members(__name__, __path__, TextConfig, Scratch)

__all__ = ["TEXT_ENCODERS", "HuggingFace", "Label", "Scratch", "TextConfig", "TextEncoder", "WordTokenizer"]
