"""What a training upon a base takes of it, and what it says where that cannot be."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import tiny
import torch
from donors import frozen_encoder

from ldm.text import Label
from training.errors import UserError
from training.models.assembly import load_pipeline
from training.models.init_from import refuse_new_words
from training.tensors import load_tensors

LORA = ["--config", "lora", *tiny.SHORT, "--adapter.rank", "2"]


def train(base: Path, latents: Path, *words: object) -> int:
    return tiny.call("train_denoiser", "--base", base, "--latents", latents, *LORA, *words)


def test_a_frozen_text_encoder_is_that_of_the_base(latents: Path, shapes: Path, autoencoder: Path,
                                                   tmp_path: Path) -> None:
    """Which holds it; one that is given must be the same, and so must be one whose embeddings are stored."""
    one, two = (frozen_encoder(tmp_path / str(seed), seed) for seed in (1, 2))
    backbone = '[backbone]\nkind = "dit"\nwidth = 16\ndepth = 1\nheads = 2\nbase_size = 8\n'
    (config := tmp_path / "frozen.toml").write_text(f'{backbone}[text]\nkind = "huggingface"\nlength = 12\n')
    base, run = tmp_path / "base", tmp_path / "run"
    words = ("--latents", latents, "--output", base, "--config", config, "--sample.steps", "1", *tiny.SHORT)
    assert tiny.call("train_denoiser", *words, "--max-steps", "1", "--text-encoder", one) == 0
    upon = ("train_denoiser", "--base", base, "--config", "lora", *tiny.SHORT, "--max-steps", 1)
    assert tiny.call(*upon, "--latents", latents, "--output", run) == 0
    assert load_pipeline(run, "cpu").hashes["text_encoder"] == load_pipeline(base, "cpu").hashes["text_encoder"]
    assert tiny.refused(*upon, "--latents", latents, "--dry-run", "--text-encoder", two).code == 4
    given = ("--autoencoder", autoencoder, "--data", shapes, "--device", "cpu", "--text-length", 12)
    assert tiny.call("encode_latents", *given, "--text-encoder", two, "--output", tmp_path / "others") == 0
    problem = tiny.refused(*upon, "--latents", tmp_path / "others", "--dry-run")
    assert "the embeddings of these latents are of" in problem.what and problem.code == 4
    theirs = base / "final" / "text_encoder"
    assert "--text-encoder BASE/final/text_encoder" in problem.hint
    assert tiny.call("encode_latents", *given, "--text-encoder", theirs, "--output", tmp_path / "same") == 0
    assert tiny.call(*upon, "--latents", tmp_path / "same", "--dry-run") == 0


def test_pictures_are_drawn_in_the_size_of_the_latents(denoiser: Path, latents: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """As prior pictures are, which are trained on beside them."""
    base = shutil.copytree(denoiser, tmp_path / "base")
    path = base / "final" / "config.json"
    values = json.loads(path.read_text())
    values["sample"]["size"] = [48, 48]
    path.write_text(json.dumps(values))
    prior = ("--prior.weight", 1, "--prior.captions", "a red circle", "--dry-run")
    assert train(base, latents, *prior) == 0
    assert "sample.size is 32x32, as these latents are, and 48x48 in the base" in capsys.readouterr().err
    words = ("--base", base, "--latents", latents, *LORA, *prior, "--sample.size", "[64, 64]")
    problem = tiny.refused("train_denoiser", *words)
    assert problem.what == "sample.size is 64x64, the prior pictures are of pictures of 32x32"
    assert problem.hint == "leave sample.size out"


def test_averages_of_another_length_are_those_of_the_adapter(denoiser: Path, latents: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    words = ("--train.ema_lengths", "0.05,0.2", "--train.ema_every", 2, "--lr", "0.05", "--sample.steps", 1)
    assert train(denoiser, latents, "--output", run, *words) == 0
    assert tiny.call("posthoc_ema", "--model", run, "--length", "0.1", "--output", other) == 0
    ours, theirs = (load_tensors(folder / "model.safetensors") for folder in (run / "final", other))
    assert ours.keys() == theirs.keys() and not all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "adapter-1" in load_pipeline(denoiser, "cpu", adapters=[other]).hashes


def test_a_run_upon_a_base_goes_on_by_its_own_config(denoiser: Path, latents: Path, tmp_path: Path) -> None:
    """Without --config, and with --base as it was asked for."""
    run = tmp_path / "run"
    assert train(denoiser, latents, "--output", run, "--max-steps", 1, "--sample.steps", 1) == 0
    again = ("--latents", latents, "--output", run, "--resume", "auto", "--device", "cpu")
    assert "name it with --base RUN" in tiny.refused("train_denoiser", *again).hint
    assert tiny.call("train_denoiser", "--base", denoiser, *again) == 0


def test_the_name_of_an_adapter_s_config_asks_for_its_base(latents: Path) -> None:
    problem = tiny.refused("train_denoiser", "--latents", latents, *LORA, "--dry-run")
    assert problem.what == "--config lora is learned upon a trained model" and "--base RUN" in problem.hint


def test_an_adapter_learns_no_labels() -> None:
    with pytest.raises(UserError, match="labels are whole captions") as caught:
        refuse_new_words(Namespace(new_words=True, base="RUN", init_from=None), Label())
    assert "--init-from RUN --new-words" in caught.value.hint
    refuse_new_words(Namespace(new_words=True, base=None, init_from="RUN"), Label())


def test_few_pictures_seen_often_are_the_rule(denoiser: Path, latents: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Of an adapter: it is said what that means, and nothing speaks against it."""
    assert train(denoiser, latents, "--max-steps", 1_000, "--dry-run") == 0
    said = capsys.readouterr().err
    assert "epochs of few latents, as is the rule" in said
    assert "by heart" not in said and "held-out pictures, fewer" not in said
