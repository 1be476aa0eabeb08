"""Several adapters trained and stored as one: new words together with a low-rank adapter, say."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ldm.adapters.base import Adapter, AdapterConfig
from ldm.adapters.words import TextualInversion, new_words
from ldm.backbones.base import Backbone
from ldm.text import TextEncoder


def build(config: AdapterConfig, backbone: Backbone, text: TextEncoder) -> Adapter:
    """The adapter of a config and, where it names words and is not itself of words, these beside it. Raises ValueError
    as both do."""
    made = config.build(backbone, text)
    if not config.words or isinstance(config, TextualInversion):
        return made
    return Joined({"words": new_words(config, text), config.kind: made})


class Joined(Adapter):
    """`parts` by name, attached in their order. Their names are prefixes of the state; strength and hint are those of
    every part."""

    def __init__(self, parts: Mapping[str, Adapter]) -> None:
        nn.Module.__init__(self)
        self.parts = nn.ModuleDict(parts)
        self.adapters = tuple(parts.values())

    def attach(self, backbone: Backbone, text: TextEncoder) -> tuple[Backbone, TextEncoder]:
        """See `Adapter.attach`."""
        for part in self.adapters:
            backbone, text = part.attach(backbone, text)
        return backbone, text

    @property
    def strength(self) -> float:
        """Of every part."""
        return self.adapters[0].strength

    @strength.setter
    def strength(self, value: float) -> None:
        for part in self.adapters:
            part.strength = value

    @property
    def hint(self) -> str:
        """Of the parts that read one."""
        return next((part.hint for part in self.adapters if part.hint), "")

    @hint.setter
    def hint(self, value: str) -> None:
        for part in self.adapters:
            part.hint = value if part.hint else ""
