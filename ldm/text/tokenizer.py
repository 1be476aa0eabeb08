"""A word tokenizer whose vocabulary comes from the training captions."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PAD, UNKNOWN, START, END = range(4)
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
# Chinese and Japanese are written without spaces, so there every character is a word; so is every punctuation mark
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]")


def split(caption: str) -> list[str]:
    """Lower-cased words and punctuation marks: "A T-shirt!" -> ["a", "t", "-", "shirt", "!"]."""
    return WORD.findall(caption.lower())


@dataclass(frozen=True)
class WordTokenizer:
    """Captions to `length` token numbers: <start>, words, <end>, padding; "" is <start> <end>.

    `vocabulary` begins with <pad>, <unk>, <start>, <end>. ValueError for another beginning, repeats, length < 2.
    """

    vocabulary: tuple[str, ...]
    length: int

    def __post_init__(self) -> None:
        if self.vocabulary[:4] != SPECIAL or len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError(f"a vocabulary begins with {' '.join(SPECIAL)} and has no word twice")
        if self.length < 2:
            raise ValueError(f"length must be at least 2, for {SPECIAL[START]} and {SPECIAL[END]}, not {self.length}")

    @classmethod
    def build(cls, captions: Iterable[str], length: int, max_words: int) -> WordTokenizer:
        """The `max_words` most frequent words, equally frequent ones by alphabet: the captions' order is nothing."""
        counts = Counter(word for caption in captions for word in split(caption))
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls((*SPECIAL, *words[:max_words]), length)

    @classmethod
    def from_json(cls, text: str) -> WordTokenizer:
        """The tokenizer `to_json` wrote; ValueError for anything else."""
        stored = json.loads(text)
        if not isinstance(stored, dict) or set(stored) != {"length", "vocabulary"}:
            raise ValueError("not a word tokenizer: expected an object with `length` and `vocabulary`")
        return cls(tuple(stored["vocabulary"]), int(stored["length"]))

    def to_json(self) -> str:
        """All of the tokenizer as one JSON object."""
        return json.dumps({"length": self.length, "vocabulary": self.vocabulary}, ensure_ascii=False, indent=0)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.vocabulary)}

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> token numbers (B, length) int64, mask (B, length), True = real; long ones lose their end."""
        words = [[self._numbers.get(word, UNKNOWN) for word in split(caption)] for caption in captions]
        rows = [[START, *row[: self.length - 2], END] for row in words]
        numbers = torch.tensor([row + [PAD] * (self.length - len(row)) for row in rows], dtype=torch.long)
        numbers = numbers.view(len(rows), self.length)
        return numbers, numbers != PAD

    def truncated(self, captions: Iterable[str]) -> int:
        """How many of the captions are too long to be read whole."""
        return sum(len(split(caption)) > self.length - 2 for caption in captions)

    def unknown(self, caption: str) -> list[str]:
        """The words of a caption that the vocabulary lacks, in order."""
        return [word for word in split(caption) if word not in self._numbers]
