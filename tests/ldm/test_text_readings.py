"""How captions are read, told beside reading them: tokens, the cut, and the words that are not known."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
import test_text as models

from ldm.text import HuggingFace, Label, Reading, Scratch, TextEncoder


def scratch(length: int = 6) -> TextEncoder:
    config = Scratch(width=16, heads=2, length=length)
    return config.build(config.vocabulary(["a red circle , left", "a blue square ."]))


def test_words_of_a_vocabulary() -> None:
    read = scratch().readings(["", "a red circle, left", "a red-ish circle of a square", "krasny krug.", "; ;", "."])
    assert read[0] == Reading(0, 0, [], 0) and not (read[0].cut or read[0].blank)
    assert read[1] == Reading(5, 4, [], 4) and read[1].cut
    assert read[2] == Reading(8, 4, ["-", "ish", "of"], 5) and read[2].cut and not read[2].blank
    assert read[3] == Reading(3, 3, ["krasny", "krug"], 0) and read[3].blank  # a mark that is known is no word
    assert read[4].blank and not read[5].blank
    told = scratch(length=20).readings(["x" * 5, "a red circle"])
    assert [reading.cut for reading in told] == [False, False]


def test_vowel_signs_are_of_words() -> None:
    config = Scratch(width=16, heads=2)
    (read,) = config.build(config.vocabulary(["लाल किताब"])).readings(["हरी किताब"])
    assert read == Reading(2, 2, ["हरी"], 1) and not read.blank


@pytest.mark.parametrize("name", ["clip", "t5", "bert"])
def test_tokens_of_a_frozen_encoder(name: str) -> None:
    model, tokenizer = models.MODELS[name]()
    encoder = HuggingFace(length=5, lower=True).build(model, tokenizer)
    most = 4 if name == "t5" else 3  # T5 adds an end alone
    captions = ["", "A RED circle", "a red circle of a photo", "a zebra", "zebra okapi"]
    read = encoder.readings(captions)
    assert [(r.tokens, r.read) for r in read] == [(n, min(n, most)) for n in (0, 3, 6, 2, 2)]
    assert [list(r.unknown) for r in read[2:]] == [[], ["zebra"], ["zebra", "okapi"]]
    assert [r.blank for r in read] == [False, False, False, False, True]
    assert sum(r.cut for r in read) == encoder.truncated(captions)


def test_labels_are_read_whole_or_refused() -> None:
    encoder = Label(width=4).build(json.dumps({"classes": ["dog", "cat"]}))
    assert encoder.readings(["cat", ""]) == [Reading(1, 1), Reading(1, 1)]
    with pytest.raises(ValueError, match="'cow' is not one of the 2 captions trained on: 'dog', 'cat'"):
        encoder.readings(["cow"])


def test_an_encoder_that_only_counts_tells_which_are_cut() -> None:
    class Other(type(scratch())):  # type: ignore[misc]
        readings: Any = TextEncoder.readings

        def truncated(self, captions: Iterable[str]) -> int:
            return sum(len(caption) > 3 for caption in captions)

    other = Other(Scratch(width=16, heads=2, length=6), scratch().tokenizer)
    assert [reading.cut for reading in other.readings(["abc", "abcd"])] == [False, True]
