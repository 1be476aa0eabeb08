"""What every adapter is: parameters learned upon a frozen base, and the way they are put to work in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Self

from torch import nn

from ldm.backbones.base import Backbone
from ldm.checks import Checked
from ldm.text import TextEncoder


class Adapter(nn.Module, ABC):
    """What is learned upon a frozen base, and nothing of the base: its parameters are all that a run stores.

    `strength` multiplies what it does; at 0 the base answers as it does alone, bit for bit. `hint`: the extra of `Cond`
    that it reads, "" for none.
    """

    def __init__(self, hint: str = "") -> None:
        super().__init__()
        self.strength, self.hint = 1.0, hint

    @abstractmethod
    def attach(self, backbone: Backbone, text: TextEncoder) -> tuple[Backbone, TextEncoder]:
        """Backbone and text encoder with this adapter at work in them: the same modules changed in place, or others
        around them. Several adapters are attached one after the other; the parameters of the base stay as they are."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Checked, ABC):
    """The config of an adapter: a frozen dataclass with a `kind`. Any adapter may learn new `words` beside what it is:
    `words.py` says how, and what `kin` are."""

    words: tuple[str, ...] = ()
    kin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kin) not in {0, 1, len(self.words)}:
            raise ValueError(f"kin: one for all or one for each of {len(self.words)} words, not {len(self.kin)}")
        if len(set(self.words)) < len(self.words):
            raise ValueError("words: one is named twice")

    def settled(self, factor: int, hint_channels: int) -> Self:
        """With what the data decide where the config leaves it open: the autoencoder's factor, and the channels of the
        hints beside the latents (0: there are none). Raises ValueError where it needs what is not there."""
        return self

    @abstractmethod
    def build(self, backbone: Backbone, text: TextEncoder) -> Adapter:
        """A freshly initialised adapter for this base, not yet attached. Raises ValueError where the base has nothing
        that it could be put on."""


@dataclass(frozen=True, kw_only=True)
class NoAdapter(AdapterConfig):
    """Config of a denoiser that is itself trained."""

    kind: Literal["none"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words:
            raise ValueError("words: are learned by an adapter: kind textual-inversion, or any other beside them")

    def build(self, backbone: Backbone, text: TextEncoder) -> Adapter:
        """Raises ValueError: there is nothing to build."""
        raise ValueError("adapter.kind is none: there is nothing to be learned upon the base")


ADAPTERS = (NoAdapter,)
