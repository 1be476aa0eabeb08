"""A vocabulary from what was counted beside the latents is that of the captions, and is never of other ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ldm.text import Label, Scratch
from ldm.text.tokenizer import SPECIAL, WordTokenizer
from training.data.latents import Latents
from training.errors import UserError
from training.models import vocabulary as vocabularies
from training.models.vocabulary import COUNTED, added, captions, count_captions, grown, vocabulary
from training.shards.reading import ShardSet
from training.shards.remote import open_address

CONFIGS = [Scratch(), Scratch(max_words=5, length=9), Label(max_classes=10_000)]


@pytest.fixture
def data(latents: Path, tmp_path: Path) -> Latents:
    """Latents of one's own, to be spoilt."""
    shutil.copytree(latents, tmp_path / "latents")
    return Latents(ShardSet(tmp_path / "latents"))


def unread(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples whose captions are read from here on."""
    kept, read = Latents.captions, []

    def noted(self: Latents, index: int) -> list[str]:
        read.append(index)
        return kept(self, index)

    monkeypatch.setattr(Latents, "captions", noted)
    return read


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_counted_when_encoded(config: Scratch | Label, data: Latents, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config.vocabulary(captions(data))
    assert len(json.loads(wanted).popitem()[1]) > 4
    read = unread(monkeypatch)
    assert vocabulary(config, data) == wanted and not read
    (data.shards.directory / COUNTED).unlink()  # as an older version leaves its latents
    assert vocabulary(config, data) == wanted and len(read) == len(data)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_what_asks_for_more_than_was_stored_reads(
    config: Scratch | Label, data: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabularies, "WORDS", 4)
    monkeypatch.setattr(vocabularies, "LABELS", 4)
    count_captions(data)
    stored = json.loads((data.shards.directory / COUNTED).read_text())
    assert len(stored["words"]) == 4 and stored["captions"] is None
    read = unread(monkeypatch)
    assert vocabulary(config, data) == config.vocabulary(captions(data)) and len(read) == 2 * len(data)
    assert (
        isinstance(config, Label)
        or json.loads(vocabulary(Scratch(max_words=4), data))["vocabulary"][4:] == (stored["words"])
    )


def test_words_counted_by_another_rule_are_not_taken(data: Latents, monkeypatch: pytest.MonkeyPatch) -> None:
    path, old, new = data.shards.directory / COUNTED, Scratch(rule=1), Scratch()
    for unfit, fit in ((old, new), (new, old)):
        wanted = [config.vocabulary(captions(data)) for config in (unfit, fit)]
        with monkeypatch.context() as patch:
            read = unread(patch)
            assert vocabulary(fit, data) == wanted[1] and not read
            assert vocabulary(unfit, data) == wanted[0] and len(read) == len(data)
        told = json.loads(path.read_text())
        told.pop("rule", None)
        path.write_text(json.dumps(told))  # as an older version counts, by rule 1


def test_a_count_of_another_index_is_not_taken(data: Latents, monkeypatch: pytest.MonkeyPatch) -> None:
    index = data.shards.directory / "index.json"
    index.write_text(index.read_text() + "\n")
    read = unread(monkeypatch)
    vocabulary(Scratch(), data)
    assert len(read) == len(data)
    for text in ("[]", "{", '{"words": [1]}', '{"words": [], "captions": "a"}', "[" * 200_000):
        (data.shards.directory / COUNTED).write_text(text)
        with pytest.raises(UserError, match=COUNTED) as caught:
            vocabulary(Scratch(), data)
        assert caught.value.code == 3


@pytest.mark.parametrize("counted", [True, False])
def test_at_an_address(counted: bool, data: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = vocabulary(Scratch(), data)
    if not counted:
        (data.shards.directory / COUNTED).unlink()
    place = f"memory://vocabulary-{counted}"
    MemoryFileSystem().put(f"{data.shards.directory}/", f"{place}/", recursive=True)
    far = Latents(ShardSet(open_address(place, str(tmp_path / "cache"))))
    read = unread(monkeypatch)
    assert vocabulary(Scratch(), far) == wanted and len(read) == (0 if counted else len(data))


def test_a_vocabulary_grows_after_its_end(data: Latents) -> None:
    """Of words the most frequent of those it lacks, as many as there is room for, split by its own rule."""
    every = json.loads(vocabulary(Scratch(), data))["vocabulary"][4:]
    some = ["zebra", every[1], every[4]]
    lacked = [word for word in every if word not in some]
    for rule in (1, 2):
        stored = WordTokenizer((*SPECIAL, *some), 32, rule).to_json()
        longer = grown(Scratch(), data, stored)
        told = json.loads(longer)
        assert told["vocabulary"] == [*SPECIAL, *some, *lacked] and told.get("rule", 1) == rule
        assert added(stored, longer) == lacked and added(stored, stored) == [] and added(longer, stored) is None
        assert added(stored, grown(Scratch(max_words=5), data, stored)) == lacked[:2]
        assert grown(Scratch(max_words=2), data, stored) == stored
        assert added(stored, longer.replace('"length": 32', '"length": 31')) is None
    other = WordTokenizer((*SPECIAL, *reversed(some)), 32, rule).to_json()
    assert added(other, longer) is None


def test_labels_grow_after_their_end(data: Latents) -> None:
    config, every = Label(), sorted(set(captions(data)) - {""})
    stored = json.dumps({"classes": ["zebra", every[1]]}, ensure_ascii=False, indent=0)
    longer = grown(config, data, stored)
    assert json.loads(longer) == {"classes": ["zebra", every[1], every[0], *every[2:]]}
    assert added(stored, longer) == [every[0], *every[2:]] and added("{}", longer) is None
    assert config.build(longer).rows["zebra"] == 1
