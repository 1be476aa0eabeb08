"""The numbers of scripts/evaluate.py, against the same quantities computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torchvision.models import squeezenet1_1

from autoencoder.fidelity import psnr, ssim
from autoencoder.images import to_uint8, to_unit
from training.data.images import Images
from training.data.order import Slot
from training.files import file_sha256
from training.measuring.distances import frechet_distance
from training.measuring.features import Features, load_features
from training.models.assembly import load_pipeline
from training.models.autoencoders import load_autoencoder
from training.models.judge import Classifier, load_classifier
from training.models.lpips import load_perceptual
from training.shards.reading import ShardSet
from training.stages.classifier import augment
from training.tensors import content_hash, save_tensors


def report(tmp_path: Path, *words: object) -> dict[str, Any]:
    assert tiny.call("evaluate", "--device", "cpu", "--overwrite", "--output", tmp_path / "out.json", *words) == 0
    return dict(json.loads((tmp_path / "out.json").read_text()))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of 48 numbers, the means of tiles, in place of 960: roots of their covariances take no time."""

    def means(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(to_unit(pixels), 4).flatten(1)

    for room in ("evaluate", "generated"):
        monkeypatch.setattr(f"training.measuring.{room}.load_features", lambda *asked: Features("means", 48, means))


def test_autoencoder_numbers(autoencoder: Path, shapes: Path, tmp_path: Path) -> None:
    numbers = report(tmp_path, "--model", autoencoder, "--data", shapes, "--count", 0, "--crop", 28)
    images, model, features = Images(ShardSet(shapes, "val")), load_autoencoder(autoencoder), load_features("random")
    pixels = images.__getitems__([Slot(i, 0, i) for i in range(len(images))]).data
    with torch.no_grad():
        made = to_uint8(model(to_unit(pixels), None)[0])
    inner = (slice(None), slice(None), slice(2, 30), slice(2, 30))
    assert numbers["images"] == len(images)
    assert numbers["psnr"] == pytest.approx(psnr(made[inner], pixels[inner]).mean().item(), abs=0.05)
    assert numbers["ssim"] == pytest.approx(ssim(made[inner], pixels[inner]).mean().item(), abs=1e-3)
    assert numbers["frechet"] == pytest.approx(frechet_distance(features(pixels), features(made)), rel=0.02)
    for name in ("psnr", "ssim", "frechet", "kernel_distance", "precision", "recall", "density", "coverage"):
        low, high = numbers[f"{name}_95"]
        assert low <= numbers[name] <= high and (low < high or name == "density"), name
    assert "seed 0" in str(numbers["features"]) and numbers["lpips_network"] is None
    assert numbers["data"] == {"index_sha256": file_sha256(shapes / "index.json")}


def test_lpips_is_stored_with_its_network(autoencoder: Path, shapes: Path, tmp_path: Path) -> None:
    """Standard weights, random ones and a file of others never look the same."""
    words = ("--model", autoencoder, "--data", shapes, "--count", 4, "--lpips-net", "squeeze", "--lpips")
    numbers = report(tmp_path, *words, "random")
    network, images = load_perceptual("squeeze", "random"), Images(ShardSet(shapes, "val"))
    pixels = images.__getitems__([Slot(i, 0, i) for i in images.evenly(4)]).data
    with torch.no_grad():
        made = to_uint8(load_autoencoder(autoencoder)(to_unit(pixels), None)[0])
        assert numbers["lpips"] == pytest.approx(network(to_unit(made), to_unit(pixels)).mean().item(), rel=1e-2)
    assert numbers["lpips_network"] == f"squeeze, random weights, {content_hash(network.state_dict())[:12]}"
    torch.manual_seed(1)
    save_tensors(tmp_path / "mine.safetensors", squeezenet1_1().state_dict())
    given = report(tmp_path, *words, tmp_path / "mine.safetensors")
    name = str(given["lpips_network"])
    assert name.startswith("squeeze, given weights, ") and name[-12:] != str(numbers["lpips_network"])[-12:]


def test_shapes_obedience_counts_the_checkers_verdicts(denoiser: Path, tmp_path: Path) -> None:
    """Six steps of training draw nothing: no caption is obeyed, and the grid says so."""
    words = ("--obedience", "shapes", "--count", 6, "--grid", tmp_path / "grid.png")
    numbers = report(tmp_path, "--model", denoiser, *words)
    assert [numbers[f"obedience_{n}"] for n in (1, 2, 3)] == [0, 0, 0]
    assert (tmp_path / "grid.png").exists() and numbers["prompts"] == 6
    assert "shapes/checker" in str(numbers["obedience_judge"]) and numbers["data"] is None


def test_obedience_of_shapes_and_distances_together(
    denoiser: Path, shapes: Path, tmp_path: Path, narrow: None
) -> None:
    """The rules are no classifier to load; and without --count, all of the val split."""
    words = ("--model", denoiser, "--data", shapes, "--count")
    both = report(tmp_path, *words, 10, "--obedience", "shapes", "--batch-size", 2)
    assert both["obedience_1"] == 0 and float(str(both["frechet_generated"])) > 0 and "obedience" not in both
    assert both["pictures"] == 10 and both["batch_size"] == 2
    everything = report(tmp_path, *words, 0)
    assert everything["pictures"] == everything["reconstructed_pictures"] == len(ShardSet(shapes, "val"))


def test_distances_and_judge(denoiser: Path, shapes: Path, tmp_path: Path) -> None:
    """A classifier of captions is trained, stored, loaded, and judges; features are named beside the numbers."""
    judge = tmp_path / "judge"
    assert (
        tiny.call(
            "train_classifier", "--data", shapes, "--output", judge, "--epochs", 1, "--batch-size", 32, "--width", 4
        )
        == 0
    )
    about = json.loads((judge / "config.json").read_text())
    assert len(about["classes"]) > 10 and 0 <= about["accuracy"] <= 1
    words = ("--data", shapes, "--count", 12, "--features", judge, "--obedience", judge)
    numbers = report(tmp_path, "--model", denoiser, *words)
    assert numbers["pictures"] == 12 and 0 <= float(str(numbers["obedience"])) <= 1
    for name in ("generated", "reconstructed", "training"):
        assert float(str(numbers[f"frechet_{name}"])) >= 0
    assert numbers["features"] == numbers["obedience_judge"]
    assert numbers["features"] == f"classifier {content_hash(load_classifier(judge).state_dict())[:12]}"
    counts = {
        name: numbers[f"{name}_pictures"] for name in ("real", "reconstructed", "training", "kernel", "kernel_real")
    }
    held = len(ShardSet(shapes, "val"))
    assert counts == {"real": held, "reconstructed": 12, "training": 12, "kernel": 12, "kernel_real": held}
    assert numbers["data"] == {"index_sha256": file_sha256(shapes / "index.json")}


def test_a_checkpoint_without_averaging_holds_what_was_trained(
    latents: Path, shapes: Path, tmp_path: Path, narrow: None
) -> None:
    """--train.ema 0: pictures and numbers from a checkpoint are those of the live weights, as those of final/."""
    run = tmp_path / "run"
    words = (*tiny.DENOISER, "--train.ema", "0", "--save-every", "3")
    assert tiny.call("train_denoiser", "--latents", latents, "--output", run, *words) == 0
    checkpoint = run / "checkpoints" / "step-00000006"
    live, of_checkpoint = load_pipeline(run, "cpu"), load_pipeline(checkpoint, "cpu")
    for name, part in live.denoiser.backbone.state_dict().items():
        assert torch.equal(part, of_checkpoint.denoiser.backbone.state_dict()[name]), name
    shown = [report(tmp_path, "--model", model, "--data", shapes, "--count", 10) for model in (run, checkpoint)]
    assert shown[0]["hashes"] == shown[1]["hashes"] and shown[0]["frechet_generated"] == shown[1]["frechet_generated"]


def test_likelihood_of_a_velocity_of_zero_is_the_priors(denoiser: Path, shapes: Path, tmp_path: Path) -> None:
    """A denoiser hardly trained moves nothing, so that p at t = 0 is the standard normal that it is at t = 1."""
    numbers = report(tmp_path, "--model", denoiser, "--data", shapes, "--likelihood", 6, "--steps", 4)
    pipeline, images = load_pipeline(denoiser, "cpu"), Images(ShardSet(shapes, "val"))
    pixels = images.__getitems__([Slot(i, 0, i) for i in range(6)]).data
    latents = pipeline.autoencoder.norm.mean_latents(pipeline.autoencoder.encode(to_unit(pixels)))
    wanted = -0.5 * (latents.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    nats, bits = float(str(numbers["log_likelihood"])), float(str(numbers["bits_per_dim"]))
    assert nats == pytest.approx(wanted.mean().item(), rel=0.03)
    assert bits == pytest.approx(-nats / (256 * math.log(2)), rel=1e-6)
    assert numbers["latent_dims"] == 256 and numbers["pictures"] == 6


SHAPES, FILE, OTHER = "--obedience shapes", "torchvision-inception:{broken}", "torchvision-inception:{other}"
MISTAKES = {  # (of which stage, flags, exit code, what is said)
    "nothing to measure": ("denoiser", "", 2, "nothing to measure"),
    "a classifier without data": ("denoiser", "--obedience {broken}", 2, "nothing to measure"),
    "likelihood without data": ("denoiser", "--likelihood 3", 2, "--data is missing"),
    "nine pictures": ("denoiser", "--data {data} --count 9", 2, "needs at least 10 in each, better 100 (got 9)"),
    "fewer than none": ("autoencoder", "--data {data} --count -1", 2, "--count: must be at least 0 (got -1)"),
    "empty batches": ("denoiser", f"{SHAPES} --count 1 --batch-size 0", 2, "--batch-size: must be at least 1"),
    "a crop beyond the picture": ("autoencoder", "--data {data} --crop 33", 2, "--crop: must lie in 1 to 32"),
    "no shapes": ("denoiser", f"{SHAPES} --count 0", 2, "must be at least 1"),
    "more shapes than there are": ("denoiser", f"{SHAPES} --count 2377", 2, "2377 held-out captions of 1 objects"),
    "no steps": ("denoiser", f"{SHAPES} --count 1 --grid.kind given", 2, "given times"),
    "no weak model": ("denoiser", "--data {data} --count 10 --guidance.kind autoguidance", 2, "weaker model"),
    "no steps of likelihood": ("denoiser", "--data {data} --likelihood 2 --grid.kind given", 2, "given times"),
    "no judge": ("denoiser", "--data {data} --obedience nowhere", 3, "nowhere holds no classifier"),
    "no inception": ("denoiser", "--data {data} --features inception:nowhere", 3, "no weights at 'nowhere'"),
    "a broken inception": ("denoiser", f"--data {{data}} --features {FILE}", 3, "refusing to load a pickle file"),
    "another network": ("autoencoder", f"--data {{data}} --features {OTHER}", 3, "not the weights of"),
    "not FID's network": ("autoencoder", "--data {data} --features inception:{other}", 3, "in which FID is defined"),
    "no DINOv2": ("denoiser", "--data {data} --features dinov2:./nowhere", 3, "./nowhere: no such folder of a DINOv2"),
    "no CLIP": ("denoiser", "--data {data} --count 10 --clip ./nowhere", 3, "./nowhere: no such folder of a CLIP"),
    "no data": ("denoiser", "--data nowhere", 3, "nowhere: no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_anything_is_measured(
    name: str, autoencoder: Path, denoiser: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.shapes.wording.PATIENCE", 50)
    (tmp_path / "broken").write_bytes(b"PK\3\4 no weights")
    save_tensors(tmp_path / "other", {"fc.weight": torch.zeros(2)})
    stage, flags, code, expected = MISTAKES[name]
    places = {"data": shapes, "broken": tmp_path / "broken", "other": tmp_path / "other"}
    words = [word.format(**places) for word in flags.split()]
    model = {"autoencoder": autoencoder, "denoiser": denoiser}[stage]
    problem = tiny.refused("evaluate", "--model", model, "--device", "cpu", "--output", tmp_path / "out.json", *words)
    assert problem.code == code and expected in problem.what and problem.hint
    assert not (tmp_path / "out.json").exists()


def test_augmentation_is_keyed_and_only_moves_pixels() -> None:
    from ldm.noise import Noise

    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    noise = Noise(torch.arange(5))
    moved = augment(pixels, noise)
    assert moved.dtype == torch.uint8 and torch.equal(moved[2:], augment(pixels[2:], noise[2:]))
    assert not torch.equal(moved, pixels)
    inner = moved[:, :, 2:-2, 2:-2]
    found = [
        any(
            torch.equal(inner[i], side[:, y : y + 28, x : x + 28])
            for side in (p, p.flip(-1))
            for y in range(5)
            for x in range(5)
        )
        for i, p in enumerate(pixels)
    ]
    assert all(found)


def test_classifier_round_trip(tmp_path: Path) -> None:
    from training.files import write_json

    model = Classifier(("a", "b"), 4).eval()
    save_tensors(tmp_path / "model.safetensors", model.state_dict())
    write_json(tmp_path / "config.json", {"classes": ["a", "b"], "width": 4})
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(model(pixels), load_classifier(tmp_path)(pixels))


def test_pictures_at_an_address_are_measured_as_those_of_a_folder(
    autoencoder: Path, denoiser: Path, shapes: Path, tmp_path: Path
) -> None:
    """Both scripts read the address once, into the cache they are told; it may be smaller than the data."""
    address, cache = f"file://{shapes}", ("--cache-dir", tmp_path / "cache")
    words = ("--model", autoencoder, "--count", 0, "--data")
    here, there = report(tmp_path, *words, shapes), report(tmp_path, *words, address, *cache)
    assert {k: v for k, v in here.items() if k != "seconds"} == {k: v for k, v in there.items() if k != "seconds"}
    judge, room = tmp_path / "judge", 1.2 * max(info.bytes for info in ShardSet(shapes).shards) / 1e9
    words = ("--output", judge, "--epochs", 1, "--batch-size", 32, "--width", 4, "--device", "cpu")
    small = ("--cache-dir", tmp_path / "small", "--cache-size", room)
    assert tiny.call("train_classifier", "--data", address, *small, *words) == 0
    assert 0 < sum(tar.stat().st_size for tar in (tmp_path / "small").glob("*/*.tar")) <= room * 1e9
    numbers = report(tmp_path, "--model", denoiser, "--data", address, *cache, "--count", 12, "--features", judge)
    assert numbers["real_pictures"] == len(ShardSet(shapes, "val")) and float(str(numbers["frechet_training"])) >= 0
    refused = tiny.refused("evaluate", "--model", autoencoder, "--data", "pipe:cat x.tar", "--device", "cpu")
    assert refused.code == 2 and "commands" in refused.what
