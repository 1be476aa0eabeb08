"""Grey and RGBA models, both stages: packed, trained, encoded, drawn, measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from autoencoder.images import to_unit
from autoencoder.tiles import decode_tiled
from training.data.images import Images
from training.errors import UserError
from training.models.assembly import load_pipeline
from training.models.autoencoders import load_autoencoder
from training.pictures import grids
from training.settings import decoding
from training.shards.reading import ShardSet
from training.stages.checks import settle_channels

MODES = {1: "L", 4: "RGBA"}


def folder(root: Path, channels: int, count: int = 48) -> Path:
    """Squares of one colour, or of one grey, on a ground that is black or, for RGBA, nothing."""
    root.mkdir()
    for i in range(count):
        pixels = np.zeros((32, 32, channels), np.uint8)
        pixels[4 + i % 8 : 20 + i % 8, 6:22] = [40 + 4 * i, 200, 20, 255][:channels]
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text(f"square {'up' if i % 8 < 4 else 'down'}")
    return root


@pytest.fixture(scope="module", params=[1, 4], ids=["grey", "rgba"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """(channels, folder of data, latents and runs)."""
    channels: int = request.param
    root = tmp_path_factory.mktemp(f"channels{channels}")
    source, data, latents = folder(root / "in", channels), root / "data", root / "latents"
    pack = ["pack", source, "--output", data, "--resolution", "32", "--channels", channels, "--val-fraction", "0.3"]
    assert tiny.call("make_shards", *pack) == 0
    perceptual = ["--loss.perceptual", "0.1", "--loss.perceptual_weights", "random"]
    first = [*tiny.AUTOENCODER, *perceptual, "--data", data, "--output", root / "ae"]
    assert tiny.call("train_autoencoder", *first) == 0
    encode = ["--autoencoder", root / "ae", "--data", data, "--output", latents, "--device", "cpu"]
    assert tiny.call("encode_latents", *encode) == 0
    second = [*tiny.DENOISER, "--latents", latents, "--output", root / "ldm"]
    assert tiny.call("train_denoiser", *second) == 0
    draw = ["--model", root / "ldm", "--prompt", "square up", "--num-images", 2, "--strip", "--device", "cpu"]
    assert tiny.call("generate", *draw, "--output", root / "drawn") == 0
    return channels, root


def test_the_data_keep_their_channels(made: tuple[int, Path]) -> None:
    channels, root = made
    shards = ShardSet(root / "data", "train")
    assert json.loads((root / "data" / "index.json").read_bytes())["summary"]["channels"] == channels
    images = Images(shards)
    for i in range(3):
        with Image.open(root / "in" / f"{shards.key(i)}.png") as given:
            assert np.array_equal(images.picture(i), np.asarray(given).reshape(32, 32, channels))
    assert tiny.call("make_shards", "verify", root / "data") == 0


def test_the_networks_follow_the_data(made: tuple[int, Path]) -> None:
    channels, root = made
    config = json.loads((root / "ae" / "config.json").read_bytes())
    assert config["model"]["image_channels"] == config["discriminator"]["image_channels"] == channels
    assert load_autoencoder(root / "ae").image_channels == channels
    numbers = json.loads((root / "ae" / "run.json").read_bytes())["validation"]
    assert {"psnr", "ssim", "lpips"} <= numbers.keys() and np.isfinite(list(numbers.values())).all()


def test_pictures_are_drawn_in_their_channels(made: tuple[int, Path]) -> None:
    """What is written is what the pipeline decodes, to the byte; the sheet shows it on white."""
    channels, root = made
    pipeline = load_pipeline(root / "ldm", torch.device("cpu"))
    wanted = next(pipeline.pixels(["square up"] * 2, [0, 1]))
    for i in range(2):
        with Image.open(root / "drawn" / f"{i:05d}.png") as drawn:
            assert drawn.mode == MODES[channels]
            assert np.array_equal(np.asarray(drawn).reshape(32, 32, channels), wanted[i].permute(1, 2, 0).numpy())
    assert len(list((root / "drawn" / "strips").iterdir())) == 2
    sheet = np.asarray(Image.open(root / "drawn" / "grid.png"))
    assert np.array_equal(sheet, np.asarray(grids.grid(wanted, 2, captions=["square up"] * 2)))


def test_drawn_again_and_begun_from_a_picture(made: tuple[int, Path], tmp_path: Path) -> None:
    _, root = made
    like = ["--model", root / "ldm", "--like", root / "drawn" / "00000.png", "--device", "cpu"]
    assert tiny.call("generate", *like, "--output", tmp_path / "again") == 0
    assert (tmp_path / "again" / "00000.png").read_bytes() == (root / "drawn" / "00000.png").read_bytes()
    invert = ["--invert", root / "in" / "03.png", "--invert-prompt", "square up", "--sampler", "ddim"]
    draw = ["--model", root / "ldm", "--prompt", "square down", *invert, "--device", "cpu"]
    assert tiny.call("generate", *draw, "--output", tmp_path / "inverted") == 0


def test_measured(made: tuple[int, Path], tmp_path: Path) -> None:
    _, root = made
    common = ["--data", root / "data", "--device", "cpu"]
    assert tiny.call("evaluate", "--model", root / "ae", *common, "--output", tmp_path / "ae.json") == 0
    few = ["--count", 16, "--output", tmp_path / "ldm.json"]
    assert tiny.call("evaluate", "--model", root / "ldm", *common, *few) == 0
    for name, key in (("ae", "frechet"), ("ldm", "frechet_generated")):
        assert np.isfinite(json.loads((tmp_path / f"{name}.json").read_bytes())[key])
    look = ["--output", tmp_path / "look", "--probe-steps", 2, "--probe-samples", 4, "--lpips", "random"]
    assert tiny.call("inspect_autoencoder", root / "ae", *common, *look) == 0
    named = ["--data", root / "data", "--output", tmp_path / "classes", "--epochs", 1, "--width", 8, "--batch-size", 16]
    assert tiny.call("train_classifier", *named, "--device", "cpu") == 0
    with pytest.raises(UserError, match="judges RGB pictures") as caught:
        tiny.call("evaluate", "--model", root / "ldm", "--obedience", "shapes", "--count", 1, "--device", "cpu")
    assert caught.value.hint == "measure it with --data DIR"  # as was done above


def test_carried_to_diffusers_and_back(made: tuple[int, Path], tmp_path: Path) -> None:
    """The same reconstruction, tiled too."""
    channels, root = made
    assert tiny.call("convert_autoencoder", "export", root / "ae", "--output", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["in_channels"] == channels
    words = ["import", tmp_path / "out", "--output", tmp_path / "back"]
    assert tiny.call("convert_autoencoder", *words) == 0
    ours, back = load_autoencoder(root / "ae"), load_autoencoder(tmp_path / "back")
    pixels = to_unit(next(Images(ShardSet(root / "data", "val")).chunks([0, 1], 2)).data)
    assert torch.allclose(ours(pixels, None)[0], back(pixels, None)[0], atol=1e-5)
    z = ours.norm.mean_latents(ours.encode(pixels))
    assert decode_tiled(ours, z, tile=6, overlap=4).shape == pixels.shape


def test_data_of_other_channels_are_refused_by_name(made: tuple[int, Path], shapes: Path, tmp_path: Path) -> None:
    channels, root = made
    with pytest.raises(UserError, match=f"images must be .batch, {channels}, height, width."):
        encode = ["--autoencoder", root / "ae", "--data", shapes, "--output", tmp_path / "x", "--device", "cpu"]
        tiny.call("encode_latents", *encode)
    with pytest.raises(UserError, match=f"model.image_channels is 2, the packed pictures have {channels}"):
        words = [*tiny.AUTOENCODER, "--model.image_channels", "2", "--data", root / "data", "--output", tmp_path / "y"]
        tiny.call("train_autoencoder", *words)
    with pytest.raises(UserError, match=f"the teacher has {channels} image channels, the student 3"):
        words = ["--config", "tiny", "--teacher", root / "ae", "--loss.perceptual", 0, *tiny.SHORT]
        tiny.call("train_autoencoder", *words, "--data", shapes, "--output", tmp_path / "z")


def test_what_is_said_stays() -> None:
    """By a flag, even where it says the default; colour data change nothing."""
    config = decoding.load("autoencoder", "smoke", {})
    assert settle_channels(config, 3, {}) is config
    settled = settle_channels(config, 1, {"discriminator.image_channels": "3"})
    assert (settled.model.image_channels, settled.discriminator.image_channels) == (1, 3)
    said = decoding.load("autoencoder", "smoke", {"model.image_channels": "4"})
    assert settle_channels(said, 1, {}).model.image_channels == 4


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    for words, said in ((["--channels", "4", "--format", "jpg"], "--channels 4: not with --format jpg"),
                        (["--range", "2", "1"], "--range: LOW must be below HIGH .got 2 1"),
                        (["--range", "nan", "1"], "--range: LOW must be below HIGH")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            tiny.call("make_shards", "pack", tmp_path, "--output", tmp_path / "x", *words)
