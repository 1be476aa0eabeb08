"""What stands beside latents: pictures made small, exactly, and hints encoded by the autoencoder of the pictures."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from autoencoder.images import to_unit
from ldm.inverse.operators import Box
from training.data.images import Images
from training.data.latents import Latents
from training.encoding.shown import made_small
from training.models.assembly import load_pipeline
from training.models.autoencoders import load_autoencoder
from training.shards.reading import ShardSet

Encoded = Callable[..., Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, each with the picture before its edit beside it."""
    root = tmp_path_factory.mktemp("pairs")
    numbers = np.random.default_rng(0)
    for folder in ("after", "before"):
        (root / folder).mkdir()
        for i in range(12):
            pixels = numbers.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    words = ["--hint", "picture", "--hint-files", root / "before", "--missing-caption", "filename"]
    words += ["--resolution", 16, "--val-fraction", 0.3, "--num-workers", 1]
    packed = (root / "after", "--output", root / "packed", *words)
    assert tiny.call("make_shards", "pack", *packed) == 0
    return root / "packed"


@pytest.fixture
def encode(pairs: Path, autoencoder: Path, tmp_path: Path) -> Encoded:
    def call(*words: object) -> Path:
        common = ["--autoencoder", autoencoder, "--data", pairs, "--device", "cpu", "--num-workers", 0]
        assert tiny.call("encode_latents", *common, "--output", tmp_path / "latents", *words) == 0
        return tmp_path / "latents"

    return call


def test_small_pictures_are_the_means_of_their_squares() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    small = made_small(pixels, 4)
    assert small.shape == (2, 3, 2, 3) and small.dtype == torch.uint8
    exact = pixels.view(2, 3, 2, 4, 3, 4).double().mean((3, 5))
    assert (small - exact).abs().max() <= 0.5
    measured = Box(factor=4)(pixels.double() / 127.5 - 1)
    torch.testing.assert_close((measured + 1) * 127.5, exact, rtol=0, atol=1e-9)
    halves = torch.tensor([[[[0, 1, 1, 2], [0, 1, 1, 2]]]], dtype=torch.uint8)
    assert made_small(halves, 2).flatten().tolist() == [0, 2]  # 0.5 and 1.5, to the even one


def test_low_res_stands_beside_its_latents_mirrored_with_them(encode: Encoded, pairs: Path) -> None:
    folder = encode("--low-res", 4, "--flip")
    shards = ShardSet(folder, "train")
    assert shards.summary["image"] == {"kind": "low-res", "factor": 4} and "hint" not in shards.summary
    pictures, latents = Images(ShardSet(pairs, "train")), Latents(shards)
    batch = next(iter(latents.chunks([0, 1, 2], 3)))
    small = torch.cat([made_small(pictures[i].data, 4) for i in range(3)])
    torch.testing.assert_close(batch.extras["image"], small.float() / 255)
    mirrored = np.load(io.BytesIO(shards.read(0, ("mirror-image.npy",))["mirror-image.npy"]))
    assert np.array_equal(mirrored, small[0].numpy()[..., ::-1])


def test_an_encoded_hint_is_the_mean_latents_of_the_picture_before(encode: Encoded, pairs: Path) -> None:
    folder = encode("--encode-hint", "--dtype", "float32")
    model, packed = load_autoencoder(folder / "autoencoder", torch.device("cpu")), ShardSet(pairs, "train")
    (batch,) = Latents(ShardSet(folder, "train")).chunks([0, 1], 2)
    for i in range(2):
        before = Image.open(io.BytesIO(packed.read(i, ("hint.png",))["hint.png"]))
        pixels = torch.from_numpy(np.array(before)).permute(2, 0, 1)[None]
        with torch.no_grad():
            wanted = model.norm.mean_latents(model.encode(to_unit(pixels)))
        torch.testing.assert_close(batch.extras["image"][i : i + 1], wanted, rtol=0, atol=1e-5)


def test_what_cannot_be_made_is_refused(encode: Encoded, latents: Path, shapes: Path, autoencoder: Path,
                                        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["encode_latents", "--autoencoder", autoencoder, "--data", shapes, "--output", tmp_path / "no"]
    assert "leave one of them out" in tiny.refused(*words, "--low-res", 4, "--encode-hint").hint
    assert "pack them with pictures beside" in tiny.refused(*words, "--encode-hint").hint
    for factor in (2, 5):  # less than the autoencoder's; no divisor of 32
        assert "[4, 8, 16, 32]" in tiny.refused(*words, "--low-res", factor).hint
    small = encode("--low-res", 4)
    run = ["train_denoiser", "--latents", small, "--output", tmp_path / "run", *tiny.DENOISER, "--batch-size", 4]
    problem = tiny.refused(*run, "--image.kind", "low-res", "--image.factor", 8)
    assert "4 times smaller" in problem.what and problem.hint == "--image.factor 4"
    assert "which are left out" in capsys.readouterr().err
    problem = tiny.refused(*run, "--image.kind", "low-res", "--sample.size", "32,32")
    assert problem.what == "sample.size is 32x32, the images shown are of pictures of 16x16"


@pytest.mark.parametrize(("made", "kind"), [(("--low-res", 4), "low-res"), (("--encode-hint",), "source")])
def test_a_denoiser_is_trained_on_it_and_goes_on_where_it_was(
    encode: Encoded, tmp_path: Path, made: tuple[object, ...], kind: str
) -> None:
    """Killed and resumed, every weight is that of the run that was not."""
    words = ["--latents", encode(*made), *tiny.DENOISER, "--batch-size", 4, "--image.kind", kind, "--output"]
    assert tiny.call("train_denoiser", *words, tmp_path / "whole", "--max-steps", 4) == 0
    assert tiny.call("train_denoiser", *words, tmp_path / "parts", "--max-steps", 2) == 0
    assert tiny.call("train_denoiser", *words, tmp_path / "parts", "--resume", "auto", "--max-steps", 4) == 0
    whole, parts = (load_pipeline(tmp_path / name, "cpu") for name in ("whole", "parts"))
    assert whole.hashes == parts.hashes and whole.denoiser.backbone.image_channels in (3, 4)  # type: ignore[attr-defined]
