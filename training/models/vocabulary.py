"""What a text encoder that learns begins with: the words or labels of the captions, counted once beside the latents."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ldm.text import Label, Scratch
from ldm.text.tokenizer import RULE, SPECIAL, WordTokenizer, split
from training.data.latents import Latents
from training.errors import DATA, Unreachable, UserError
from training.files import file_sha256, write_json
from training.guarding import LARGEST_JSON, leads_out, read_json
from training.progress import Progress
from training.shards.index import INDEX
from training.shards.streaming import StreamedShards

# {index_sha256, rule, words: most frequent first, all_words, captions: distinct or null, lengths: captions of n words}
COUNTED = "captions.json"
LONGEST = 4096  # words of a caption that are told apart in `lengths`
WORDS, LABELS = 1 << 16, 10_000  # most that are stored; what asks for more reads the captions themselves


def captions(dataset: Latents) -> Iterator[str]:
    """Every caption of every sample. Raises UserError (code 3) for a stream, which has no end."""
    if isinstance(dataset.shards, StreamedShards):
        hint = "encode again with this version, which counts them, or train without --stream"
        raise UserError(f"the captions of a stream are counted beforehand ({COUNTED} lacks them)", hint=hint, code=DATA)
    return (caption for i in range(len(dataset)) for caption in dataset.captions(i))


def count_captions(dataset: Latents) -> None:
    """Write `COUNTED` beside latents: reading ten million captions takes minutes, and every process of a run would."""
    distinct: set[str] = set()
    lengths: Counter[int] = Counter()

    def noted() -> Iterator[str]:
        for caption in Progress("counting captions", thing="caption").each(captions(dataset), lambda caption: 1):
            if len(distinct) <= LABELS:
                distinct.add(caption)
            lengths[min(len(split(caption)), LONGEST)] += 1
            yield caption

    words = WordTokenizer.build(noted(), 2, WORDS + 1).vocabulary[len(SPECIAL) :]
    few = sorted(distinct) if len(distinct) <= LABELS else None
    folder = dataset.shards.directory
    found: dict[str, Any] = {"words": words[:WORDS], "all_words": len(words) <= WORDS, "captions": few}
    if len(json.dumps(found, ensure_ascii=False).encode()) > LARGEST_JSON // 2:  # more than is read in one go
        found = {"words": [], "all_words": False, "captions": None}
    found["lengths"] = [lengths[n] for n in range(max(lengths, default=-1) + 1)]
    write_json(folder / COUNTED, {"index_sha256": file_sha256(folder / INDEX), "rule": RULE, **found})


def vocabulary(config: Scratch | Label, dataset: Latents) -> str:
    """What `config.vocabulary` gives for all captions of the training split, these read only where they must be.

    Raises UserError (code 3) where what was counted is damaged.
    """
    counts = counted(dataset)
    if isinstance(config, Scratch):
        words = counts.get("words", [])
        if counts.get("rule", 1) != config.rule:  # the words of another rule, which was the only one once
            return config.vocabulary(captions(dataset))
        if counts.get("all_words") or len(words) >= config.max_words:
            return WordTokenizer((*SPECIAL, *words[: config.max_words]), config.length, config.rule).to_json()
    elif isinstance(config, Label) and counts.get("captions") is not None:
        return config.vocabulary(counts["captions"])
    return config.vocabulary(captions(dataset))


def grown(config: Scratch | Label, dataset: Latents, stored: str) -> str:
    """A stored vocabulary with the words or labels of the captions that it lacks after its own, whose rows so stay: the
    most frequent of them, as many as `max_words` leaves room for."""
    if isinstance(config, Label):
        known = json.loads(stored)["classes"]
        own = json.loads(vocabulary(config, dataset))["classes"]
        return json.dumps({"classes": [*known, *(label for label in own if label not in set(known))]},
                          ensure_ascii=False, indent=0)
    old = WordTokenizer.from_json(stored)
    own = WordTokenizer.from_json(vocabulary(replace(config, rule=old.rule), dataset)).vocabulary
    new = [word for word in own if word not in set(old.vocabulary)]
    return old.with_words(tuple(new[: max(0, config.max_words + len(SPECIAL) - len(old.vocabulary))])).to_json()


def added(stored: str, longer: str) -> list[str] | None:
    """The words or labels that one vocabulary has after those of another; None where it does not begin with them."""
    before, after = json.loads(stored), json.loads(longer)
    name = "classes" if "classes" in before else "vocabulary"
    if name not in after or after != {**before, name: after[name]}:
        return None
    count = len(before[name])
    return after[name][count:] if after[name][:count] == before[name] else None


def counted(dataset: Latents) -> dict[str, Any]:
    """What `count_captions` wrote; empty where it did not (older latents), or for another index than this one."""
    shards = dataset.shards
    if shards.remote:
        with suppress(Unreachable):
            shards.remote.bring([COUNTED])
    path = shards.directory / COUNTED
    if shards.split != "train" or not path.is_file() or leads_out(path):
        return {}
    found = read_json(path, code=DATA)
    lists = [found.get("words"), found.get("captions") or []] if isinstance(found, dict) else [None]
    sound = all(isinstance(part, list) and all(isinstance(text, str) for text in part) for part in lists)
    if not sound or not all(type(count) is int for count in found.get("lengths", [])):
        raise UserError(f"{path}: not a count of captions", hint="delete it: they are then read one by one", code=DATA)
    return dict(found) if found.get("index_sha256") == file_sha256(shards.directory / INDEX) else {}
