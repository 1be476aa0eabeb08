"""A word tokenizer whose vocabulary comes from the training captions.

A caption is split by a rule that has a number, which is stored with the vocabulary: its words are those of that rule.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from unicodedata import category, normalize

import torch
from torch import Tensor

PAD, UNKNOWN, START, END = range(4)
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
RULE = 2  # of new vocabularies
# Chinese and Japanese are written without spaces, so there every character is a word; so is every punctuation mark
ALONE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
ASCII = re.compile(r"[^\W_]+|[^\w\s]")  # what rule 2 comes to where there are no marks and nothing invisible
FIRST = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+|[^\w\s]")


def split(caption: str, rule: int = RULE) -> list[str]:
    """Lower-cased words and punctuation marks: "A T-shirt!" -> ["a", "t", "-", "shirt", "!"].

    Rule 2 takes one spelling for all that reads the same (NFKC, case folded), keeps vowel signs and accents with their
    letters, drops what has no width, and splits words at `_`. Rule 1 lower-cases, and every mark is a word.
    """
    if rule == 1:
        return FIRST.findall(caption.lower())
    if caption.isascii():  # without the table of all characters, which takes a second
        return ASCII.findall(caption.lower())
    words, invisible = _second()
    return words.findall(normalize("NFKC", invisible.sub("", normalize("NFKC", caption).casefold())))


def is_word(part: str) -> bool:
    """Whether a part of a split caption is a word and no punctuation mark; vowel signs belong to words."""
    return any(map(str.isalnum, part))


@cache
def _second() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Rule 2: words, and the characters to drop first: formats (Cf) and the marks that select or join a glyph."""
    known = [(chr(code), category(chr(code))) for code in range(0x110000)]
    invisible = "".join(c for c, kind in known if kind == "Cf") + "\u034f\ufe00-\ufe0f\U000e0100-\U000e01ef"
    marks = "".join(c for c, kind in known if kind in ("Mn", "Mc", "Me"))
    return re.compile(rf"[{ALONE}]|(?:[^\W_{ALONE}]|[{marks}])+|[^\w\s]"), re.compile(f"[{invisible}]")


@dataclass(frozen=True)
class WordTokenizer:
    """Captions to `length` token numbers: <start>, words, <end>, padding; "" is <start> <end>.

    `vocabulary` begins with <pad>, <unk>, <start>, <end>. ValueError for another beginning, repeats, length < 2, and a
    rule (`split`) that is not known.
    """

    vocabulary: tuple[str, ...]
    length: int
    rule: int = RULE

    def __post_init__(self) -> None:
        if self.vocabulary[:4] != SPECIAL or len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError(f"a vocabulary begins with {' '.join(SPECIAL)} and has no word twice")
        if self.length < 2:
            raise ValueError(f"length must be at least 2, for {SPECIAL[START]} and {SPECIAL[END]}, not {self.length}")
        if self.rule not in (1, 2):
            raise ValueError(f"captions are split by rule 1 or 2, not {self.rule}: made by a later version?")

    @classmethod
    def build(cls, captions: Iterable[str], length: int, max_words: int, rule: int = RULE) -> WordTokenizer:
        """The `max_words` most frequent words, equally frequent ones by alphabet: the captions' order is nothing."""
        counts = Counter(word for caption in captions for word in split(caption, rule))
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls((*SPECIAL, *words[:max_words]), length, rule)

    @classmethod
    def from_json(cls, text: str) -> WordTokenizer:
        """The tokenizer `to_json` wrote; ValueError for anything else."""
        stored = json.loads(text)
        if not isinstance(stored, dict) or set(stored) - {"rule"} != {"length", "vocabulary"}:
            raise ValueError("not a word tokenizer: expected an object with `length` and `vocabulary`")
        return cls(tuple(stored["vocabulary"]), int(stored["length"]), stored.get("rule", 1))

    def to_json(self) -> str:
        """All of the tokenizer as one JSON object; rule 1, which came first, is not named, so that old hashes hold."""
        rule = {} if self.rule == 1 else {"rule": self.rule}
        return json.dumps({**rule, "length": self.length, "vocabulary": self.vocabulary}, ensure_ascii=False, indent=0)

    def with_words(self, words: tuple[str, ...]) -> WordTokenizer:
        """One that knows these words too: appended, so that all others keep their numbers."""
        return _longer(self, words) if words else self

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.vocabulary)}

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> token numbers (B, length) int64, mask (B, length), True = real; long ones lose their end."""
        words = [[self._numbers.get(word, UNKNOWN) for word in split(caption, self.rule)] for caption in captions]
        rows = [[START, *row[: self.length - 2], END] for row in words]
        numbers = torch.tensor([row + [PAD] * (self.length - len(row)) for row in rows], dtype=torch.long)
        numbers = numbers.view(len(rows), self.length)
        return numbers, numbers != PAD

    def words(self, caption: str) -> list[str]:
        """A caption split by this vocabulary's rule."""
        return split(caption, self.rule)

    def truncated(self, captions: Iterable[str]) -> int:
        """How many of the captions are too long to be read whole."""
        return sum(len(self.words(caption)) > self.length - 2 for caption in captions)

    def unknown(self, caption: str) -> list[str]:
        """The words of a caption that the vocabulary lacks, in order."""
        return [word for word in self.words(caption) if word not in self._numbers]


@lru_cache(8)  # asked for at every reading, and its numbers are counted once
def _longer(tokenizer: WordTokenizer, words: tuple[str, ...]) -> WordTokenizer:
    return replace(tokenizer, vocabulary=(*tokenizer.vocabulary, *words))
