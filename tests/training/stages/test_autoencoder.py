"""The truth of stage one's training: who learns when, from what, and that the split of the batch does not matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import autoencoder_steps
import pytest
import torch
from autoencoder_steps import DEEP, NETWORK, gradients, pictures, step, weights

from autoencoder.images import to_unit
from autoencoder.posterior import Posterior
from training.data.order import Slot
from training.data.samples import Batch
from training.errors import UserError
from training.loop.loop import Loop
from training.settings import decoding
from training.stages.autoencoder import AutoencoderStage, posterior_noise
from training.stages.checks import check_images

make = autoencoder_steps.make


def test_who_moves_when(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    stage, loop = make()
    for number in range(6):
        critic, model = weights(stage.discriminator), weights(stage.model)
        values = step(stage, loop, number)
        loop.step(number, 1e-3)
        assert not torch.equal(weights(stage.model), model)
        assert torch.equal(weights(stage.discriminator), critic) == (number < 2)
        assert ("discriminator" in values) == (number >= 2)


def test_the_adversarial_gradient_reaches_the_decoder_from_its_start(
    make: Callable[..., tuple[AutoencoderStage, Loop]],
) -> None:
    """Until then the step is that of a run without an adversary, bit for bit; afterwards it is not."""
    (stage, loop), (plain, plain_loop) = make(), make(loss__adversarial="0")
    for number in range(6):
        step(stage, loop, number), step(plain, plain_loop, number)
        assert torch.equal(gradients(stage.model), gradients(plain.model)) == (number < 4)
        loop.step(number, 1e-3), plain_loop.step(number, 1e-3)


def test_the_ramp(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    stage, _ = make(loss__adversarial_ramp="4")
    assert [stage.ramp(n) for n in (0, 3, 4, 5, 7, 100)] == [0, 0, 0.25, 0.5, 1, 1]
    assert make(loss__adversarial="0")[0].ramp(100) == 0


def test_balance_makes_the_norms_equal(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    """balance * |adversarial gradient| = |reconstruction gradient| at the decoder's last layer."""
    stage, loop = make()
    stage.balance = torch.zeros(())
    step(stage, loop, 4)  # the reconstruction's gradient alone, and the balance that belongs to it
    last, balance = stage.model.last_layer, stage.balance
    reconstruction = last.grad.clone()  # type: ignore[union-attr]
    loop.optimizers["autoencoder"].zero_grad()
    step(stage, loop, 4)
    adversarial = last.grad - reconstruction  # type: ignore[operator]
    assert balance > 0 and torch.equal(balance, stage.balance)
    assert adversarial.norm() == pytest.approx(stage.loss.adversarial * reconstruction.norm().item(), rel=1e-3)


def test_perceptual_gradient(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    (stage, loop), (plain, plain_loop) = make(), make(loss__perceptual="0")
    step(stage, loop, 0), step(plain, plain_loop, 0)
    difference = stage.model.last_layer.grad - plain.model.last_layer.grad  # type: ignore[operator]
    assert difference.norm() > 1e-3
    assert all(p.grad is None for p in stage.perceptual.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_same_gradients(make: Callable[..., tuple[AutoencoderStage, Loop]], parts: int) -> None:
    """At most steps to rounding; where rounding tips a maximum or a ReLU of a tiny net over, still nearly."""
    (whole, whole_loop), (split, split_loop) = (make(loss__reconstruction="l2") for _ in range(2))  # l1 has kinks
    off: list[float] = []
    for number in range(6):
        step(whole, whole_loop, number), step(split, split_loop, number, parts)
        for ours, theirs in ((whole.model, split.model), (whole.discriminator, split.discriminator)):
            size = gradients(ours).norm()
            off.append(float((gradients(ours) - gradients(theirs)).norm() / size) if size else 0.0)
        assert float(whole.balance) == pytest.approx(float(split.balance), rel=0.1)
        whole_loop.step(number, 1e-5), split_loop.step(number, 1e-5)
        split.model.load_state_dict(whole.model.state_dict())  # so that each step is judged by itself
        split.discriminator.load_state_dict(whole.discriminator.state_dict())
    assert sorted(off)[len(off) // 2] <= 1e-3 and max(off) <= 0.1, off


def test_a_gradient_that_is_not_finite_stops_before_the_weights(
    make: Callable[..., tuple[AutoencoderStage, Loop]],
) -> None:
    stage, loop = make()
    step(stage, loop, 0)
    before = weights(stage.model)
    stage.model.last_layer.grad[0, 0, 0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(UserError, match="grad_norm of the autoencoder is not finite at step 0") as caught:
        loop.step(0, 1e-3)
    assert caught.value.code == 5 and torch.equal(weights(stage.model), before)


def test_compiled(make: Callable[..., tuple[AutoencoderStage, Loop]], monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.compile` compiles the networks and leaves the gradients as they are."""
    compiled: list[torch.nn.Module] = []
    compile_ = torch.nn.Module.compile

    def eager(self: torch.nn.Module, *_: object, **__: object) -> None:
        compiled.append(self)
        compile_(self, backend="aot_eager")  # traced and differentiated as for a real compiler, which takes minutes

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    (stage, loop), (plain, plain_loop) = make(train__compile="true"), make()
    assert stage.model.encoder in compiled and stage.discriminator in compiled
    assert plain.model.encoder not in compiled
    for number in (2, 4):  # without and with the adversary
        step(stage, loop, number), step(plain, plain_loop, number)
        for ours, theirs in ((stage.model, plain.model), (stage.discriminator, plain.discriminator)):
            found, wanted = gradients(ours), gradients(theirs)
            rounding = 1e-5 * wanted.abs().max().item()  # of sums of large elements, whose order is the processor's
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=rounding)
        loop.step(number, 1e-5), plain_loop.step(number, 1e-5)


def test_a_critic_on_features(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    """The run's LPIPS network serves it, LPIPS weighed or not; only its heads learn and are saved."""
    changes = {"discriminator__kind": "features", "loss__perceptual": "0", "loss__kl": "0"}
    (stage, loop), (plain, plain_loop) = make(**changes), make(**changes, loss__adversarial="0")
    assert stage.perceptual is not None
    frozen = stage.perceptual.features
    before, found = weights(frozen), []
    for number in range(6):
        values = step(stage, loop, number)
        step(plain, plain_loop, number)
        found.append(torch.equal(gradients(stage.model), gradients(plain.model)))
        assert all(value.isfinite() for value in values.values())
        loop.step(number, 1e-3), plain_loop.step(number, 1e-3)
    assert found == [True] * 4 + [False] * 2
    assert torch.equal(weights(frozen), before) and all(p.grad is None for p in frozen.parameters())
    saved = {key for key in loop.snapshot(6).tensors["model"] if key.startswith("discriminator.")}
    layers = [f"discriminator.heads.{k}.{n}" for k in range(2) for n in (0, 2, 4)]
    assert saved == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def one_picture(height: int, width: int) -> Any:
    """A data set of one picture, in no buckets."""
    return type("Pictures", (list,), {"sizes": ()})([SimpleNamespace(data=torch.zeros(3, height, width))])


def test_a_critic_on_features_names_the_way_out_for_small_pictures() -> None:
    config = decoding.load("autoencoder", "smoke", {"discriminator.kind": "features"})
    assert isinstance(config, decoding.AutoencoderConfig)
    check_images(config, one_picture(32, 32))
    with pytest.raises(UserError, match="the discriminator needs 32 pixels a side") as caught:
        check_images(config, one_picture(32, 16))
    assert caught.value.hint == "set discriminator.kind to patch"


def test_the_normaliser(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    """The last act: latents of the data have mean 0 and variance 1 per channel."""
    stage, _ = make()
    stage.normalise()
    images = to_unit(next(stage.dataset.chunks(range(96), 96)).data)
    moments = stage.model.encode(images)
    latents = torch.cat([stage.model.norm.latents(moments, torch.randn(96, 4, 8, 8)) for _ in range(20)])
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.05)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=0.05)


EXTRAS: dict[str, dict[str, Any]] = {
    "log-variance": {"loss__log_variance": "learned"},
    "critic": {"loss__r1": "0.1", "loss__lecam": "0.1", "loss__augment": '["colour", "translation", "cutout"]'},
    "multi-scale": {"discriminator__kind": "multi-scale", "discriminator__layers": "1"},
    "features": {"discriminator__kind": "features", "loss__adversarial_loss": "non-saturating", "loss__r1": "0.1"},
    "equivariance": {"latent__kind": "equivariance", "latent__probability": "1"},
    "spectral": {"latent__kind": "spectral"},
    "align": {"loss__align": "1", "loss__align_cosine_margin": "0.1"},
    "align-adaptive": {"loss__align": "1", "loss__align_cosine_margin": "0.1", "loss__align_adaptive": "true"},
    "lazy-r1": {"loss__r1": "0.1", "loss__r1_every": "2"},
    "plateau": {"loss__plateau": "0.9", "loss__plateau_steps": "1"},
    "vq": {"model": {**NETWORK, "kind": "vq", "codes": 64, "codebook_decay": 0.9, "revive_every": 2}},
    "vq-gradient": {"model": {**NETWORK, "kind": "vq", "codes": 64, "normalize": True, "revive_every": 2}},
    "fsq": {"model": {**NETWORK, "kind": "fsq", "levels": [5, 5, 5]}},
    "lfq": {"model": {**NETWORK, "kind": "lfq", "latent_channels": 6, "temperature": 1.0}},
    "dc": {"model": DEEP},
    "tiny": {"model": {"kind": "tiny", "width": 8, "encoder_blocks": [1, 1, 1], "decoder_blocks": [1, 1, 1]}},
}


@pytest.mark.parametrize("name", EXTRAS)
def test_extras_do_not_depend_on_the_split_and_survive_a_resume(
    make: Callable[..., tuple[AutoencoderStage, Loop]], name: str
) -> None:
    """Steps in one piece, steps in two micro-batches, and steps from a checkpoint half way: the same training."""
    changes = {"loss__perceptual": "0", "loss__reconstruction": "l2", **EXTRAS[name]}
    (whole, whole_loop), (split, split_loop), (later, later_loop) = (make(**changes) for _ in range(3))
    for number in range(6):
        if number == 3:
            later_loop.restore(whole_loop.snapshot(3))
        values = step(whole, whole_loop, number)
        assert all(value.ndim == 0 and value.isfinite() for value in values.values())
        step(split, split_loop, number, 2)
        if name != "lfq":  # its batch entropy is that of a micro-batch
            for ours, theirs in ((whole.model, split.model), (whole.discriminator, split.discriminator)):
                assert (gradients(ours) - gradients(theirs)).norm() <= 2e-3 * gradients(ours).norm(), number
        whole_loop.step(number, 1e-5), split_loop.step(number, 1e-5)
        if number >= 3:
            step(later, later_loop, number), later_loop.step(number, 1e-5)
    assert whole.ramp(5) > 0
    for key, tensor in whole_loop.snapshot(6).tensors["model"].items():
        assert torch.equal(later_loop.snapshot(6).tensors["model"][key], tensor), key
    assert later.state() == whole.state()


def test_learned_log_variance(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    """s has the gradient 1 − loss·exp(−s), is in an optimiser, and scales the decoder's gradient by exp(−s)."""
    changes = {"loss__log_variance": "learned", "loss__kl": "0", "loss__adversarial": "0"}
    (stage, loop), (plain, plain_loop) = make(**changes), make(**{**changes, "loss__log_variance": "fixed"})
    spread = stage.log_variance
    assert spread is not None
    with torch.no_grad():
        spread.value.fill_(0.7)
    values, fixed = step(stage, loop, 0), step(plain, plain_loop, 0)
    loss, scale = fixed["loss"].item(), torch.tensor(-0.7).exp().item()
    assert values["loss"].item() == pytest.approx(loss * scale + 0.7, rel=1e-5)
    assert spread.value.grad is not None
    assert spread.value.grad.item() == pytest.approx(1 - loss * scale, rel=1e-5)
    torch.testing.assert_close(gradients(stage.model), scale * gradients(plain.model), rtol=1e-3, atol=1e-6)
    loop.step(0, 1e-2)
    towards = 1 if math.log(loss) > 0.7 else -1  # its best value is log loss
    assert spread.value.item() == pytest.approx(0.7 + towards * 1e-2, abs=1e-4)  # Adam's first step
    assert "log_variance.value" in loop.snapshot(1).tensors["model"]


def test_start_by_plateau(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    """No adversarial gradient until the reconstruction stalls; the step between measures the balance."""
    stage, loop = make(loss__plateau="0.5", loss__plateau_steps="2", loss__perceptual="0", loss__adversarial_start="2")
    for number in range(4):
        assert stage.ramp(number) == 0
        step(stage, loop, number)
        assert stage.balance == 0
    assert stage.start == 5  # two windows of two steps without the wanted fall
    step(stage, loop, 4)
    assert stage.balance > 0 and stage.ramp(5) == 1


def test_alignment_adds_its_gradient_to_the_encoder_alone(
    make: Callable[..., tuple[AutoencoderStage, Loop]],
) -> None:
    changes = {"loss__adversarial": "0", "loss__perceptual": "0"}
    (stage, loop), (plain, plain_loop) = make(**changes, loss__align="2"), make(**changes)
    values, fixed = step(stage, loop, 0), step(plain, plain_loop, 0)
    assert torch.equal(gradients(stage.model.decoder), gradients(plain.model.decoder))  # type: ignore[arg-type]
    assert not torch.allclose(gradients(stage.model.encoder), gradients(plain.model.encoder))  # type: ignore[arg-type]
    assert values["loss"].item() == pytest.approx((fixed["loss"] + values["alignment"]).item(), rel=1e-5)
    assert "alignment" not in fixed and stage.vision is not None
    assert all(p.grad is None for p in stage.vision.parameters())


def test_equivariance_moves_target_and_latents_alike(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    """The step's loss is that of D(τ∘z) against τ∘x, at every size that the critic and LPIPS can take."""
    changes = {"latent__kind": "equivariance", "latent__probability": "1", "loss__perceptual": "0", "loss__kl": "0"}
    stage, _ = make(loss__adversarial="0", **changes)
    images, sizes = to_unit(next(stage.dataset.chunks(range(8), 8)).data), set()
    for number in range(5):
        move = stage.move(images, number)
        assert move is not None and move == stage.move(images[:1], number)
        sizes.add(move.height)
        noise = posterior_noise(stage.model, images, torch.arange(8) + 8 * number, stage.seed, number)
        with torch.no_grad():
            x_hat, _ = stage.model(images, noise, move)
            expected = (x_hat - move(images, 4)).abs().mean()
        batch = stage.dataset.__getitems__([Slot(i, 0, 8 * number + i) for i in range(8)])
        values = stage.backward(batch, number, 1.0)
        assert values["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert len(sizes) > 1 and max(sizes) <= 8
    seen, _ = make(**changes)  # the smallest picture of two layers is 12 pixels, 3 latents
    assert min(m.height for n in range(60) if (m := seen.move(images, n))) == 3


def test_a_codebook_is_watched(
    make: Callable[..., tuple[AutoencoderStage, Loop]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, loop = make(model={**NETWORK, "kind": "vq", "codes": 64}, loss__perceptual="0", loss__codebook="2")
    values = step(stage, loop, 0)
    assert values["loss"] > 2 * values["codebook"] > 0
    torch.nn.init.normal_(stage.model.quantize.embedding.weight)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        numbers = stage.evaluate(tmp_path)
    assert 0 < numbers["usage"] <= 1 and 1 <= numbers["perplexity"] <= 64
    capsys.readouterr()
    with torch.no_grad():
        stage.model.quantize.embedding.weight[1:] += 1e3  # type: ignore[union-attr, operator]
        collapsed = stage.evaluate(tmp_path)
    assert collapsed["usage"] == 1 / 64 and collapsed["perplexity"] == pytest.approx(1)
    assert "only 1.6% of the 64 codes are in use" in capsys.readouterr().err
    with torch.no_grad():
        assert "usage" not in make()[0].evaluate(tmp_path)


def test_bf16_keeps_float32_weights_and_the_balance(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    """The networks compute in bf16; weights, gradients, moments and averages stay float32, so that no update is lost.

    A norm's scale of 1 moves by Adam's 1e-5 a step, of which bf16, whose next number is 0.996, would keep nothing. The
    balance of a few small pictures is as noisy as bf16's rounding makes it, but no larger or smaller on the average.
    """
    balances, found = {}, {}
    for precision in ("no", "bf16"):
        stage, loop = make(precision=precision, loss__perceptual="0", loss__reconstruction="l2")  # l1, LPIPS: kinks
        scales = [m.weight for m in stage.model.modules() if isinstance(m, torch.nn.GroupNorm)]
        balances[precision] = 0.0
        for number in range(3, 9):
            values = step(stage, loop, number)
            assert all(value.dtype == torch.float32 for value in values.values())
            assert {p.grad.dtype for p in stage.model.parameters() if p.grad is not None} == {torch.float32}
            found.setdefault(precision, gradients(stage.model))  # the first step's: at equal weights
            balances[precision] += stage.balance.item()
            loop.step(number, 1e-5)
    kept = loop.snapshot(9).tensors
    assert {tensor.dtype for group in kept.values() for tensor in group.values()} == {torch.float32}
    assert kept.keys() == {"model", "ema", "optimizer"} and all(kept.values())
    assert balances["bf16"] == pytest.approx(balances["no"], rel=0.05) and balances["no"] > 0
    assert 0 < (found["bf16"] - found["no"]).norm() < 0.1 * found["no"].norm()
    for scale in scales:
        assert (scale != 1).all() and ((scale - 1).abs() <= 1e-4).all()
        assert (scale.bfloat16() == 1).all()


def test_evaluation_sees_the_averages(
    make: Callable[..., tuple[AutoencoderStage, Loop]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, loop = make(loss__adversarial="0")
    for number in range(2):
        step(stage, loop, number), loop.step(number, 1e-3)
    live, seen = weights(stage.model), []
    monkeypatch.setattr(stage, "evaluate", lambda folder: seen.append(weights(stage.model)) or {"psnr": 0.0})
    loop.validate(2)
    averages = torch.cat([loop.ema.shadow[f"autoencoder.{key}"].flatten() for key, _ in stage.model.named_parameters()])
    assert torch.equal(seen[0], averages) and not torch.allclose(averages, live, atol=1e-5)
    assert torch.equal(weights(stage.model), live)


def test_kl_is_told_in_nats_per_image_value(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    stage, loop = make(loss__perceptual="0", loss__reconstruction="l2")
    images = to_unit(pictures(stage, 0).data)
    with torch.no_grad():
        nats = Posterior.split(stage.model.encode(images)).kl().mean()
    values = step(stage, loop, 0)
    assert nats > 0 and values["kl"].item() * images[0].numel() == pytest.approx(nats.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["patch", "features"])
def test_the_target_of_lpips_is_computed_once_per_image_and_step(
    make: Callable[..., tuple[AutoencoderStage, Loop]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also with the adversary at work, however the batch is split."""
    stage, loop = make(discriminator__kind=kind)
    assert stage.perceptual is not None
    seen, target = [], stage.perceptual.target
    monkeypatch.setattr(stage.perceptual, "target", lambda images: seen.append(len(images)) or target(images))
    for parts in (1, 4):
        step(stage, loop, 5, parts)
        assert seen == [8 // parts] * parts
        seen.clear()


CRITICS = ("patch", "multi-scale", "features")
EMPTY: dict[str, Callable[[Batch], Batch]] = {
    "constant": lambda batch: batch._replace(data=torch.full_like(batch.data, 255)),
    "one": lambda batch: batch._replace(data=batch.data[:1], slots=batch.slots[:1], captions=batch.captions[:1]),
    "one constant": lambda batch: EMPTY["one"](EMPTY["constant"](batch)),
}
ALONE = ("log-variance", "equivariance", "spectral", "align", "align-adaptive")
ALONE += ("vq", "vq-gradient", "fsq", "lfq", "dc")


@pytest.mark.parametrize(
    ("name", "empty"), [*product(CRITICS, EMPTY), *((name, "one constant") for name in ALONE)]
)
def test_pictures_that_say_nothing(make: Callable[..., tuple[AutoencoderStage, Loop]], name: str, empty: str) -> None:
    """A batch of one colour, and a batch of one picture: finite losses and gradients, before and after all starts."""
    changes = {"loss__r1": "0.1", "loss__lecam": "0.1", **EXTRAS.get(name, {})}
    stage, loop = make(**changes)
    for number in range(1, 6):
        values = stage.backward(EMPTY[empty](pictures(stage, number)), number, 1.0)
        stage.after_backward(number)
        assert all(value.isfinite() for value in values.values()), values
        assert gradients(stage.model).isfinite().all() and gradients(stage.discriminator).isfinite().all()
        loop.step(number, 1e-3)
    assert stage.ramp(5) > 0 and "discriminator" in values and weights(stage.model).isfinite().all()
