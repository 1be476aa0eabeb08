"""What the scenarios of `tests/scripts/followed.toml` need before their first command: runs, models and drawings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from hint_places import Place, pictures
from packs import write

from training.tensors import load_tensors, save_tensors


def encoded(place: Place) -> None:
    place.copy("latents", "out")


def unmirrored(place: Place) -> None:
    words = ("--autoencoder", place.made("autoencoder"), "--data", place.made("shapes"), "--device", "cpu")
    tiny.call("encode_latents", *words, "--output", place.folder / "data")


def like(place: Place) -> None:
    """A drawing, and a model that did not make it."""
    model = place.made("denoiser")
    words = ("--prompt", "red", "--device", "cpu", "--steps", 2)
    tiny.call("generate", "--model", model, *words, "--output", place.folder / "made")
    tiny.shake(Path(shutil.copytree(model / "final", place.folder / "other")))


def another_run(place: Place) -> None:
    place.copy("denoiser", "theirs")
    place.copy("denoiser", "run")
    record = json.loads((place.folder / "run" / "run.json").read_text())
    write(place.folder / "run", {"run.json": json.dumps(record | {"status": "stopped"})})


def classifier(place: Place) -> None:
    words = ("--data", place.made("shapes"), "--epochs", 1, "--device", "cpu", "--width", 4, "--batch-size", 8)
    tiny.call("train_classifier", *words, "--output", place.folder / "judge")


def fresh_accelerator(place: Place) -> None:
    """Accelerate keeps one precision per process; tests before and after have another."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    place.request.addfinalizer(AcceleratorState._reset_state)


def preview(place: Place, teacher: Path | None = None) -> None:
    """A preview of one step, and pictures drawn with it and without."""
    words = ("--data", place.made("shapes"), "--device", "cpu", "--batch-size", 8, "--max-steps", 1)
    words = (*words, "--config", "tiny", "--num-workers", 0)
    model = place.made("denoiser")
    folder = place.folder / "preview"
    taught = teacher or model / "final" / "autoencoder"
    tiny.call("train_autoencoder", *words, "--teacher", taught, "--output", folder)
    if not teacher:
        drawing = ("--model", model, "--prompt", "red", "--device", "cpu", "--steps", 2, "--output")
        tiny.call("generate", *drawing, place.folder / "made", "--preview", folder)
        tiny.call("generate", *drawing, place.folder / "plain")


def other_preview(place: Place) -> None:
    other = place.copy("autoencoder", "theirs")
    home = other / "final"
    weights = load_tensors(home / "model.safetensors")
    save_tensors(home / "model.safetensors", {name: 1.01 * weight for name, weight in weights.items()})
    preview(place, other)


def averages(place: Place) -> None:
    words = ("--latents", place.made("latents"), "--output", place.folder / "run", *tiny.DENOISER)
    tiny.call("train_denoiser", *words, "--train.ema_lengths", "0.05,0.1", "--train.ema_every", 3)


def diffusers_kl(place: Place) -> None:
    diffusers = pytest.importorskip("diffusers")
    kind = {"block_out_channels": (32, 32), "layers_per_block": 1, "down_block_types": ("DownEncoderBlock2D",) * 2}
    model = diffusers.AutoencoderKL(**kind, up_block_types=("UpDecoderBlock2D",) * 2)
    model.save_pretrained(place.folder / "kl")


def scaleless(place: Place) -> None:
    diffusers_kl(place)
    path = place.folder / "kl" / "config.json"
    write(path.parent, {path.name: json.dumps(json.loads(path.read_text()) | {"scaling_factor": None})})


def classified(place: Place) -> None:
    words = ("--data", place.folder / "data", "--epochs", 1, "--device", "cpu", "--width", 4, "--batch-size", 8)
    for seed, name in enumerate(("first", "second")):
        tiny.call("train_classifier", *words, "--seed", seed, "--output", place.folder / name)
    words = ("--prompt", "red", "--device", "cpu", "--steps", 2, "--output", place.folder / "made")
    guided = ("--guidance.kind", "classifier", "--classifier", place.folder / "first")
    tiny.call("generate", "--model", place.made("denoiser"), *words, *guided)


def weakened(place: Place) -> None:
    for name in ("poor", "poorer"):
        tiny.shake(Path(shutil.copytree(place.made("denoiser") / "final", place.folder / name)))
    tiny.shake(place.folder / "poorer")
    words = ("--prompt", "red", "--device", "cpu", "--steps", 2, "--output", place.folder / "made")
    guided = ("--guidance.kind", "autoguidance", "--weak-model", place.folder / "poorer")
    tiny.call("generate", "--model", place.made("denoiser"), *words, *guided)


def inverted(place: Place) -> None:
    pictures(place)
    words = ("--prompt", "red", "--device", "cpu", "--steps", 2, "--output", place.folder / "made")
    began = ("--sampler", "ddim", "--invert", place.folder / "in" / "0.png")
    tiny.call("generate", "--model", place.made("denoiser"), *words, *began)


def other_encoder(place: Place) -> None:
    home = place.copy("latents", "data") / "autoencoder"
    weights = load_tensors(home / "model.safetensors")
    save_tensors(home / "model.safetensors", {name: 1.01 * weight for name, weight in weights.items()})


def two_checkpoints(place: Place) -> None:
    """A run stopped at its end, whose later checkpoint is damaged."""
    words = ("--latents", place.made("latents"), "--output", place.folder / "run", *tiny.DENOISER, "--save-every", 3)
    tiny.call("train_denoiser", *words)
    record = json.loads((place.folder / "run" / "run.json").read_text())
    write(place.folder / "run", {"run.json": json.dumps(record | {"status": "stopped"})})
    newest = max((place.folder / "run" / "checkpoints").glob("step-*"))
    (newest / "ema.safetensors").write_bytes(b"damaged")


def zero_scale(place: Place) -> None:
    scaleless(place)
    path = place.folder / "kl" / "config.json"
    write(path.parent, {path.name: json.dumps(json.loads(path.read_text()) | {"scaling_factor": -1.0})})


def compilerless(place: Place) -> None:
    def lacking() -> str:
        raise RuntimeError("no C++ compiler")

    place.patch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lacking)


def uncounted(place: Place) -> None:
    """Latents of a time when captions were not counted."""
    (place.copy("latents", "data") / "captions.json").unlink()


def before_its_end(place: Place) -> None:
    """`run`, which has a checkpoint and has not exported it."""
    (place.copy("denoiser", "run") / "final" / "model.safetensors").unlink()


def older_model(place: Place) -> None:
    """`model` as an earlier version exported it."""
    shutil.copytree(place.made("denoiser") / "final", place.folder / "model", ignore=lambda *_: {"card.json"})
