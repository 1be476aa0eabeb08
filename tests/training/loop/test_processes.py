"""Two processes give the training of one at equal global batch: real processes, joined by gloo on the CPU."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import tiny
import torch
from safetensors.torch import load_file

from training.shards.reading import ShardSet

pytestmark = pytest.mark.timeout(1200)  # seconds of work, but many of them where the cores are shared

STAGES = {"autoencoder": tiny.AUTOENCODER, "denoiser": tiny.DENOISER}
LAYOUTS = {"plain": ["--micro-batch-size", "16"], "accumulated": ["--gradient-accumulation-steps", "2"]}
# A low rate: Adam turns the rounding of dead weights into whole steps, which would drown what is compared here.
FLAGS = ["--train.flip", "true", "--train.log_every", "2", "--lr", "1e-4"]


@pytest.fixture(scope="module")
def together(shapes: Path, latents: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages in both layouts, and the latents, made by two processes in one launch."""
    home = tmp_path_factory.mktemp("together")
    data = {"autoencoder": ["--data", str(shapes)], "denoiser": ["--latents", str(latents)]}
    commands = [
        [f"train_{stage}", *data[stage], "--output", str(home / f"{stage}-{name}"), *flags, *FLAGS, *layout]
        for stage, flags in STAGES.items()
        for name, layout in LAYOUTS.items()
    ]
    encode = ["--autoencoder", str(autoencoder), "--data", str(shapes), "--flip", "--device", "cpu"]
    commands.append(["encode_latents", *encode, "--output", str(home / "latents")])
    processes = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = tiny.spawn(*processes, tiny.ROOT / "tests" / "support" / "several.py", json.dumps(commands), limit=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


@pytest.fixture(scope="module")
def alone(shapes: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each stage trained by one process."""
    home = tmp_path_factory.mktemp("alone")
    for stage, words in (("autoencoder", ("--data", shapes)), ("denoiser", ("--latents", latents))):
        assert tiny.call(f"train_{stage}", *words, "--output", home / stage, *STAGES[stage], *FLAGS) == 0
    return home


def close(ours: Path, theirs: Path) -> None:
    """Each loss, and all of the first step, within 1e-5; later norms less: Adam steps on rounding in dead weights."""
    first, second = tiny.rows(ours), tiny.rows(theirs)
    assert [row.keys() for row in first] == [row.keys() for row in second]
    for a, b in zip(first, second, strict=True):
        for name in a:
            exact = name == "loss" or a["step"] <= 1
            assert a[name] == pytest.approx(b[name], rel=1e-5 if exact else 5e-3, abs=1e-6), (a["step"], name)
    before = load_file(ours / "final" / "model.safetensors")
    for name, weight in load_file(theirs / "final" / "model.safetensors").items():
        assert torch.allclose(before[name], weight, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_train_as_one(stage: str, layout: str, together: Path, alone: Path) -> None:
    close(together / f"{stage}-{layout}", alone / stage)


def test_two_encode_as_one(together: Path, latents: Path) -> None:
    """The same files, samples and captions; moments within the rounding of float16."""
    assert {path.name for path in latents.iterdir()} == {path.name for path in (together / "latents").iterdir()}
    for split in ("train", "val"):
        ours, theirs = (ShardSet(folder, split) for folder in (latents, together / "latents"))
        assert ours.summary == theirs.summary and len(ours) == len(theirs)
        for i in range(len(ours)):
            one, two = ours.read(i), theirs.read(i)
            assert ours.key(i) == theirs.key(i) and one.keys() == two.keys() and one["json"] == two["json"]
            for field in ("moments.npy", "mirror.npy"):
                here, there = (np.load(BytesIO(sample[field])) for sample in (one, two))
                np.testing.assert_allclose(here, there, rtol=2e-3, atol=2e-3)


def test_checkpoints_do_not_know_the_world_size(together: Path, shapes: Path, tmp_path: Path) -> None:
    """What two processes saved, one continues."""
    run = together / "autoencoder-plain"
    words = ("--data", shapes, "--output", run, *tiny.AUTOENCODER, *FLAGS, "--resume", "auto", "--max-steps", 7)
    assert tiny.call("train_autoencoder", *words) == 0
    assert tiny.rows(run)[-1]["step"] == 7


def test_two_machines_train_as_one(latents: Path, alone: Path, tmp_path: Path) -> None:
    """Each holds one process, the first of its own; the second alone writes nothing into the folder they share."""
    words = ("--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER, *FLAGS)
    assert ranks.start(2, tmp_path, "train_denoiser", *words, machines=2) == [0, 0], ranks.said(tmp_path)
    close(tmp_path / "run", alone / "denoiser")
    assert "step 6/6" in (tmp_path / "rank-0.log").read_text()
    assert not (tmp_path / "rank-1.log").read_text()


def test_accelerate_launch(latents: Path, alone: Path, tmp_path: Path) -> None:
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    processes = ["-m", "accelerate.commands.launch", *flags.split(), "--main_process_port", "0"]
    words = ["--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER, *FLAGS]
    done = tiny.spawn(*processes, tiny.SCRIPTS / "train_denoiser.py", *words, limit=900)
    assert done.returncode == 0, done.stderr[-3000:]
    close(tmp_path / "run", alone / "denoiser")


def test_accelerate_alone_on_a_cpu_is_refused(latents: Path) -> None:
    """Without MPI, Accelerate starts one process on a CPU whatever it is asked for: that one must not train alone."""
    flags = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    processes = ["-m", "accelerate.commands.launch", *flags.split()]
    words = ["--latents", latents, *tiny.DENOISER, "--dry-run"]
    done = tiny.spawn(*processes, tiny.SCRIPTS / "train_denoiser.py", *words, limit=900)
    assert done.returncode != 0 and "returned non-zero exit status 2" in done.stderr, done.stderr[-3000:]
    assert "error: accelerate launch --cpu was asked for several processes but started only 1" in done.stderr
    assert "torchrun --nproc-per-node" in done.stderr


def test_two_started_but_one_in_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    from training.errors import UserError
    from training.machine import processes

    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started but only 1 is in the group") as caught:
        processes.start("cpu")
    assert caught.value.code == 2


def test_batch_that_does_not_split() -> None:
    from training.data.order import split_batch
    from training.errors import UserError

    with pytest.raises(UserError, match="cannot be split over 2 process") as caught:
        split_batch(33, 0, None, 2)
    assert "32 or 34" in caught.value.hint and sys.version_info >= (3, 11)


def test_a_shrinking_micro_batch_is_refused_where_processes_meet_within_a_pass() -> None:
    from training.errors import UserError
    from training.settings import decoding
    from training.stages.checks import check_shrinking

    config = decoding.load("autoencoder", "smoke", {"train.micro_batch_size": "auto"})
    assert isinstance(config, decoding.AutoencoderConfig)
    quantising = SimpleNamespace(quantize=object())
    check_shrinking(config, quantising, 1)
    check_shrinking(config, SimpleNamespace(quantize=None), 2)
    with pytest.raises(UserError, match="auto: not with several processes and a kl model") as caught:
        check_shrinking(config, quantising, 2)
    assert caught.value.code == 2 and caught.value.hint == "give a number"
    numbered = decoding.load("autoencoder", "smoke", {"train.micro_batch_size": "4"})
    assert isinstance(numbered, decoding.AutoencoderConfig)
    check_shrinking(numbered, quantising, 2)
