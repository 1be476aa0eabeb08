"""Pictures of a batch whose attention is coupled: prompt-to-prompt, MasaCtrl, style from a reference picture.

A batch of pairs (source, target, source, target, ...) walks any sampler, each sample with an x of its own. `Coupled`
stands around the network's denoiser and inside a guidance: whatever that joins (condition, null, further captions), two
neighbouring samples stay a pair. The sources are what they would be alone. A coupling asks for the share of noise w =
sigma / (alpha + sigma), on every process the time of `flow`, so it does not depend on the sampler or its steps; steps
that are uniform in w visit the first 80 % of them above w = 0.2. A new coupling is a class and an entry in `COUPLINGS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond, Share
from ldm.denoiser import Around, Denoise, Denoiser
from ldm.diffusion import Denoised
from ldm.guiding import place
from ldm.jumps import BoundJump, Jumping
from ldm.text import TextEncoder
from ldm.text.tokenizer import split


class Coupling(Checked, ABC):
    """What the attention of a target takes from its source's. `needs`: the attentions in which it does, "own" over the
    picture and "cross" over the text."""

    needs: ClassVar[frozenset[str]]

    @abstractmethod
    def share(self, noise: float) -> Share:
        """What is shared at a share of noise in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class PromptToPrompt(Coupling):
    """The source's attention maps on the target's values, for a word swapped: its q and k, the target's v.

    Maps over the text above the noise share `cross_until`, over the picture above `self_until`; 1 is never. Captions
    must be aligned token by token (`swapped_words`); pooled text stays the target's own. Here the null's maps are
    shared too. Hertz et al. 2022 (arXiv 2208.01626), section 3.2: 0.2 and 0.6 are its first 80 % and 40 % of the steps.
    """

    kind: Literal["prompt-to-prompt"] = "prompt-to-prompt"
    cross_until: float = 0.2
    self_until: float = 0.6
    limits: ClassVar = {"cross_until": "[0, 1]", "self_until": "[0, 1]"}
    needs: ClassVar = frozenset({"own", "cross"})

    def share(self, noise: float) -> Share:
        return Share(own="qk" if noise > self.self_until else "", cross="qk" if noise > self.cross_until else "")


class KeysAndValues(Coupling):
    """The target asks the source's picture: its own q, the source's k and v in self-attention, at noise shares up to
    `below`, in the layers from `depth` on. `below` 0 is never; a `depth` of 0.5 is the second half of a transformer
    and the way up of a U-Net."""

    below: float
    depth: float
    limits: ClassVar = {"below": "[0, 1]", "depth": "[0, 1)"}
    needs: ClassVar = frozenset({"own"})

    def share(self, noise: float) -> Share:
        return Share(own="kv" if noise <= self.below else "", depth=self.depth)


@dataclass(frozen=True, kw_only=True)
class MasaCtrl(KeysAndValues):
    """Another pose or view of the same thing: the target lays itself out first, then looks like the source.

    A source that is a real picture starts from its *unguided* inversion. Cao et al. 2023 (arXiv 2304.08465), section
    3.2; its step 4 of 50 and layer 10 of Stable Diffusion's 16 are `below` 0.9 and `depth` 0.7.
    """

    kind: Literal["masactrl"] = "masactrl"
    below: float = 0.9
    depth: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Style(KeysAndValues):
    """The target in the colours and textures of its source, the style picture, at every noise level.

    Its contents come from where it starts, whose statistics AdaIN moves to the style's.
    Chung et al. 2024 (arXiv 2312.09008), section 3.2, without its mixed queries and temperature.
    """

    kind: Literal["style"] = "style"
    below: float = 1.0
    depth: float = 0.5


@dataclass(frozen=True)
class Coupled(Around):
    """A network's denoiser on pairs: samples 0, 2, 4, ... are sources, each followed by its target.

    Where nothing is shared it is the denoiser, bit for bit. A few-step model's jumps share what they do at the time
    that they go from. Raises ValueError, when it is built, for what has no such attention; and when it is called, for
    an odd batch. A weaker model (`Helpers.weak`) is coupled by itself.
    """

    coupling: Coupling
    denoiser: Denoiser

    def __post_init__(self) -> None:
        if missing := self.coupling.needs - getattr(self.denoiser.backbone, "shares", frozenset()):
            words = {"own": "attention over the picture alone", "cross": "cross-attention to the text"}
            lacks = " and ".join(words[name] for name in sorted(missing, reverse=True))
            raise ValueError(f"{self.coupling.kind} needs a backbone with {lacks}, which this one does not have: "
                             'take a `unet`, or a `dit` with text = "cross"')

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        return self.denoiser(x, t, self._coupled(x, t, cond))

    def bind(self, cond: Cond) -> Denoise:
        """As one that jumps, where the network does."""
        if not isinstance(denoiser := self.denoiser, Jumping):
            return super().bind(cond)
        return BoundJump(self.schedule, lambda x, t, s: denoiser.jump(x, t, s, self._coupled(x, t, cond)))

    def _coupled(self, x: Tensor, t: Tensor, cond: Cond) -> Cond:
        if len(x) % 2:
            raise ValueError(f"{self.coupling.kind} works on pairs (source, target), not on {len(x)} samples")
        return cond._replace(share=self.coupling.share(place(t, self.schedule, "noise-share").item()))


def paired(source: Cond, target: Cond) -> Cond:
    """Conditions of B sources and B targets (either may be of batch 1) as 2B samples, each source before its target.

    The noise is `x.repeat_interleave(2, dim=0)`, or the same seed twice; targets are the samples `[1::2]`.
    """
    count = max(len(source.mask), len(target.mask))
    both = Cond.cat([source.expand(count), target.expand(count)])
    return both.select(torch.arange(2 * count, device=both.mask.device).view(2, count).T.flatten())


def swapped_words(text: TextEncoder, source: str, target: str) -> list[tuple[str, str]]:
    """The words in which two captions differ, (source's, target's), in order; what prompt-to-prompt is asked to swap.

    Raises ValueError where their tokens do not stand for each other one by one, and for a text encoder that gives one
    token in all: attention to that is 1, whatever it is.
    """
    if text([source]).context.shape[1] == 1:
        raise ValueError("prompt-to-prompt keeps the attention to each word, but this text encoder gives one token per "
                         "caption: use a `scratch` or `huggingface` text encoder")
    ours, theirs = split(source), split(target)
    pairs = [pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]]
    asked = [(source, target), *pairs]
    counts = [[reading.tokens for reading in text.readings(pair)] for pair in asked]
    unequal = [pair for pair, (ours_, theirs_) in zip(asked, counts, strict=True) if ours_ != theirs_]
    if len(ours) != len(theirs) or unequal:
        a, b = unequal[-1] if unequal else asked[0]
        raise ValueError(f"prompt-to-prompt swaps words for as many, token by token, and {a!r} and {b!r} are of "
                         "different lengths: change words, but neither add nor remove any")
    return pairs


COUPLINGS = (PromptToPrompt, MasaCtrl, Style)
