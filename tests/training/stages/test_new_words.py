"""New words upon a base: which are learned, which cannot be, and what is said where two runs learned the same one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from packs import retold

from training.models.assembly import load_pipeline

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
