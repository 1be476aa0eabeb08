"""New words upon a base: which are learned, which cannot be, and what is said where two runs learned the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from packs import retold

from training.data.latents import Latents
from training.models.assembly import load_pipeline
from training.models.vocabulary import COUNTED, count_captions
from training.shards.reading import ShardSet

SHORT = [*tiny.SHORT, "--max-steps", "2", "--sample.steps", "1"]
LORA = ["--config", "lora", "--adapter.rank", "2", "--adapter.targets", "*.qkv"]
INVERSION = ["--config", "textual-inversion"]


@pytest.fixture(scope="module")
def told(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of which some captions have a "blicket", one mark and one word of letters and vowel signs that the base
    does not know."""
    folder = tmp_path_factory.mktemp("told") / "latents"
    return retold(latents, folder, lambda caption: f"{caption} ' किताब" + " blicket" * ("red" in caption))


def train(base: Path, latents: Path, run: Path, *words: object) -> int:
    return tiny.call("train_denoiser", "--base", base, "--latents", latents, "--output", run, *words, *SHORT)


def refused(base: Path, latents: Path, *words: object) -> tuple[int, str, str]:
    problem = tiny.refused("train_denoiser", "--base", base, "--latents", latents, *words, *SHORT, "--dry-run")
    return problem.code, problem.what, problem.hint


class Runs(NamedTuple):
    """Of a blicket: two of that word alone, one of it beside a LoRA; and one of a LoRA alone."""

    one: Path
    two: Path
    joined: Path
    lora: Path


@pytest.fixture(scope="module")
def runs(denoiser: Path, told: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root, word = tmp_path_factory.mktemp("runs"), ("--adapter.words", "blicket")
    found = Runs(*(root / name for name in Runs._fields))
    for run, words in zip(found, ([*INVERSION, *word], [*INVERSION, *word], [*LORA, *word], LORA), strict=True):
        assert train(denoiser, told, run, *words) == 0
    return found


def test_a_word_that_two_runs_learned_is_named_with_both(runs: Runs, denoiser: Path, tmp_path: Path) -> None:
    """Whichever comes first, at any weight; one of them draws, and so does each beside another run."""
    draw = ("generate", "--model", denoiser, "--prompt", "a blicket", "--steps", 1, "--output", tmp_path / "drawn")
    for first, second in ((runs.one, runs.two), (runs.joined, f"{runs.one}:0")):
        problem = tiny.refused(*draw, "--adapter", first, "--adapter", second)
        assert problem.what == f"{first} and {str(second).removesuffix(':0')} have both learned the word 'blicket'"
        assert problem.code == 4 and problem.hint.startswith("give one of them") and "--adapter.words" in problem.hint
    assert "both learned" in tiny.refused(*draw[:1], "--model", runs.one, *draw[3:], "--adapter", runs.two).what
    assert tiny.call(*draw, "--adapter", runs.one, "--adapter", runs.lora) == 0


def test_the_weight_of_words_alone_is_told_to_have_no_effect(runs: Runs, denoiser: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    for weight in (0.5, 0.0, 1.0):
        for run in (runs.one, runs.joined, runs.lora):
            load_pipeline(denoiser, "cpu", adapters=[(run, weight)])
            said = f"{run} is of new words alone, whose weight has no effect but 0: 0.5 draws as 1 does"
            assert (said in capsys.readouterr().err) == (run == runs.one and weight == 0.5)


@pytest.mark.parametrize("counted", ["not", "some", "all"])
def test_words_that_no_caption_has_are_told_or_refused(counted: str, told: Path, denoiser: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the captions were counted, as far as there was room, or are read."""
    count_captions(Latents(ShardSet(told)))
    if counted != "all":
        found = json.loads((told / COUNTED).read_text())
        known = {**found, "words": found["words"][:4], "all_words": False, "captions": None}
        (told / COUNTED).write_text(json.dumps(known)) if counted == "some" else (told / COUNTED).unlink()
    for kind in (INVERSION, LORA):
        code, what, hint = refused(denoiser, told, *kind, "--adapter.words", "wug,dax")
        assert what == "no caption has a word that is to be learned ('wug', 'dax')" and code == 3
        assert "--adapter.words" in hint and "--new-words" in hint
    said = "no caption has 1 of the 2 words of adapter.words ('wug'): nothing teaches them"
    dry = ("--base", denoiser, "--latents", told, *LORA, *SHORT, "--dry-run")
    for words in ("wug,blicket", "blicket"):
        capsys.readouterr()
        assert tiny.call("train_denoiser", *dry, "--adapter.words", words) == 0
        assert (f"warning: {said}" in capsys.readouterr().err) == words.startswith("wug")


def test_new_words_are_those_with_letters_and_the_marks_are_left(told: Path, denoiser: Path, tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    """A mark that is named is learned as any word; what is said of the rest is true."""
    dry = ("--base", denoiser, "--latents", told, *LORA, *SHORT, "--dry-run")
    assert tiny.call("train_denoiser", *dry) == 0
    said = capsys.readouterr().err
    assert "has no row for 3 words" in said and "read as unknown; --new-words learns those that are no marks" in said
    assert tiny.call("train_denoiser", *dry, "--new-words") == 0
    said = capsys.readouterr().err
    assert "--new-words: 2 words of the captions are learned: 'किताब', 'blicket'" in said
    assert '''has no row for 1 words of the captions ("'")''' in said
    assert "read as unknown; --adapter.words learns those that it names" in said
    run = tmp_path / "run"
    assert train(denoiser, told, run, *LORA, "--new-words", "--adapter.words", '''["'"]''') == 0
    assert "read as unknown" not in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["adapter"]["words"] == ["'", "किताब", "blicket"]


def test_a_training_of_all_weights_says_where_there_is_no_room(told: Path, denoiser: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--latents", told, *tiny.DENOISER, "--init-from", denoiser, "--new-words", "--dry-run", "--text.max_words")
    for most in (1, 8192):
        capsys.readouterr()
        assert tiny.call("train_denoiser", *words, most) == 0
        assert ("read as unknown; raise text.max_words" in capsys.readouterr().err) == (most == 1)


def test_textual_inversion_without_words_says_how_they_are_named(told: Path, latents: Path, denoiser: Path) -> None:
    """And where the captions have none that is new."""
    _, what, hint = refused(denoiser, told, *INVERSION)
    assert what == "textual-inversion learns new words, and none is named"
    assert "--adapter.words" in hint and "--new-words" in hint
    _, what, hint = refused(denoiser, latents, *INVERSION, "--new-words")
    assert "--new-words finds none in the captions" in what and "write the new word into the captions" in hint
    dry = ("--base", denoiser, "--latents", told, *INVERSION, *SHORT, "--dry-run")
    assert tiny.call("train_denoiser", *dry, "--new-words") == 0


PRIOR = ("--prior.weight", 1, "--prior.count", 2, "--dry-run")


@pytest.mark.parametrize("how", ["--base", "--init-from"])
def test_what_the_base_does_not_know_of_prior_captions_is_told(how: str, told: Path, denoiser: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Without the words that an adapter is to learn: it draws them as it is."""
    kind = [*LORA, "--adapter.words", "blicket", *SHORT] if how == "--base" else [*tiny.DENOISER]
    words = (how, denoiser, "--latents", told, *kind, *PRIOR, "--prior.captions")
    for caption, said in (
        ("a zebra blicket", "note: words of 'a zebra blicket' that the model does not know: zebra, blicket"),
        ("zebra", "warning: the model knows no word of 'zebra' (zebra)"), ("a red circle", ""),
    ):  # fmt: skip
        capsys.readouterr()
        assert tiny.call("train_denoiser", *words, caption) == 0
        heard = capsys.readouterr().err
        assert said in heard and ("zebra" in heard) == bool(said)
