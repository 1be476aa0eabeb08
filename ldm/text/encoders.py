"""Text encoders that learn with the denoiser: a transformer over words, or one embedding per caption."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ldm.backbones.attention import FeedForward, SelfAttention, zero
from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.text.tokenizer import RULE, WordTokenizer, is_word


class Reading(NamedTuple):
    """How a text encoder reads a caption: `read` of its `tokens` (start and end not counted), the `unknown` ones as if
    all were the same. `known` counts the others, marks left out."""

    tokens: int
    read: int
    unknown: Sequence[str] = ()
    known: int = 1

    @property
    def cut(self) -> bool:
        """Whether its end is not read."""
        return self.read < self.tokens

    @property
    def blank(self) -> bool:
        """Whether it has words, and none of them is known."""
        return bool(self.unknown) and not self.known


class TextEncoder(nn.Module, ABC):
    """Captions -> Cond. The unconditional is the encoding of "".

    `context_dim` and `pooled_dim` (None: no pooled vector) are the widths of what it gives, `trainable` whether it
    learns with the denoiser. What a caption becomes does not depend on the other captions of the batch.
    """

    def __init__(self, *, context_dim: int, pooled_dim: int | None, trainable: bool) -> None:
        super().__init__()
        self.context_dim, self.pooled_dim, self.trainable = context_dim, pooled_dim, trainable

    def forward(self, captions: Sequence[str]) -> Cond:
        """B captions -> context (B, L, context_dim), mask (B, L), pooled (B, pooled_dim) or None."""
        # each distinct caption is encoded once: a batch of class names or dropped captions holds few
        place = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        cond = self.encode(list(place))
        if len(place) == len(captions):
            return cond
        rows = torch.tensor([place[caption] for caption in captions], device=cond.context.device)
        return cond.select(rows)

    @abstractmethod
    def encode(self, captions: list[str]) -> Cond:
        """What `forward` gives, for captions that are all different."""

    @abstractmethod
    def truncated(self, captions: Iterable[str]) -> int:
        """How many of the captions are too long to be read whole."""

    def check(self, captions: Iterable[str]) -> None:
        """Raises ValueError where a caption is one that this encoder cannot take; most take all."""

    def readings(self, captions: Sequence[str]) -> list[Reading]:
        """How each caption is read. An encoder that does not say tells only whether it cuts: of two tokens one."""
        return [Reading(2, 2 - self.truncated([caption])) for caption in captions]


class TextConfig(Checked, ABC):
    """The config of a text encoder: a frozen dataclass with a `kind`. One that learns makes its encoder of `vocabulary`
    of the captions (`build`), one that is frozen of a loaded model."""


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of states (B, L, D) over the real tokens of mask (B, L) -> (B, D); zero where there is none."""
    weight = mask.to(states.dtype)[..., None]
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Scratch(TextConfig):
    """Config of latent diffusion's own design: a word vocabulary and a transformer trained with the denoiser.

    `rule`: how the captions of a new vocabulary are split (`tokenizer.split`); one that is stored keeps its own.
    """

    kind: Literal["scratch"] = "scratch"
    width: int = 192
    depth: int = 2
    heads: int = 4
    length: int = 32
    max_words: int = 8192
    rule: int = RULE
    limits: ClassVar = {"width": "(0, inf)", "depth": "(0, inf)", "heads": "(0, inf)", "length": "[2, inf)",
                        "max_words": "(0, inf)", "rule": "[1, 2]"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be divisible by heads ({self.heads})")

    def vocabulary(self, captions: Iterable[str]) -> str:
        """The vocabulary of the training captions, as the JSON text that `build` takes and a run stores."""
        return WordTokenizer.build(captions, self.length, self.max_words, self.rule).to_json()

    def build(self, vocabulary: str) -> ScratchTextEncoder:
        """The encoder for a stored vocabulary; ValueError where that was made for another length."""
        tokenizer = WordTokenizer.from_json(vocabulary)
        if tokenizer.length != self.length:
            raise ValueError(f"the vocabulary is for {tokenizer.length} tokens, the config asks for {self.length}")
        return ScratchTextEncoder(self, tokenizer)


class ScratchLayer(nn.Module):
    """x + attention(norm x), then + mlp(norm x); attention adds a learned bias per head and distance (T5's).

    Head h begins on one neighbour: the next word, the one before, the second next ... (bias 0 there, falling by 2 a
    word to -5). Which words belong together ("red circle above a blue square") is then heard from the first steps.
    """

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads)
        self.norm_2, self.mlp = nn.LayerNorm(width), FeedForward(width, 4 * width)
        zero(self.attention.out)
        zero(self.mlp.out)
        place = torch.arange(length)
        self.register_buffer("distance", place - place[:, None] + length - 1, persistent=False)  # an index into bias
        neighbour = torch.tensor([(-1) ** h * (1 + h // 2) for h in range(heads)])[:, None]
        self.bias = nn.Parameter(-2.0 * (torch.arange(1 - length, length) - neighbour).abs().clamp(max=2.5))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, width), mask (B, 1, 1, L) -> (B, L, width)."""
        bias = self.bias[:, self.get_buffer("distance")].masked_fill(~mask, -torch.inf)
        x = x + self.attention(self.norm_1(x), bias)
        y: Tensor = x + self.mlp(self.norm_2(x))
        return y


class Taught(Protocol):
    """`words` learned upon a text encoder that stays as it is, and their `rows` (W, width); at strength 0 unknown."""

    words: tuple[str, ...]
    rows: Tensor
    strength: float


class ScratchTextEncoder(TextEncoder):
    """Words -> embeddings -> bidirectional transformer; pooled = projection of the normalised mean over real tokens.

    (Rombach et al. 2022, sec. 4.3.1: a transformer over tokenised captions, learned with the denoiser.)
    Words begin as random vectors of unit variance and layers as the identity: from the first step the denoiser reads
    distinct words at full strength. With the usual small embeddings, short runs end before captions are heard.
    """

    def __init__(self, config: Scratch, tokenizer: WordTokenizer) -> None:
        super().__init__(context_dim=config.width, pooled_dim=config.width, trainable=True)
        self.own = tokenizer
        self.taught: list[Taught] = []  # no parameters of this module
        self.words = nn.Embedding(len(tokenizer.vocabulary), config.width)
        self.positions = nn.Parameter(torch.empty(config.length, config.width))
        shape = config.width, config.heads, config.length
        self.layers = nn.ModuleList(ScratchLayer(*shape) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.pool = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.width))
        nn.init.normal_(self.words.weight)
        nn.init.normal_(self.positions, std=0.1)

    @property
    def tokenizer(self) -> WordTokenizer:
        """Of its own words and, after them, those that were taught."""
        return self.own.with_words(tuple(word for part in self._at_work() for word in part.words))

    def table(self) -> Tensor:
        """The rows of the tokenizer's words (V, width), where this encoder is: taught ones do not move with it."""
        more = [part.rows.to(self.words.weight) for part in self._at_work()]
        return torch.cat([self.words.weight, *more]) if more else self.words.weight

    def teach(self, part: Taught) -> None:
        """Append words; ValueError for one that is known."""
        self.check_new(part.words)
        self.taught.append(part)

    def check_new(self, words: Iterable[str]) -> None:
        """ValueError for a word that is known, or was taught, at work or not."""
        known = {*self.own.vocabulary, *(word for part in self.taught for word in part.words)}
        if again := [word for word in words if word in known]:
            raise ValueError(f"words: {again[0]!r} is known to the text encoder already")

    def _at_work(self) -> list[Taught]:
        return [part for part in self.taught if part.strength]

    def encode(self, captions: list[str]) -> Cond:
        """See `TextEncoder.encode`."""
        numbers, mask = (tensor.to(self.positions.device) for tensor in self.tokenizer(captions))
        x = embedding(numbers, self.table()) + self.positions
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        context = self.norm(x)
        return Cond(context, mask, self.pool(masked_mean(context, mask)))

    def truncated(self, captions: Iterable[str]) -> int:
        """See `TextEncoder.truncated`."""
        return self.tokenizer.truncated(captions)

    def readings(self, captions: Sequence[str]) -> list[Reading]:
        """See `TextEncoder.readings`; tokens are words."""
        most, found = self.tokenizer.length - 2, []
        for caption in captions:
            words, unknown = self.tokenizer.words(caption), self.tokenizer.unknown(caption)
            known = sum(map(is_word, words)) - sum(map(is_word, unknown))
            found.append(Reading(len(words), min(len(words), most), unknown, known))
        return found


@dataclass(frozen=True, kw_only=True)
class Label(TextConfig):
    """Config for closed sets of captions: every distinct caption is a class with an embedding, "" the null class.

    DiT's class conditioning is `width` = the backbone's and `pooled_projection = false` there.
    """

    kind: Literal["label"] = "label"
    width: int = 256
    max_classes: int = 10_000
    limits: ClassVar = {"width": "(0, inf)", "max_classes": "(0, inf)"}

    def vocabulary(self, captions: Iterable[str]) -> str:
        """The distinct captions in alphabetical order, as the JSON text that `build` takes and a run stores."""
        classes = sorted(set(captions) - {""})
        if len(classes) > self.max_classes:
            raise ValueError(f"{len(classes)} distinct captions, more than max_classes ({self.max_classes}): labels "
                             "are for closed sets, use a `scratch` or `huggingface` text encoder")
        return json.dumps({"classes": classes}, ensure_ascii=False, indent=0)

    def build(self, vocabulary: str) -> LabelEncoder:
        """The encoder for a stored vocabulary; ValueError for anything else."""
        stored = json.loads(vocabulary)
        if not isinstance(stored, dict) or set(stored) != {"classes"}:
            raise ValueError("not a set of labels: expected an object with `classes`")
        return LabelEncoder(self, tuple(stored["classes"]))


class LabelEncoder(TextEncoder):
    """One learned vector per class, given as the pooled vector and as a context of one token; row 0 is the null."""

    def __init__(self, config: Label, classes: tuple[str, ...]) -> None:
        super().__init__(context_dim=config.width, pooled_dim=config.width, trainable=True)
        self.classes = classes
        self.rows = {caption: row for row, caption in enumerate(("", *classes))}
        self.embedding = nn.Embedding(len(self.rows), config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def encode(self, captions: list[str]) -> Cond:
        """See `TextEncoder.encode`; ValueError for a caption that is no class."""
        self.check(captions)
        rows = torch.tensor([self.rows[caption] for caption in captions], device=self.embedding.weight.device)
        pooled = self.embedding(rows)
        return Cond(pooled[:, None], torch.ones_like(rows, dtype=torch.bool)[:, None], pooled)

    def truncated(self, captions: Iterable[str]) -> int:
        """Labels are never cut."""
        return 0

    def readings(self, captions: Sequence[str]) -> list[Reading]:
        """See `TextEncoder.readings`: each is one token."""
        self.check(captions)
        return [Reading(1, 1)] * len(captions)

    def check(self, captions: Iterable[str]) -> None:
        """ValueError for a caption that is no class."""
        for caption in captions:
            if caption not in self.rows:
                known = ", ".join(map(repr, self.classes[:5])) + (", ..." if len(self.classes) > 5 else "")
                raise ValueError(f"{caption!r} is not one of the {len(self.classes)} captions trained on: {known}")


TEXT_ENCODERS = (Scratch, Label)
