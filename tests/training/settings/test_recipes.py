"""Proposals: each builds, none needs days of a CPU, what is given stands, and docs/recipes.md lists them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.conditioning import Cond
from training.settings import decoding, recipes_table
from training.settings.reading import names
from training.settings.recipes import (
    FEW,
    MANY_EPOCHS,
    ONE_GPU,
    PAIRS,
    SMALL,
    Proposal,
    Situation,
    propose,
    reasons,
)  # fmt: skip

PAGE = tiny.ROOT / "docs" / "recipes.md"
CELLS = [
    Situation(pictures=pictures, resolution=side, device=device, processes=count, unit=count)
    for (device, count), pictures, side in product(
        recipes_table.MACHINES.values(), (*recipes_table.PICTURES, None), recipes_table.SIDES
    )
]
STAGES = ("autoencoder", "denoiser")
LAPTOP = Situation(pictures=57, resolution=64)


def test_every_pair_has_both_configs() -> None:
    assert set(PAIRS) <= set(names("autoencoder")) & set(names("denoiser"))
    assert "smoke" not in PAIRS


@pytest.mark.parametrize("pair", PAIRS.values(), ids=lambda pair: pair.name)
def test_the_configs_of_a_pair_fit_each_other(pair: Any) -> None:
    """At 256 tokens, after a factor that divides the picture; each starts from its own length and batch."""
    first, second = decoding.load("autoencoder", pair.name), decoding.load("denoiser", pair.name)
    assert isinstance(first, decoding.AutoencoderConfig) and isinstance(second, decoding.DenoiserConfig)
    side = pair.resolution // first.model.factor
    assert pair.resolution % first.model.factor == 0 and first.model.latent_channels >= 4
    tokens = side // second.backbone.patch if second.backbone.kind == "dit" else side
    assert tokens**2 == 256
    for stage, train in zip(STAGES, (first.train, second.train), strict=True):
        budget = pair.budget(stage)
        assert train.batch_size == budget.batch and train.max_steps * budget.batch == budget.most
        assert train.mixed_precision == ("no" if pair in SMALL else "bf16")


@pytest.mark.parametrize("pair", PAIRS.values(), ids=lambda pair: pair.name)
def test_the_operations_of_a_picture_are_counted(pair: Any) -> None:
    """Three forward passes: one, and twice as much backward. Stage one's losses and critic come on top."""
    first, second = decoding.load("autoencoder", pair.name), decoding.load("denoiser", pair.name)
    assert isinstance(first, decoding.AutoencoderConfig) and isinstance(second, decoding.DenoiserConfig)
    with torch.device("meta"):
        model, width = first.model.build(), second.text.width
        side = pair.resolution // model.factor
        latent = torch.empty(1, model.latent_channels, side, side)
        backbone = second.backbone.build(channels=model.latent_channels, context_dim=width, pooled_dim=width)
        cond = Cond(torch.empty(1, second.text.length, width), None, torch.empty(1, width))
        with FlopCounterMode(display=False) as denoising:
            backbone(latent, torch.empty(1), cond)
        with FlopCounterMode(display=False) as reconstructing:
            model(torch.empty(1, 3, pair.resolution, pair.resolution), latent)
    assert pair.denoiser.gflop * 1e9 == pytest.approx(3 * denoising.get_total_flops(), rel=0.06)
    assert 1 < pair.autoencoder.gflop * 1e9 / (3 * reconstructing.get_total_flops()) < 1.3


@pytest.mark.parametrize("situation", CELLS, ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_a_proposal_is_a_config_that_decodes(stage: str, situation: Situation) -> None:
    proposal = propose(stage, situation)
    config = decoding.load(stage, proposal.pair.name, proposal.overrides)
    train = config.train
    assert (train.max_steps, train.batch_size) == (proposal.steps, proposal.batch)
    assert train.batch_size % situation.processes == 0 and train.batch_size <= (situation.pictures or 1 << 30)
    assert train.max_steps % train.sample_every == 0 and 4 <= train.max_steps // train.sample_every <= 20
    assert train.save_every == train.sample_every
    if isinstance(config, decoding.AutoencoderConfig) and config.loss.adversarial:
        assert train.sample_every <= config.loss.adversarial_start < train.max_steps


@pytest.mark.parametrize("situation", [cell for cell in CELLS if not cell.cuda], ids=str)
def test_a_laptop_is_never_asked_for_days(situation: Situation) -> None:
    for stage in STAGES:
        proposal = propose(stage, situation)
        assert proposal.pair in SMALL and proposal.seconds is not None and 60 < proposal.seconds < 8 * 3600
        budget = proposal.pair.budget(stage)
        assert proposal.seconds == proposal.steps * proposal.batch * budget.seconds
    assert sum(propose(stage, LAPTOP).seconds or 0 for stage in STAGES) < 45 * 60


def test_the_network_grows_with_pictures_and_devices() -> None:
    def name(pictures: int, side: int, gpus: int) -> str:
        device = "cuda" if gpus else "cpu"
        situation = Situation(pictures=pictures, resolution=side, device=device, processes=max(1, gpus))
        return propose("denoiser", situation).pair.name

    assert [name(10_000, side, 0) for side in (32, 64, 96, 128, 200, 256, 512)] == [
        "laptop-64", "laptop-64", "laptop-128", "laptop-128", "laptop-256", "laptop-256", "laptop-256",
    ]  # fmt: skip
    assert name(FEW - 1, 256, 1) == "laptop-256" and name(FEW, 256, 1) == "gpu-256"
    assert name(10_000, 256, 4) == "gpus-256" and name(10_000, 128, 4) == "gpu-128"


def test_epochs_are_few_where_they_can_be() -> None:
    """Only where the least training would be more is a picture seen over 200 times, and then it is said."""
    for situation, stage in product(CELLS, STAGES):
        proposal = propose(stage, situation)
        if (proposal.epochs or 0) > MANY_EPOCHS:
            assert stage == "denoiser" and (situation.pictures or 0) < 200
            assert "learnt by heart" in " ".join(reasons(proposal))
        if situation.pictures in (60, 500) and stage == "denoiser":
            assert "copies" in " ".join(reasons(proposal))


def test_what_is_said_of_sixty_pictures() -> None:
    first, second = (propose(stage, LAPTOP) for stage in STAGES)
    assert reasons(first) == [
        "no --config was given: laptop-64, for 57 pictures of 64 px on a CPU: 1,400 steps of 8 (196 epochs), "
        "about 8 min on one slow core, as measured"
    ]
    assert first.overrides == {
        "train.max_steps": "1400", "train.batch_size": "8", "train.sample_every": "350", "train.save_every": "350",
        "loss.adversarial": "0",
    }  # fmt: skip
    assert reasons(second) == [
        "no --config was given: laptop-64, for 57 pictures of 64 px on a CPU: 1,480 steps of 16 (415 epochs), "
        "about 11 min on one slow core, as measured",
        "it will draw copies of its pictures: so few are learnt by heart",
    ]


def test_what_is_said_where_nothing_is_measured() -> None:
    big = Situation(pictures=10**6, resolution=256, device="cuda", processes=4, unit=4)
    (line,) = reasons(propose("denoiser", big))
    assert "on 4 GPUs" in line and "2.9 days by an estimate of 60 TFLOP/s for each GPU" in line
    few = reasons(propose("autoencoder", Situation(pictures=57, resolution=64, device="cuda")))
    assert "in a time not measured yet" in few[0] and few[1].startswith("a small network")
    (apple,) = reasons(propose("autoencoder", Situation(pictures=10**6, resolution=64, device="mps")))
    assert apple.startswith("no --config was given: laptop-64, ") and "on an Apple GPU" in apple
    stream = reasons(propose("autoencoder", Situation(pictures=None, resolution=64)))
    assert "pictures that nobody has counted" in stream[0] and "epochs" not in stream[0]


def given(**flags: object) -> Proposal:
    words = {key.replace("__", "."): str(value) for key, value in flags.items()}
    proposal = propose("autoencoder", Situation(pictures=10_000, resolution=64), words)
    assert not words.keys() & proposal.overrides.keys()
    return proposal


def test_what_is_given_stands_and_all_else_follows() -> None:
    assert given(train__max_steps=2).overrides == {
        "train.batch_size": "8", "train.sample_every": "2", "train.save_every": "2", "loss.discriminator_start": "1",
        "loss.adversarial_start": "2", "loss.adversarial_ramp": "0",
    }  # fmt: skip
    doubled = given(train__batch_size=16)
    assert (doubled.steps, doubled.batch) == (5000, 16)  # as many pictures
    assert given(train__save_every=700).overrides["train.sample_every"] == "2100"  # a multiple, as returns need
    assert given(train__sample_every=500).overrides["train.save_every"] == "500"
    late = given(loss__discriminator_start=9000).overrides
    assert late["loss.adversarial_start"] == "9000"
    assert given(train__max_steps="ten").steps == 10_000  # refused where it is decoded


def test_the_pair_of_the_autoencoder_is_taken() -> None:
    model = decoding.to_values(decoding.load("autoencoder", "gpu-128", {"model.image_channels": "1"}))["model"]
    gpu, cpu = Situation(pictures=10_000, resolution=64, device="cuda"), Situation(pictures=10_000, resolution=64)
    assert propose("denoiser", gpu, model=model).pair.name == "gpu-128"
    assert propose("denoiser", cpu, model=model).pair.name == "laptop-64"  # a CPU would need days for the other
    assert propose("denoiser", gpu, model={**model, "latent_channels": 5}).pair is ONE_GPU[0]
    assert propose("denoiser", gpu, model={**model, "kind": "vq"}).pair is ONE_GPU[0]
    small = decoding.to_values(decoding.load("autoencoder", "laptop-64"))["model"]
    assert propose("denoiser", gpu, model=small).pair.name == "laptop-64"
    kl_f8 = decoding.to_values(decoding.load("autoencoder", "kl-f8"))["model"]
    several = Situation(pictures=10_000, resolution=64, device="cuda", processes=2, unit=2)
    assert propose("denoiser", gpu, model=kl_f8).pair.name == "gpu-256"
    assert propose("denoiser", several, model=kl_f8).pair.name == "gpu-256"
    large = Situation(pictures=10**6, resolution=256, device="cuda", processes=2, unit=2)
    assert propose("denoiser", large, model=kl_f8).pair.name == "gpus-256"


def test_the_page_lists_what_is_proposed(tmp_path: Any) -> None:
    text = PAGE.read_text("utf-8")
    assert recipes_table.table() in text, "renew it: python scripts/list_kinds.py --renew docs/recipes.md"
    assert recipes_table.table().count("\n") == 2 + 36
    stale = tmp_path / "recipes.md"
    stale.write_text(text.replace("| 1,400 x 8", "| 9 x 9"))
    assert tiny.call("list_kinds", "--renew", stale) == 0 and stale.read_text("utf-8") == text
