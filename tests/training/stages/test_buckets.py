"""Trainings on pictures and latents in buckets: one bucket a batch, latents of several shapes, exact resumption."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from stopped import same, stop_at

from autoencoder.images import to_unit
from ldm.conditioning import Cond
from ldm.samplers import Heun
from training.data.images import Images
from training.data.latents import Latents
from training.data.order import Batches, BucketOrder, Slot, order_of
from training.data.samples import Batch
from training.encoding.pairs import write_pairs
from training.errors import UserError
from training.models.assembly import load_pipeline
from training.models.autoencoders import load_autoencoder
from training.pictures import grids
from training.settings import decoding
from training.shards.reading import ShardSet
from training.stages.denoiser import DenoiserStage
from training.stages.denoiser_job import DenoiserJob

SIZES = [(24, 40), (32, 32), (40, 24)]
SHAPES = [(50, 90), (60, 60), (90, 50)]
FEW = ("--batch-size", "8")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flat pictures of three shapes, 51 in all, a part of them held out, in three buckets of about 32x32."""
    source, folder = tmp_path_factory.mktemp("shaped"), tmp_path_factory.mktemp("data") / "buckets"
    draw = np.random.default_rng(0)
    for n in range(51):
        height, width = SHAPES[n % 3]
        Image.fromarray(np.full((height, width, 3), draw.integers(0, 256, 3), np.uint8)).save(
            source / f"{n:02d}.png"
        )
        caption = source / f"{n:02d}.txt"
        caption.write_text(["a wide field", "a square", "a tall door"][n % 3])
    words = ["--resolution", "32", "--buckets", "--bucket-step", "8", "--val-fraction", "0.3"]
    assert tiny.call("make_shards", "pack", source, "--output", folder, *words, "--samples-per-shard", "7") == 0
    return folder


@pytest.fixture(scope="session")
def autoencoder_of_buckets(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage-one run on them."""
    run = tmp_path_factory.mktemp("autoencoder") / "run"
    assert tiny.call("train_autoencoder", "--data", pictures, "--output", run, *tiny.AUTOENCODER, *FEW) == 0
    return run


@pytest.fixture(scope="session")
def latents_of_buckets(
    pictures: Path, autoencoder_of_buckets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Those pictures encoded, mirrored too."""
    folder = tmp_path_factory.mktemp("latents") / "buckets"
    words = ("--autoencoder", autoencoder_of_buckets, "--data", pictures, "--output", folder, "--flip")
    assert tiny.call("encode_latents", *words, "--device", "cpu", "--batch-size", "4") == 0
    return folder


def test_batches_of_pictures_are_of_one_bucket(pictures: Path) -> None:
    images = Images(ShardSet(pictures))
    assert images.sizes == SIZES
    order = order_of(images, 4, 0)
    assert isinstance(order, BucketOrder)
    seen = [images.__getitems__(slots).data.shape[2:] for slots in Batches(order, 2, 2, 0, 1, 0, order.batches)]
    assert {tuple(shape) for shape in seen} == set(SIZES)
    assert all(one == two for one, two in zip(seen[::2], seen[1::2], strict=True))  # both halves of a step


def test_what_cannot_be_read_gives_way_to_one_of_its_bucket(pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "data"))
    images = Images(ShardSet(folder), on_bad_data="skip")
    bad = next(i for i in range(len(images)) if images.shards.size_of(i) == (40, 24))
    offset, size = images.shards._row(*images.shards._locate(bad))[1]["png"][:2]
    tar = folder / images.shards.shards[images.shards._locate(bad)[0]].name
    damaged = bytearray(tar.read_bytes())
    damaged[offset : offset + size] = bytes(size)
    tar.write_bytes(damaged)
    images = Images(ShardSet(folder), on_bad_data="skip")
    for slot in range(12):
        batch = images.__getitems__([Slot(bad, 0, slot), Slot(bad + 1, 0, 99)])
        assert batch.data.shape == (2, 3, 40, 24) and list(batch.bad) == [bad]
        assert images.shards.size_of(batch.indices[0]) == (40, 24)


def test_chunks_keep_their_order_and_part_between_buckets(pictures: Path) -> None:
    images = Images(ShardSet(pictures))
    places = [0, 1, len(images) - 1, 2]
    chunks = list(images.chunks(places, 3))
    assert [list(chunk.indices) for chunk in chunks] == [[0, 1], [len(images) - 1], [2]]
    own = images.evenly(4, (40, 24))
    assert len(own) == 4 and {images.shards.size_of(i) for i in own} == {(40, 24)}
    assert len(images.evenly(0, (24, 40))) == sum(map(len, images.shards.buckets[24, 40]))


def test_latents_are_those_of_their_pictures(pictures: Path, latents_of_buckets: Path) -> None:
    images, latents = Images(ShardSet(pictures)), Latents(ShardSet(latents_of_buckets), flip=True)
    assert len(images) == len(latents) and latents.sizes == SIZES
    model = load_autoencoder(latents_of_buckets / "autoencoder")
    for i in (0, len(images) // 2, len(images) - 1):
        assert images.shards.key(i) == latents.shards.key(i)
        wanted = model.encode(to_unit(images[i].data))[0]
        found = torch.from_numpy(latents.moments(i).astype(np.float32))
        assert found.shape == wanted.shape == latents.shape_of(i)
        assert torch.allclose(found, wanted, atol=2e-2, rtol=2e-2)
        assert latents.shards.size_of(i) == images.shards.size_of(i) == tuple(images[i].data.shape[2:])
    summary = latents.shards.summary
    assert tuple(summary["latent"]["picture"]) in SIZES and summary["framed"] and summary["buckets"]


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_stopped_run_ends_with_the_same_bytes(
    stage: str, pictures: Path, latents_of_buckets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, flags = {
        "autoencoder": (("--data", pictures), tiny.AUTOENCODER),
        "denoiser": (("--latents", latents_of_buckets), tiny.DENOISER),
    }[stage]

    def train(name: str, *more: object) -> int:
        words = (*data, "--output", tmp_path / name, *flags, *FEW, "--max-steps", "6", *more)
        return tiny.call(f"train_{stage}", *words)

    assert train("straight", "--micro-batch-size", "4") == 0
    assert "each epoch leaves" in capsys.readouterr().err
    stop_at(monkeypatch, 3)
    assert train("stopped", "--micro-batch-size", "4", "--resume", "auto") == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert train("stopped", "--micro-batch-size", "4", "--resume", "auto") == 0
    same(tmp_path / "straight", tmp_path / "stopped")


def test_a_denoiser_draws_in_each_of_its_sizes(
    latents_of_buckets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert tiny.call("train_denoiser", "--latents", latents_of_buckets, "--output", run, *tiny.DENOISER, *FEW) == 0
    assert "and 2 other shapes" in capsys.readouterr().err
    assert load_pipeline(run, "cpu").sizes == tuple(SIZES)
    for height, width in SIZES:
        words = ("--model", run, "--prompt", "a square", "--output", tmp_path / f"{height}", "--steps", "2")
        assert tiny.call("generate", *words, "--size", f"{height}x{width}", "--device", "cpu") == 0
        assert Image.open(tmp_path / f"{height}" / "00000.png").size == (width, height)
    assert "things may be repeated" not in capsys.readouterr().err
    words = ("--model", run, "--prompt", "a square", "--output", tmp_path / "other", "--steps", "2", "--device", "cpu")
    assert tiny.call("generate", *words, "--size", "48x48") == 0
    assert "drawn at 48x48, while the model was trained at" in capsys.readouterr().err


def test_what_buckets_do_not_go_with(pictures: Path, latents_of_buckets: Path, tmp_path: Path) -> None:
    words = ("--latents", latents_of_buckets, "--output", tmp_path / "run", *tiny.DENOISER)
    problem = tiny.refused("train_denoiser", *words, "--batch-size", "64")
    assert "no bucket has as many samples as one global batch (64)" in problem.what
    problem = tiny.refused("train_denoiser", *words, *FEW, "--backbone.patch", "4")
    assert "not divisible by 16" in problem.what and "--bucket-step 16" in problem.hint
    problem = tiny.refused("train_denoiser", *words, *FEW, "--stream")
    assert "a batch is of one bucket" in problem.what
    words = ("--data", pictures, "--output", tmp_path / "run", *tiny.AUTOENCODER, *FEW)
    problem = tiny.refused("train_autoencoder", *words, "--model.channels", "8,8,8,8,8")
    assert "the packed pictures of a bucket are 40x24, not divisible" in problem.what
    assert "--bucket-step 16" in problem.hint


def test_a_bucket_of_fewer_than_a_batch_is_named(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {size: sum(map(len, ranges)) for size, ranges in ShardSet(pictures).buckets.items()}
    most = max(counts.values())
    assert min(counts.values()) < most
    few = [f"{h}x{w} ({n})" for (h, w), n in counts.items() if n < most]
    words = ("--data", pictures, "--output", tmp_path / "run", *tiny.AUTOENCODER, "--batch-size", str(most))
    assert tiny.call("train_autoencoder", *words, "--dry-run") == 0
    said = capsys.readouterr().err
    assert f"never trained on: {', '.join(few)}" in said


def seen(stage: Any) -> list[Cond]:
    """What the backbone is told from here on."""
    told: list[Cond] = []
    stage.network.backbone.register_forward_pre_hook(lambda module, args: told.append(args[2]))
    return told


def test_a_step_is_told_how_each_picture_was_cut(
    latents_of_buckets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[torch.Tensor] = []
    backward = DenoiserStage.backward

    def listening(self: DenoiserStage, batch: Batch, step: int, share: float) -> dict[str, torch.Tensor]:
        assert torch.equal(batch.extras["size"][:, 4:], batch.extras["size"].new_tensor([
            [4 * side for side in batch.data.shape[2:]]] * len(batch.data)))  # fmt: skip
        heard = seen(self)
        values = backward(self, batch, step, share)
        assert torch.equal(heard[-1].extras["size"], batch.extras["size"])
        told.append(batch.extras["size"])
        return values

    monkeypatch.setattr(DenoiserStage, "backward", listening)
    words = ("--latents", latents_of_buckets, "--output", tmp_path / "run", *tiny.DENOISER, *FEW)
    sized = ("--conditioning.size", "true", "--train.flip", "true", "--micro-batch-size", "4")
    assert tiny.call("train_denoiser", *words, *sized) == 0
    numbers = {tuple(row) for row in torch.cat(told).int().tolist()}
    # 50x90 is scaled by 0.48 to 24x43, of which 3 columns are cut, one to the left (1.2 by whole pixels of the
    # picture), two in a mirrored one; 60x60 is not cut.
    assert {(60, 60, 0, 0, 32, 32), (50, 90, 0, 1, 24, 40), (50, 90, 0, 2, 24, 40), (90, 50, 1, 0, 40, 24)} == numbers
    pipeline = load_pipeline(tmp_path / "run", "cpu")
    assert pipeline.sized and pipeline.denoiser.backbone.size_embedding.unit == 4
    draw = ("generate", "--model", tmp_path / "run", "--prompt", "a square", "--steps", "2", "--device", "cpu")
    cut = ("--original-size", "500x900", "--crop-offset", "0x8")
    assert tiny.call(*draw, "--output", tmp_path / "out", *cut) == 0
    assert tiny.call(*draw[:1], "--like", tmp_path / "out" / "00000.png", "--model", tmp_path / "run",
                     "--output", tmp_path / "again", "--device", "cpu") == 0  # fmt: skip
    facts = grids.facts(tmp_path / "again" / "00000.png")
    assert facts["settings"]["sample"]["original_size"] == [500, 900]
    assert (tmp_path / "again" / "00000.png").read_bytes() == (tmp_path / "out" / "00000.png").read_bytes()


def test_latents_without_sizes_and_models_without_them_are_refused(
    latents: Path, denoiser: Path, autoencoder: Path, tmp_path: Path
) -> None:
    words = ("--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER)
    problem = tiny.refused("train_denoiser", *words, "--conditioning.size", "true")
    assert problem.code == 3 and "do not hold" in problem.what and "--keep-sizes" in problem.hint
    pack = ("pack", "shapes", "--samples", "24", "--val-fraction", "0.3", "--output", tmp_path / "data")
    assert tiny.call("make_shards", *pack, "--keep-sizes") == 0
    encode = ("--autoencoder", autoencoder, "--data", tmp_path / "data", "--output", tmp_path / "latents")
    assert tiny.call("encode_latents", *encode, "--device", "cpu") == 0
    assert Latents(ShardSet(tmp_path / "latents"), sizes=True)[0].extras["size"].tolist() == [[32, 32, 0, 0, 32, 32]]
    words = ("--latents", tmp_path / "latents", "--output", tmp_path / "run", *tiny.DENOISER, *FEW, "--dry-run")
    assert tiny.call("train_denoiser", *words, "--conditioning.size", "true") == 0
    draw = ("--model", denoiser, "--prompt", "red", "--output", tmp_path / "out", "--device", "cpu")
    problem = tiny.refused("generate", *draw, "--original-size", "100x100")
    assert "this one reads none" in problem.what
    problem = tiny.refused("generate", *draw, "--crop-offset", "1x2x3")
    assert problem.what == "--crop-offset 1x2x3: expected a number or HEIGHTxWIDTH"


def test_one_that_is_told_sizes_begins_from_one_that_is_not(
    latents_of_buckets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--latents", latents_of_buckets, *tiny.DENOISER, *FEW, "--max-steps", "1")
    sized = ("--conditioning.size", "true")
    assert tiny.call("train_denoiser", *words, "--output", tmp_path / "plain") == 0
    assert tiny.call("train_denoiser", *words, *sized, "--output", tmp_path / "sized",
                     "--init-from", tmp_path / "plain") == 0  # fmt: skip
    begun = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("plain", "sized")
    ]
    assert begun[0].keys() == begun[1].keys()
    problem = tiny.refused("train_denoiser", *words, "--output", tmp_path / "back", "--init-from", tmp_path / "sized")
    assert "is told how each picture was cut" in problem.what and "--conditioning.size true" in problem.hint


def test_prior_pictures_are_of_one_size_and_were_cut_from_no_others() -> None:
    config = decoding.load("denoiser", "smoke", {"prior.weight": "1", "prior.captions": "a square"})
    parts = SimpleNamespace(pipeline=SimpleNamespace(latent_shape=len, multiple=8))

    def check(sizes: list[tuple[int, int]], config: Any) -> None:
        job = SimpleNamespace(dataset=SimpleNamespace(sizes=sizes), config=config, parts=parts)
        DenoiserJob.check_buckets(job)  # type: ignore[arg-type]

    check([], config)
    check(SIZES[:1], config)
    with pytest.raises(UserError, match="prior pictures are of one size"):
        check(SIZES, config)
    check(SIZES, dataclasses.replace(config, prior=dataclasses.replace(config.prior, weight=0)))
    sized = dataclasses.replace(config, conditioning=dataclasses.replace(config.conditioning, size=True))
    with pytest.raises(UserError, match="prior pictures were cut from no others"):
        check([], sized)


def test_pairs_are_of_one_size(latents_of_buckets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--latents", latents_of_buckets, *tiny.DENOISER, *FEW, "--max-steps", "1")
    assert tiny.call("train_denoiser", *words, "--output", run) == 0
    pipeline = load_pipeline(run, "cpu")
    with pytest.raises(UserError, match="is in buckets of 3 sizes, and pairs are drawn in one"):
        write_pairs(pipeline, latents_of_buckets, tmp_path / "pairs", count=2, seed=0,
                    sampling=dataclasses.replace(pipeline.sampling, sampler=Heun()), batch_size=2)  # fmt: skip
    assert not (tmp_path / "pairs").exists()


def test_a_grid_of_reconstructions_is_of_the_bucket_with_most_pictures(
    pictures: Path, autoencoder_of_buckets: Path
) -> None:
    held = Images(ShardSet(pictures, "val"))
    runs = held.alike(held.evenly(8))  # of a validation's pictures, those of one bucket that are most, the first
    assert max(map(len, runs)) > len(runs[0]) or len(set(map(len, runs))) > 1
    most = max(runs, key=len)
    height, width = held.shards.size_of(most[0])
    columns = len(most)
    size = Image.open(autoencoder_of_buckets / "samples" / "step-00000000" / "grid.png").size
    like = torch.zeros(columns, 3, height, width, dtype=torch.uint8)
    assert size == grids.comparison({"input": like, "reconstruction": like}).size
