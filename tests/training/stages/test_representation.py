"""Features that are compared while a denoiser is trained: by steps alone, within groups, upon what is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import tiny
import torch
from denoiser_steps import gradients, make, step, weights
from donors import frozen_encoder
from safetensors.torch import load_file
from stopped import same, stop_at

from autoencoder.images import to_unit
from ldm.representation import VISION, dispersion
from training.data.images import Images
from training.data.latents import Latents
from training.data.order import Slot
from training.encoding.pairs import write_pairs
from training.loop.loop import Loop
from training.models.assembly import load_pipeline
from training.models.judge import Classifier, load_classifier
from training.shards.index import read_index
from training.shards.reading import ShardSet
from training.stages.denoiser import DenoiserStage
from training.tensors import content_hash, save_tensors

__all__ = ["make"]
Make = Callable[..., tuple[DenoiserStage, Loop]]
DISPERSIVE = {"representation__kind": "dispersive"}
REPA = ("--representation.kind", "repa", "--representation.hidden", 8)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of two classes as its folder: width 2, eight features."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    save_tensors(folder / "model.safetensors", Classifier(("a", "b"), 2).state_dict())
    (folder / "config.json").write_text(json.dumps({"classes": ["a", "b"], "width": 2}))
    return folder


@pytest.fixture(scope="module")
def seen(shapes: Path, autoencoder: Path, classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes encoded, mirrored too, with the classifier's features."""
    folder = tmp_path_factory.mktemp("seen") / "latents"
    words = ("--autoencoder", autoencoder, "--data", shapes, "--flip", "--vision", classifier, "--device", "cpu")
    assert tiny.call("encode_latents", *words, "--output", folder, "--num-workers", 0) == 0
    return folder


@pytest.fixture(scope="module")
def straight(seen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """The words of a training with such features, and its run, not interrupted."""
    run = tmp_path_factory.mktemp("straight") / "run"
    words: list[object] = ["train_denoiser", "--latents", seen, *tiny.DENOISER, "--train.flip", "true", *REPA]
    words += ["--train.log_every", 1]
    assert tiny.call(*words, "--output", run) == 0  # type: ignore[arg-type]
    return words, run


def test_a_weight_of_zero_is_none(make: Make) -> None:
    (plain, _), (idle, _) = make(), make(representation__weight="0", **DISPERSIVE)
    assert step(plain, 3) == step(idle, 3)
    assert all(map(torch.equal, gradients(plain.network), gradients(idle.network)))


def test_a_step_pays_for_its_features_and_a_validation_does_not(make: Make) -> None:
    (plain, _), (coupled, _) = make(), make(**DISPERSIVE)
    kept: list[torch.Tensor] = []
    first = coupled.network.backbone.get_submodule("blocks.0")
    first.register_forward_hook(lambda module, args, out: kept.append(out.detach()))
    before, after = step(plain, 3), step(coupled, 3)
    cost = 0.5 * dispersion(kept[0].flatten(1), 0.5)
    torch.testing.assert_close(after["loss_features"], cost)
    torch.testing.assert_close(after["loss"], before["loss"] + cost)
    assert cost < 0 and not all(map(torch.equal, gradients(plain.network), gradients(coupled.network)))
    held_out = [stage.losses_of(stage.held_out.chunks([0, 1, 2], 2)) for stage in (plain, coupled)]
    assert held_out[0] == held_out[1] and weights(plain.network).equal(weights(coupled.network))


def test_a_batch_in_parts_of_its_groups_is_the_same_batch(make: Make) -> None:
    (whole, _), (parts, _) = (make(representation__group="4", **DISPERSIVE) for _ in range(2))
    assert whole.group == 4 and make(objective__contrastive="0.1", **DISPERSIVE)[0].group == 8
    step(whole, 2)
    for rows in (range(4), range(4, 8)):
        parts.backward(parts.dataset.__getitems__([Slot(i, 0, 16 + i) for i in rows]), 2, 0.5)
    for one, other in zip(gradients(whole.network), gradients(parts.network), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_micro_batch_that_cuts_a_group_is_refused(latents: Path) -> None:
    words = ("--latents", latents, *tiny.DENOISER, "--representation.kind", "dispersive", "--micro-batch-size")
    problem = tiny.refused("train_denoiser", *words, 4, "--dry-run")
    assert "8 samples at a time" in problem.what and "multiples of 8" in problem.hint
    assert tiny.call("train_denoiser", *words, 8, "--dry-run") == 0


def test_features_of_both_variants_on_the_grid_of_the_latents(seen: Path, shapes: Path, classifier: Path) -> None:
    network, pictures = load_classifier(classifier), Images(ShardSet(shapes))
    stored = Latents(ShardSet(seen), vision=True)
    assert stored.features == 8 and Latents(ShardSet(seen)).extras == []
    fields = ShardSet(seen).read(3, ("extra-vision.npy", "mirror-vision.npy"))
    pixels = to_unit(torch.tensor(pictures.picture(3)).permute(2, 0, 1)[None])
    batch = stored.__getitems__([Slot(3, 0, 3)])
    assert batch.extras[VISION].dtype == torch.float16 and batch.extras[VISION].shape[1:] == (8, *stored.shape[1:])
    for name, shown in (("extra", pixels), ("mirror", pixels.flip(-1))):
        (path := seen.parent / "field.npy").write_bytes(fields[f"{name}-vision.npy"])
        maps = network.maps[:-2](shown)
        wanted = torch.nn.functional.interpolate(maps, stored.shape[1:], mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(torch.from_numpy(np.load(path)), wanted.half(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(network.maps[:-2](pixels).mean((2, 3)), network.features(pixels))
    told = read_index(seen)[0]["summary"][VISION]
    assert told == {"hash": content_hash(network.state_dict()), "width": 8}
    assert json.loads((seen / "encoding.json").read_text())[VISION] == told


def test_another_vision_model_makes_other_latents(seen: Path, shapes: Path, autoencoder: Path) -> None:
    words = ("--autoencoder", autoencoder, "--data", shapes, "--flip", "--device", "cpu", "--output", seen)
    problem = tiny.refused("encode_latents", *words)
    assert problem.code == 4 and "vision {'hash'" in problem.what and "now None" in problem.what


def test_features_that_float16_cannot_hold(shapes: Path, autoencoder: Path, classifier: Path, tmp_path: Path) -> None:
    """Are refused; with another model they are encoded."""
    (tmp_path / "large").mkdir()
    tensors = load_file(classifier / "model.safetensors")
    save_tensors(tmp_path / "large" / "model.safetensors", tensors | {"maps.18.weight": torch.full((8,), 1e12)})
    (tmp_path / "large" / "config.json").write_bytes((classifier / "config.json").read_bytes())
    words = ("--autoencoder", autoencoder, "--data", shapes, "--device", "cpu", "--num-workers", 0, "--vision")
    problem = tiny.refused("encode_latents", *words, tmp_path / "large", "--output", tmp_path / "one")
    assert problem.code == 5 and "features are not finite" in problem.what and "--vision" in problem.hint
    assert tiny.call("encode_latents", *words, classifier, "--output", tmp_path / "two") == 0


def test_pairs_of_a_teacher_have_no_features(straight: tuple[list[object], Path], seen: Path, tmp_path: Path) -> None:
    """Those beside the latents are of the samples' pictures, not of what the teacher draws."""
    teacher = load_pipeline(straight[1], "cpu")
    plan = replace(teacher.sampling, steps=1)
    write_pairs(teacher, seen, tmp_path / "pairs", count=4, seed=0, sampling=plan, batch_size=4)
    index, _ = read_index(tmp_path / "pairs")
    assert "extra-eps.npy" in index["fields"] and "extra-vision.npy" not in index["fields"]
    assert VISION not in index["summary"]


def test_the_head_is_trained_and_kept_but_given_to_no_one(straight: tuple[list[object], Path], seen: Path) -> None:
    _, run = straight
    rows = [row for row in tiny.rows(run) if "loss" in row]
    assert len(rows) == 6 and all(-0.5 <= row["loss_features"] <= 0.5 for row in rows)
    last = max((run / "checkpoints").glob("step-*"))
    model, averages = (load_file(last / f"{name}.safetensors") for name in ("model", "ema"))
    head = {name for name in model if "representation" in name}
    assert len(head) == 6 and model["denoiser.representation.head.4.weight"].shape == (8, 8)
    assert not head & averages.keys() and averages.keys() | head == model.keys()
    assert not any("representation" in name for name in load_file(run / "final" / "model.safetensors"))
    told = read_index(seen)[0]["summary"][VISION]["hash"]
    assert json.loads((run / "run.json").read_text())["hashes"][VISION] == told
    assert tiny.call("generate", "--model", last, "--prompt", "red", "--output", run.parent / "a", "--device", "cpu",
                     "--steps", 1) == 0


def test_a_stopped_run_goes_on_byte_for_byte(straight: tuple[list[object], Path], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    (script, *words), whole = straight
    stop_at(monkeypatch, 3)
    assert tiny.call(str(script), *words, "--output", tmp_path / "run") == 143
    monkeypatch.undo()
    assert tiny.call(str(script), *words, "--output", tmp_path / "run", "--resume", "auto") == 0
    same(tmp_path / "run", whole)


@pytest.mark.timeout(600)
def test_two_processes_train_as_one(straight: tuple[list[object], Path], tmp_path: Path) -> None:
    words, whole = straight
    assert ranks.start(2, tmp_path, *words, "--output", tmp_path / "run") == [0, 0], ranks.said(tmp_path)
    for ours, theirs in zip(tiny.rows(tmp_path / "run"), tiny.rows(whole), strict=True):
        for name in ("loss", "loss_features"):
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-5)


def test_latents_without_features_are_refused_with_the_command(latents: Path, seen: Path) -> None:
    """By which `seen` was made."""
    words = (*tiny.DENOISER, *REPA, "--dry-run", "--latents")
    problem = tiny.refused("train_denoiser", *words, latents)
    assert problem.code == 3 and "these latents do not hold" in problem.what and "--vision DIR" in problem.hint
    assert tiny.call("train_denoiser", *words, seen) == 0


def test_features_are_no_condition(seen: Path, latents: Path, make: Make) -> None:
    """Samples of one caption are still alike, so that noise is paired among them; a training that compares nothing is
    that of latents without them."""
    stage, _ = make(pairing__kind="minibatch-ot", representation__kind="repa", representation__weight="0")
    drawn = {}
    for name, data in (("with", Latents(ShardSet(seen), vision=True)), ("without", Latents(ShardSet(latents)))):
        batch = data.__getitems__([Slot(i, 0, i) for i in range(16)])
        drawn[name] = stage.drawn(batch._replace(captions=["red"] * 16), 1)
    assert torch.equal(drawn["with"].draw.eps, drawn["without"].draw.eps)
    assert VISION in drawn["with"].cond.extras and not drawn["without"].cond.extras
    assert stage.paired


def test_stored_text_beside_features(seen: Path, shapes: Path, autoencoder: Path, classifier: Path,
                                     tmp_path: Path) -> None:
    """A frozen text encoder's embeddings are dropped for guidance, features are not."""
    encoder, out = frozen_encoder(tmp_path / "text", 1), tmp_path / "latents"
    words = ("--autoencoder", autoencoder, "--data", shapes, "--vision", classifier, "--device", "cpu")
    text = ("--text-encoder", encoder, "--text-length", 12)
    assert tiny.call("encode_latents", *words, *text, "--output", out, "--num-workers", 0) == 0
    (config := tmp_path / "frozen.toml").write_text('[text]\nkind = "huggingface"\nlength = 12\n[backbone]\n'
                                                    'kind = "dit"\nwidth = 16\ndepth = 1\nheads = 2\nbase_size = 8\n')
    words = ("--latents", out, "--config", config, *tiny.SHORT, "--max-steps", 1, "--sample.steps", 1, *REPA)
    assert tiny.call("train_denoiser", *words, "--output", tmp_path / "run", "--num-workers", 1) == 0


def test_students_and_adapters_compare_nothing(straight: tuple[list[object], Path], seen: Path, latents: Path) -> None:
    """Whatever the model did that they are learned upon; asked for, it is refused in a sentence."""
    _, run = straight
    upon = ("--latents", seen, "--device", "cpu", "--batch-size", 8, "--dry-run")
    lora = ("train_denoiser", "--base", run, "--config", "lora", *upon)
    few = ("--config", "progressive", "--objective.from_steps", 2, "--objective.steps", 1)
    taught = ("distill_denoiser", "--teacher", run, *few, *upon)
    alone = ("train_denoiser", "--latents", latents, *tiny.DENOISER, "--objective.kind", "shortcut", "--dry-run")
    for words, what in ((lora, "an adapter"), (taught, "a student"), (alone, "a few-step model")):
        assert tiny.call(*words) == 0
        problem = tiny.refused(*words, "--representation.kind", "dispersive")
        assert "representation.kind dispersive is of the training of a whole denoiser" in problem.what
        assert problem.what.endswith(what) and problem.hint == "leave it out"


def test_a_tap_among_routed_tokens_is_refused_at_the_start(latents: Path) -> None:
    words = ("--latents", latents, *tiny.DENOISER, "--backbone.depth", 4, "--backbone.route", 0.5, "--dry-run")
    apart = ("--representation.kind", "dispersive")
    problem = tiny.refused("train_denoiser", *words, *apart, "--representation.depth", 0.5)
    assert "representation.depth 0.5 is after block 2, which routed tokens pass by: take 0.25 or less" in problem.what
    assert tiny.call("train_denoiser", *words, *apart) == 0
