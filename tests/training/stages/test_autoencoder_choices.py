"""Stage one's choices beyond its defaults: what each does, alone and over processes, and what is refused or told."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import autoencoder_steps
import pytest
import ranks
import tiny
import torch
from autoencoder_steps import NETWORK, gradients, pictures
from safetensors.torch import load_file
from torch import Tensor

from autoencoder.images import to_unit
from training.errors import UserError
from training.loop.loop import Loop
from training.models.lpips import LPIPS_NEEDS, load_perceptual
from training.settings import decoding
from training.stages.autoencoder import AutoencoderStage, posterior_noise
from training.stages.checks import check_images, check_returns, layout

make = autoencoder_steps.make
Make = Callable[..., tuple[AutoencoderStage, Loop]]
ALIGNED = {"loss__align": "0.7", "loss__align_cosine_margin": "0.1", "loss__align_distance_margin": "0"}
ALIGNED |= {"loss__align_adaptive": "true", "loss__adversarial": "0", "loss__perceptual": "0", "loss__kl": "0"}
OFF = {"loss__align": "0", "loss__align_adaptive": "false", "loss__codebook": "0"}
QUANTISED: dict[str, Any] = {**NETWORK, "kind": "vq", "codes": 64, "codebook_decay": 0.9}
SPACES: dict[str, dict[str, Any]] = {
    "kl": {},
    "equivariance": {"latent__kind": "equivariance", "latent__probability": "1"},
    "vq": {"model": {**NETWORK, "kind": "vq", "codes": 64}, "loss__codebook": "5"},
}


def step(stage: AutoencoderStage, number: int, parts: int = 1) -> dict[str, Tensor]:
    """One gradient step on eight pictures; gradients are left in place."""
    return autoencoder_steps.step(stage, None, number, parts)  # type: ignore[arg-type]  # the loop has no part in it


def settled(**changes: str) -> decoding.AutoencoderConfig:
    """The smoke config with overrides as `section__key="text"`."""
    config = decoding.load("autoencoder", "smoke", {key.replace("__", "."): text for key, text in changes.items()})
    assert isinstance(config, decoding.AutoencoderConfig)
    return config


# R1 now and then


def test_lazy_r1_is_due_by_the_step_alone_and_as_strong_on_the_whole(make: Make) -> None:
    """On other steps the critic's gradient is that without R1, bit for bit; on due ones R1's part is `every` fold."""
    changes = {"loss__perceptual": "0", "loss__discriminator_start": "0"}
    (plain, _), (each, _), (lazy, _) = (
        make(**changes, loss__r1=r1, loss__r1_every=every) for r1, every in (("0", "1"), ("10", "1"), ("10", "3"))
    )
    for number in range(4):
        found = []
        for stage in (plain, each, lazy):
            stage.discriminator.zero_grad()
            step(stage, number)
            found.append(gradients(stage.discriminator))
        without, once, now = found
        assert (once - without).norm() > 1e-3 * without.norm() > 0
        if number % 3:
            assert torch.equal(now, without)
        else:
            assert (now - without - 3 * (once - without)).norm() <= 1e-4 * (now - without).norm()


def test_r1_every_is_a_number_of_steps() -> None:
    with pytest.raises(UserError, match="loss.r1_every: must be > 0"):
        settled(loss__r1_every="0")


# Alignment whose weight follows the gradients


def asked(stage: AutoencoderStage, number: int, parts: int = 1) -> Tensor:
    """The gradient that one step puts at the mean latents of its eight pictures, the optimiser left alone."""
    seen: list[Tensor] = []
    hook = stage.model.quant_conv.register_full_backward_hook(  # type: ignore[union-attr, operator]
        lambda module, inputs, outputs: seen.append(outputs[0][:, : stage.model.latent_channels])
    )
    step(stage, number, parts)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("space", SPACES)
def test_adaptive_alignment_makes_the_gradients_at_the_latents_equal(make: Make, space: str) -> None:
    """Times its weight, whatever else is asked of z. The first step, which measures the first balance, goes without."""
    (stage, _), (plain, _) = make(**ALIGNED, **SPACES[space]), make(**{**ALIGNED, **SPACES[space], **OFF})
    decoder, first = asked(plain, 0), asked(stage, 0)
    assert torch.equal(first, decoder) == (space != "vq")  # whose codes ask something, too
    balance = float(stage.align_balance)
    second = asked(stage, 0)
    assert 0 < balance < 1e4 and float(stage.align_balance) == pytest.approx(balance, rel=1e-6)
    assert (second - first).norm() == pytest.approx(0.7 * decoder.norm().item(), rel=1e-4)


def test_adaptive_alignment_by_hand(make: Make) -> None:
    """‖∂L_picture/∂z‖ / ‖∂L_align/∂z‖, each taken apart; what else is asked of z has no part in it."""
    stage, _ = make(**{**ALIGNED, "loss__kl": "1e3"})
    images, slots = to_unit(pictures(stage, 0).data), torch.arange(8)
    moments = stage.model.encode(images).detach()
    z, deviation = moments[:, :4].requires_grad_(), (0.5 * moments[:, 4:]).exp()
    decoded = stage.model._decode(z + deviation * posterior_noise(stage.model, images, slots, stage.seed, 0))
    (picture,) = torch.autograd.grad((decoded - images).abs().mean(), z)
    assert stage.vision is not None
    head = stage.networks["alignment"]
    (alignment,) = torch.autograd.grad(head(z, stage.vision(images, (8, 8))).mean(), z)
    step(stage, 0)
    assert float(stage.align_balance) == pytest.approx(float(picture.norm() / alignment.norm()), rel=1e-4)


@pytest.mark.parametrize("parts", [2, 4])
def test_adaptive_alignment_does_not_depend_on_the_split_or_the_scale(make: Make, parts: int) -> None:
    (whole, _), (split, _) = make(**ALIGNED), make(**ALIGNED)
    split.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # as fp16 has on a GPU
    step(whole, 0), step(split, 0, parts)
    assert float(split.align_balance) == pytest.approx(float(whole.align_balance), rel=1e-4)


def test_adaptive_alignment_of_latents_that_are_aligned_already(make: Make) -> None:
    """Nothing is asked, nothing is divided by zero."""
    wide = {"loss__align_cosine_margin": "1.99", "loss__align_distance_margin": "1.99"}
    stage, _ = make(**{**ALIGNED, **wide})
    for _ in range(2):
        values = step(stage, 0)
        assert stage.align_balance == 0 and all(value.isfinite() for value in values.values())
    assert gradients(stage.model).isfinite().all()


def test_adaptive_alignment_is_kept_and_unknown_to_earlier_checkpoints(make: Make) -> None:
    stage, _ = make(**ALIGNED)
    step(stage, 0)
    kept = stage.state()
    other, _ = make(**ALIGNED)
    other.load_state(kept)
    assert other.align_balance == stage.align_balance > 0
    del kept["align_balance"]
    other.load_state(kept)
    assert other.align_balance == 0
    assert "align_balance" not in make(**{**ALIGNED, "loss__align_adaptive": "false"})[0].state()
    with pytest.raises(UserError, match="loss.align_adaptive: .* set align above 0"):
        settled(loss__align_adaptive="true")


# The codebook that follows


def test_an_average_without_codes_takes_those_of_the_weights(make: Make) -> None:
    """A checkpoint of an earlier version, which averaged only what gradients move, is gone on from."""
    stage, loop = make(model=QUANTISED, loss__perceptual="0", loss__adversarial="0")
    key = "autoencoder.quantize.embedding.weight"
    for number in range(2):
        step(stage, number), loop.step(number, 1e-3)
    kept = loop.snapshot(2)
    live, average = (kept.tensors[group][key].clone() for group in ("model", "ema"))
    assert not torch.allclose(live, average, atol=1e-6)
    early = {name: value for name, value in kept.tensors["ema"].items() if name != key}
    _, later = make(model=QUANTISED, loss__perceptual="0", loss__adversarial="0")
    later.restore(replace(kept, tensors={**kept.tensors, "ema": early}))
    assert torch.equal(later.ema.shadow[key], live) and not torch.equal(live, average)
    later.restore(kept)
    assert torch.equal(later.ema.shadow[key], average)
    with pytest.raises(KeyError):
        later.restore(replace(kept, tensors={**kept.tensors, "ema": {}}))


# Two processes

TOGETHER = {
    "critic": ["--loss.r1", "0.1", "--loss.r1_every", "2", "--loss.lecam", "0.1", "--loss.augment", '["colour"]'],
    "codes": ["--model.kind", "vq", "--model.codes", "64", "--model.codebook_decay", "0.9"],
}
TOGETHER["codes"] += ["--model.revive_every", "2"]


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_train_as_one(shapes: Path, tmp_path: Path, name: str) -> None:
    """Losses and gradients of each step, and the codes of the last; what evaluates and is exported is the average."""
    words = ["--data", shapes, "--train.log_every", "1", "--lr", "1e-4", *tiny.AUTOENCODER, "--loss.perceptual", "0"]
    words += TOGETHER[name]
    # Revived codes are alike where pictures are: which is nearest is then a matter of the last bit, from step 5 on.
    words += ["--max-steps", "4"] if name == "codes" else []
    assert tiny.call("train_autoencoder", *words, "--output", tmp_path / "one") == 0
    together = ranks.start(2, tmp_path, "train_autoencoder", *words, "--output", tmp_path / "two")
    assert together == [0, 0], ranks.said(tmp_path)
    compared = ("loss", "discriminator", "grad_norm/autoencoder", "grad_norm/discriminator")
    for ours, theirs in zip(*(tiny.rows(tmp_path / run) for run in ("one", "two")), strict=True):
        for key in compared:
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-4), (ours["step"], key)
    assert all(any(key in row for row in tiny.rows(tmp_path / "two")) for key in compared)
    if name == "codes":
        one, two = (tmp_path / run / "checkpoints" / "step-00000004" for run in ("one", "two"))
        ours, theirs = (load_file(run / "model.safetensors") for run in (one, two))
        for part in ("embedding.weight", "counts", "sums"):
            key = f"autoencoder.quantize.{part}"
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)
        used = [row["val/usage"] for row in tiny.rows(tmp_path / "two") if "val/usage" in row]
        assert used[0] < 0.5 < used[-1]  # unused codes were revived
        key = "quantize.embedding.weight"
        exported = load_file(tmp_path / "one" / "final" / "model.safetensors")[key]
        assert torch.equal(exported, load_file(one / "ema.safetensors")[f"autoencoder.{key}"])
        assert not torch.equal(exported, ours[f"autoencoder.{key}"])


# What is refused, and what is told


def dataset(height: int, width: int, channels: int = 3) -> Any:
    class Pictures(list[Any]):
        sizes = ()  # in no buckets

    return Pictures([SimpleNamespace(data=torch.zeros(1, channels, height, width))])


@pytest.mark.parametrize("section", ["model", "discriminator"])
def test_pictures_of_other_channels_are_refused(section: str) -> None:
    config = settled(**{f"{section}__image_channels": "1"})
    with pytest.raises(UserError, match=f"{section}.image_channels is 1, the packed pictures have 3") as caught:
        check_images(config, dataset(32, 32))
    assert caught.value.code == 2 and caught.value.hint == f"set {section}.image_channels to 3"
    check_images(settled(), dataset(32, 32))
    check_images(settled(discriminator__image_channels="1", loss__adversarial="0"), dataset(32, 32))


@pytest.mark.parametrize("net", LPIPS_NEEDS)
def test_pictures_too_small_for_lpips_are_refused(net: str) -> None:
    """Just those that the network fails on."""
    least, features = LPIPS_NEEDS[net], load_perceptual(net, "random").features
    features(torch.zeros(1, 3, least, 40))
    with pytest.raises(RuntimeError):
        features(torch.zeros(1, 3, least - 1, 40))
    changes = {"loss__perceptual_net": net, "model__channels": "[16]", "loss__adversarial": "0"}
    check_images(settled(**changes), dataset(least, 40))
    with pytest.raises(UserError, match=f"are 40x{least - 1}, LPIPS on {net} needs {least} pixels a side") as caught:
        check_images(settled(**changes), dataset(least - 1, 40))
    assert caught.value.code == 2 and "loss.perceptual to 0" in caught.value.hint
    assert ("loss.perceptual_net to vgg" in caught.value.hint) == (net != "vgg")
    check_images(settled(**changes, loss__perceptual="0"), dataset(least - 1, 40))


LOOKUP_FREE = {"model__kind": "lfq", "model__latent_channels": "6", "model__encoder_channels": "4"}


@pytest.mark.parametrize(
    ("changes", "processes", "accumulation", "told"),
    [
        ({}, 2, 2, ""),
        ({"discriminator__norm": "batch"}, 1, 1, ""),
        ({"discriminator__norm": "batch"}, 1, 2, "discriminator.norm batch"),
        ({"discriminator__norm": "batch"}, 2, 1, "discriminator.norm batch"),
        ({"discriminator__norm": "batch", "loss__adversarial": "0"}, 2, 2, ""),
        (LOOKUP_FREE, 2, 1, ""),  # the mean is that over processes
        (LOOKUP_FREE, 1, 2, "the batch entropy of model.kind lfq"),
        ({**LOOKUP_FREE, "model__entropy": "0"}, 1, 2, ""),
    ],
)
def test_what_depends_on_the_split_of_a_batch_is_told_once(
    changes: dict[str, str],
    processes: int,
    accumulation: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = argparse.Namespace(overrides={"train.batch_size": "16"}, gradient_accumulation_steps=accumulation)
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        layout(settled(**changes), args, processes)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(told)
    assert all(line.startswith("warning: ") and told in line for line in said)


@pytest.mark.parametrize("name", decoding.names("autoencoder"))
def test_the_large_configs_return_where_the_adversary_wrecks(name: str) -> None:
    """And can: a good checkpoint is there to go back to. The small ones are over before that would pay."""
    config = decoding.load("autoencoder", name)
    assert isinstance(config, decoding.AutoencoderConfig)
    check_returns(config.loss, config.train)
    assert (config.loss.return_margin > 0) == bool(config.loss.adversarial and config.train.max_steps > 10_000)
