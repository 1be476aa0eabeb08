"""What a training did not use as it was given stands in its run.json: once each, over epochs and resumptions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch

from ldm.text import Scratch
from training.data.latents import Latents
from training.data.samples import Batch
from training.errors import UserError
from training.models.captions_read import CaptionTally, refuse_unread
from training.models.vocabulary import COUNTED, captions, count_captions
from training.runs.folder import record
from training.settings import decoding
from training.settings.without_use import without_use
from training.shards.reading import ShardSet

CUT, UNKNOWN = "captions longer than the text encoder reads", "words that the vocabulary has not, read as unknown"
WITH_UNKNOWN = "captions with words that the vocabulary has not"
REPLACED = "samples that could not be read, another in the place of each"
SMALL, LARGE = ("--text.length", "9", "--text.max_words", "12"), ("--text.length", "64")


def train(latents: Path, run: Path, *words: object) -> dict[str, Any]:
    """The ledger of a run's run.json."""
    assert tiny.call("train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, *words) == 0
    return dict(record(run)["ledger"])


def counts(ledger: dict[str, Any], effect: str) -> dict[str, int]:
    return {kind: entry["count"] for kind, entry in ledger.get(effect, {}).items()}


@pytest.fixture
def own(latents: Path, tmp_path: Path) -> Path:
    """Latents of one's own, to be spoilt."""
    return Path(shutil.copytree(latents, tmp_path / "latents"))


def test_captions_are_counted_beside_the_latents(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count_captions(Latents(ShardSet(own)))
    found = train(own, tmp_path / "run", *SMALL)
    said = capsys.readouterr().err.splitlines()
    text = Scratch(length=9, max_words=12)
    whole = list(captions(Latents(ShardSet(own))))
    encoder = text.build(text.vocabulary(whole))
    words = {word for caption in whole for word in encoder.tokenizer.unknown(caption)}
    assert counts(found, "cut") == {CUT: encoder.truncated(whole)} and encoder.truncated(whole) > 3
    assert counts(found, "replaced") == {UNKNOWN: len(words)} and len(words) > 3
    assert sum(line.startswith(f"warning: cut {encoder.truncated(whole)}: {CUT}") for line in said) == 1
    assert sum(line.startswith("cut ") for line in said) == 1  # at the end
    assert train(own, tmp_path / "whole", *LARGE) == {}


def test_without_a_count_each_sample_is_read_once(own: Path, tmp_path: Path) -> None:
    """Over two epochs, in one go and in two, by one process and two."""
    (own / COUNTED).unlink()
    found = train(own, tmp_path / "run", *SMALL)
    assert 3 < counts(found, "cut")[CUT] <= 96 and 3 < counts(found, "replaced")[WITH_UNKNOWN] <= 96
    run = tmp_path / "parts"
    first = train(own, run, *SMALL, "--max-steps", 1)
    assert 0 < counts(first, "cut")[CUT] <= 32
    for steps in (2, 4, 6):
        again = train(own, run, *SMALL, "--max-steps", steps, "--resume", "auto")
    assert again == found
    words = ("--latents", own, "--output", tmp_path / "two", *tiny.DENOISER, *SMALL)
    assert ranks.start(2, tmp_path, "train_denoiser", *words) == [0, 0], ranks.said(tmp_path)
    assert counts(record(tmp_path / "two")["ledger"], "cut") == counts(found, "cut")


def test_a_sample_replaced_is_counted_once(own: Path, tmp_path: Path) -> None:
    shards = ShardSet(own)
    tar = own / shards.shards[0].name
    data, moments = bytearray(tar.read_bytes()), shards.read_field(0, "moments.npy")
    place = bytes(data).index(moments)
    data[place : place + 6] = b"broken"
    tar.write_bytes(bytes(data))
    whole = train(own, tmp_path / "run")
    assert counts(whole, "replaced") == {REPLACED: 1}
    assert shards.key(0) in whole["replaced"][REPLACED]["first"][0]
    for steps in (3, 6, 9):
        again = train(own, tmp_path / "parts", "--max-steps", steps, "--resume", "auto")
    assert again == whole


def test_settings_without_use_are_named(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", shapes, "--output", tmp_path / "run", *tiny.AUTOENCODER)
    assert tiny.call("train_autoencoder", *words, "--loss.r1_every", "4", "--train.ema_every", "9") == 0
    (entry,) = record(tmp_path / "run")["ledger"]["ignored"].values()
    assert sorted(entry["first"]) == ["loss.r1_every: loss.r1 is 0", "train.ema_every: train.ema_lengths is empty"]
    assert "ignored 2: settings without use here (" in capsys.readouterr().err


def test_what_no_setting_reads() -> None:
    config = decoding.load("autoencoder", "smoke", {"loss.adversarial": "0", "loss.perceptual": "0"})
    given = ["loss.r1", "discriminator.width", "loss.perceptual_net", "loss.kl", "optimizer.lr", "train.batch_size"]
    assert [why.split(":")[0] for why in without_use(config, given)] == given[:3]
    config = decoding.load("autoencoder", "smoke", {"loss.adversarial": "1", "loss.r1": "1", "loss.perceptual": "1"})
    assert without_use(config, [*given, "loss.r1_every"]) == []
    config = decoding.load("denoiser", "smoke", {"optimizer.decay": "constant"})
    assert without_use(config, ["optimizer.final_lr", "backbone.width"]) == [
        "optimizer.final_lr: optimizer.decay is constant"
    ]
    given = ["prior.captions", "prior.target", "prior.weight", "adapter.kin"]
    said = [*(f"{key}: prior.weight is 0" for key in given[:2]), "adapter.kin: adapter.words is empty"]
    assert without_use(decoding.load("denoiser", "smoke", {}), given) == said
    learned = {"prior.weight": "1", "prior.captions": "a dog", "adapter.kind": "lora", "adapter.words": "dax"}
    assert without_use(decoding.load("denoiser", "smoke", learned), given) == []
    config, given = decoding.load("denoiser", "smoke", {"train.tf32": "true"}), ["train.tf32", "train.cudnn_benchmark"]
    assert without_use(config, given, "cpu") == ["train.tf32: the run is on a CPU"]
    assert without_use(config, given, "cuda") == []


def test_a_micro_batch_taken_again_counts_no_more(own: Path) -> None:
    (own / COUNTED).unlink()
    text = Scratch(length=3)
    tally = CaptionTally(text.build(text.vocabulary(["a b c"])), Latents(ShardSet(own)))
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 1]), ["a b", "a b c"])
    for _ in range(2):
        tally.note(batch)
    tally.note(batch._replace(slots=torch.tensor([96, 97])))  # the second epoch
    assert counts(tally.noted.report(), "cut") == {CUT: 2} and not tally.waiting


@pytest.mark.parametrize("counted", [True, False])
def test_captions_of_which_no_word_is_known_are_refused(
    own: Path, denoiser: Path, tmp_path: Path, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--init-from` a run of other captions would train on one caption: <unk> <unk> <unk>."""
    monkeypatch.setattr(Latents, "captions", lambda self, index: ["", "krasny krug"])
    if counted:
        count_captions(Latents(ShardSet(own)))
    else:
        (own / COUNTED).unlink()
    words = ("--latents", own, "--output", tmp_path / "run", *tiny.DENOISER, "--init-from", denoiser)
    problem = tiny.refused("train_denoiser", *words)
    assert problem.code == 3 and "no caption has a word that the text encoder knows" in problem.what
    assert "'krasny krug'" in problem.what and "give --new-words" in problem.hint
    assert tiny.call("train_denoiser", *words, "--new-words", "--max-steps", 1, "--resume", "auto") == 0
    assert tiny.call("train_denoiser", *words[:2], "--output", tmp_path / "fresh", *tiny.DENOISER) == 0


def test_captions_without_words_are_no_fault(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Scratch().build(Scratch().vocabulary(["a red circle"]))
    for texts, refused in (([""], False), (["krug", "a krug"], False), (["krug", ". ."], True)):
        monkeypatch.setattr(Latents, "captions", lambda self, index, texts=texts: texts)
        count_captions(Latents(ShardSet(own)))
        try:
            refuse_unread(text, Latents(ShardSet(own)))
            assert not refused
        except UserError:
            assert refused


def test_an_older_run_and_its_checkpoint_go_on(latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(latents, run, *LARGE, "--max-steps", 3) == {}
    told = json.loads((run / "run.json").read_text())
    del told["ledger"]
    (run / "run.json").write_text(json.dumps(told))
    assert train(latents, run, *LARGE, "--resume", "auto") == {}
