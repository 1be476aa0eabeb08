"""Textual inversion: new words, whose rows in the text encoder's table are all that is learned (Gal et al. 2022,
2208.01618)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ldm.adapters.base import Adapter, AdapterConfig
from ldm.backbones.base import Backbone
from ldm.text import TextEncoder
from ldm.text.encoders import LabelEncoder, ScratchTextEncoder


@dataclass(frozen=True, kw_only=True)
class TextualInversion(AdapterConfig):
    """Config of new words and nothing else."""

    kind: Literal["textual-inversion"] = "textual-inversion"

    def build(self, backbone: Backbone, text: TextEncoder) -> Words:
        """See `AdapterConfig.build` and `new_words`."""
        return new_words(self, text)


def new_words(config: AdapterConfig, text: TextEncoder) -> Words:
    """The `words` of a config, each beginning as its kin (one for all, or one for each); with none they begin as every
    word of a text encoder that learns: normal, of unit variance.

    Raises ValueError where there are none, or one is known or is not one word, or a kin is not known; and for a text
    encoder that learns no words.
    """
    encoder = _learner(text)
    if not config.words:
        raise ValueError("words: name the new words that are to be learned")
    known = encoder.tokenizer
    for key, word in [("words", word) for word in config.words] + [("kin", word) for word in config.kin]:
        if (parts := known.words(word)) != [word]:
            told = " ".join(map(repr, parts)) or "nothing"
            raise ValueError(f"{key}: {word!r} is not one word as captions are read, but {told}")
    encoder.check_new(config.words)
    if unknown := [word for word in config.kin if known.unknown(word)]:
        raise ValueError(f"kin: the text encoder does not know {unknown[0]!r} itself")
    table = encoder.table().detach()
    if not config.kin:
        return Words(config.words, nn.init.normal_(table.new_empty(len(config.words), table.shape[1])))
    places = [known.vocabulary.index(word) for word in config.kin * (len(config.words) // len(config.kin))]
    return Words(config.words, table[places])


class Words(Adapter):
    """Rows (W, width) of new words. No strength but 0 has a meaning of its own: at 0 the words are unknown, as they are
    to the base; at any other their rows are read as they are.

    The rows are parameters of their own, after the base's table and not in it: a decay of weights, or the moments of an
    optimiser, which move rows whose gradient is zero, cannot reach the words of the base (diffusers #1009).
    """

    def __init__(self, words: tuple[str, ...], rows: Tensor) -> None:
        super().__init__()
        self.words = words
        self.rows: Tensor = nn.Parameter(rows)

    def attach(self, backbone: Backbone, text: TextEncoder) -> tuple[Backbone, TextEncoder]:
        """See `Adapter.attach`: the text encoder, in place, knows the words; ValueError where it did already."""
        _learner(text).teach(self)
        return backbone, text


def _learner(text: TextEncoder) -> ScratchTextEncoder:
    if isinstance(text, ScratchTextEncoder):
        return text
    why = "of another kind than scratch" if text.trainable else "frozen, its embeddings stored beside latents or not"
    if isinstance(text, LabelEncoder):
        why = "one of labels, each a whole caption"
    raise ValueError(f"kind: no words can be taught to the text encoder of the base, which is {why}")


ADAPTERS = (TextualInversion,)
