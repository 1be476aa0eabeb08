"""A training step, encoding and decoding of our KL autoencoder beside diffusers' AutoencoderKL of the same weights.

The step has all losses: L1, LPIPS (random VGG), KL, and a patch GAN with hinge losses whose weight is balanced at the
last layer. Theirs is the textbook's, as diffusers' training script for AutoencoderKL writes it, but with one forward
pass for both networks where the script takes two: the balance by two gradients of whole losses, then one backward pass
of their sum. Discriminator and LPIPS are the same modules on both sides, by the `lpips` package's own code on theirs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from training.benchmarks import autoencoder as verb
from training.benchmarks.case import (
    EAGER,
    EAGER_TARGETS,
    NOT_YET,
    OF_PRODUCT,
    SAME_SPEED,
    STOCK_SPEED,
    Case,
    Contest,
    Place,
    peers,
)
from training.benchmarks.cases.denoisers import AVERAGE
from training.benchmarks.meters import flops
from training.data.samples import Batch
from training.loop import optim
from training.loop.ema import EMA
from training.loop.wrapping import wrap
from training.models.lpips import load_perceptual
from training.settings import decoding
from training.stages.autoencoder import AutoencoderStage, posterior_noise

Calls = dict[str, Callable[[], Any]]
# (keys of configs/autoencoder/kl-f8.toml, pixels a side, images)
SIZES: dict[str, tuple[dict[str, str], int, int]] = {
    "smoke": ({"model.channels": "[16,32,64]", "model.blocks": "1", "model.groups": "8", "discriminator.width": "16",
               "discriminator.layers": "2", "loss.perceptual_net": '"squeeze"'}, 64, 2),
    "cpu": ({"model.channels": "[32,64,128,128]"}, 64, 8), "gpu": ({}, 256, 32)}  # fmt: skip


class Both(NamedTuple):
    """Ours and theirs, of the same weights, with their pictures in [0, 1] as bytes, and the config of it all."""

    ours: Any
    theirs: Any
    bytes: Tensor
    config: Any

    @property
    def images(self) -> Tensor:
        """In [-1, 1]."""
        return self.bytes.float() / 127.5 - 1


def both(place: Place) -> Both:
    """The same in every process; ours in the memory layout that it is trained in."""
    keys, side, batch = SIZES[place.size]
    at_once = dict.fromkeys(("discriminator_start", "adversarial_start", "adversarial_ramp", "return_margin"), "0")
    keys = {"train.mixed_precision": '"bf16"' if place.device == "cuda" else '"no"',
            **{f"loss.{key}": value for key, value in {**at_once, "perceptual_weights": '"random"'}.items()},
            **keys}  # fmt: skip
    config: Any = decoding.load("autoencoder", "kl-f8", keys)
    torch.manual_seed(0)
    made = verb.models(config.model, place.device)
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (batch, 3, side, side), generator=random, dtype=torch.uint8)
    return Both(made["ours"], made["diffusers"], pixels.to(place.device), config)


class Encode(Case):
    """Pictures to moments."""

    kind = "encode"
    title = "encoding by it (`AutoencoderKL`)"
    targets = (STOCK_SPEED, SAME_SPEED, OF_PRODUCT)
    gpu_lanes, gpu_targets = EAGER, EAGER_TARGETS

    def build(self, place: Place) -> Contest:
        pair = both(place)
        ours, theirs, images = pair.ours, pair.theirs, pair.images
        z = torch.randn(len(images), ours.latent_channels, *(side // ours.factor for side in images.shape[2:]),
                        generator=torch.Generator().manual_seed(2)).to(images.device)  # fmt: skip
        laid_out = images.to(memory_format=torch.channels_last)
        calls = self.calls(ours, theirs, images, laid_out, z)

        def agree() -> None:
            a, b = (frozen(call, "cpu")() for call in calls.values())
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

        meta, x, code = copy.deepcopy(ours).to("meta"), images.to("meta"), z.to("meta")
        count = flops(next(iter(self.calls(meta, meta, x, x, code).values())))
        return Contest({name: frozen(call, place.device) for name, call in calls.items()}, agree, items=len(images),
                       flops=count)  # fmt: skip

    def calls(self, ours: Any, theirs: Any, images: Tensor, laid_out: Tensor, z: Tensor) -> Calls:
        """What each side does."""
        return {"ours": lambda: ours.encode(laid_out), "peer": lambda: theirs.encode(images).latent_dist.parameters}


class Decode(Encode):
    """Latents to pictures."""

    kind = "decode"
    title = "decoding by it (`AutoencoderKL`)"

    def calls(self, ours: Any, theirs: Any, images: Tensor, laid_out: Tensor, z: Tensor) -> Calls:
        return {"ours": lambda: ours.decode(z), "peer": lambda: theirs.decode(z).sample}


def frozen(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Without gradients, in bfloat16 on a GPU."""

    def quiet() -> Any:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return call()

    return quiet


class Step(Case):
    """A training step with all losses."""

    kind = "autoencoder"
    title = "training step of a KL autoencoder, all losses (`AutoencoderKL`, textbook loop)"
    targets = (replace(STOCK_SPEED, least=1.3, checked=NOT_YET), SAME_SPEED, OF_PRODUCT)

    def build(self, place: Place) -> Contest:
        pair = both(place)
        config, images = pair.config, pair.images
        perceptual = load_perceptual(config.loss.perceptual_net, "random").to(images.device)
        torch.manual_seed(1)
        critic = config.discriminator.build()
        book = Textbook(pair, copy.deepcopy(critic).to(images.device), perceptual)
        nothing: Any = None
        for module in (pair.ours, critic):
            module.to(memory_format=torch.channels_last)
        stage = AutoencoderStage(config, pair.ours, critic, perceptual, nothing, nothing)
        # Not by `processes.start`, which tunes the allocator.
        accelerator = Accelerator(cpu=place.device == "cpu", mixed_precision=config.train.mixed_precision)
        wrap(stage, accelerator, compiles=place.setting == "compiled")
        for part in book.parts() if place.setting == "compiled" else ():
            part.compile()
        batch = Batch(pair.bytes, torch.arange(len(images)), [""] * len(images))
        optimizers = [optim.build(config.optimizer, [network]) for network in stage.networks.values()]
        average, done = EMA(stage.averaged, AVERAGE), [0]

        def ours() -> dict[str, Tensor]:
            values = stage.backward(batch, done[0], 1.0)
            stage.after_backward(done[0])
            for optimizer in optimizers:
                optimizer.step()
            average.update()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            done[0] += 1
            return values

        def agree() -> None:
            told = {name: value.detach() for name, value in stage.backward(batch, 0, 1.0).items()}
            for network in stage.networks.values():
                network.zero_grad(set_to_none=True)
            theirs = book.losses(posterior_noise(pair.ours, images, batch.slots, config.train.seed, 0))
            near = 1e-4 if place.device == "cpu" else 2e-2  # bfloat16; `encode` and `decode` are compared in float32
            torch.testing.assert_close({name: told[name].float() for name in theirs}, theirs, rtol=near, atol=near)

        count = self.flops(pair, perceptual, critic)
        return Contest({"ours": ours, "peer": book.step}, agree, items=len(images), flops=count)

    def flops(self, pair: Both, perceptual: Any, critic: nn.Module) -> float:
        """Of what a step cannot do without: the autoencoder forward and back, LPIPS and critic of both pictures, both
        back to the reconstruction, the critic of both back to its weights."""
        parts: list[Any] = [pair.ours, perceptual.features, critic]
        ours, lpips, judge = (copy.deepcopy(part).to("meta") for part in parts)
        images = pair.images.to("meta")

        def step() -> None:
            mean, _ = ours.encode(images).chunk(2, 1)
            made = ours.decode(mean)
            lpips(images)
            (sum(level.sum() for level in lpips(made)) + judge(made).sum()).backward()
            judge(torch.cat([images, made.detach()])).sum().backward()

        return flops(step)


class Textbook:
    """The peer's loop: one forward pass, the balance by gradients of whole losses, a step of each network."""

    def __init__(self, pair: Both, critic: nn.Module, perceptual: Any) -> None:
        import lpips

        self.vae, self.critic, self.images, self.loss = pair.theirs, critic, pair.images, pair.config.loss
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's deprecation of the flags that lpips uses
            self.lpips = lpips.LPIPS(net=self.loss.perceptual_net, pretrained=False, pnet_rand=True, verbose=False)
        self.lpips.net.load_state_dict(perceptual.features.network.state_dict())
        for head in self.lpips.lins:  # as many ones as there are channels: the backbone is random
            head.model[-1].weight.data.fill_(1.0)
        self.lpips = self.lpips.to(self.images.device).eval().requires_grad_(False)
        settings = pair.config.optimizer
        self.optimizers = [torch.optim.AdamW(network.parameters(), lr=settings.lr, betas=settings.betas,
                                             weight_decay=settings.weight_decay) for network in (self.vae, critic)]
        self.average = peers("diffusers.training_utils").EMAModel(self.vae.parameters(), decay=AVERAGE)

    def parts(self) -> tuple[Any, ...]:
        """What is compiled, where ours is."""
        return self.vae.encoder, self.vae.decoder, self.critic, self.lpips

    def forward(self, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions, their loss and the KL divergence, the latter in nats per image value."""
        posterior = self.vae.encode(self.images).latent_dist
        z = posterior.sample() if noise is None else posterior.mean + posterior.std * noise
        made = self.vae.decode(z).sample
        loss = F.l1_loss(made, self.images) + self.loss.perceptual * self.lpips(made, self.images).mean()
        return made, loss, posterior.kl().mean() / self.images[0].numel()

    def critic_loss(self, made: Tensor) -> Tensor:
        """Hinge."""
        real, fake = self.critic(self.images), self.critic(made.detach())
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    @torch.no_grad()
    def losses(self, noise: Tensor) -> dict[str, Tensor]:
        """By the names of our log."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.images.is_cuda):
            made, loss, kl = self.forward(noise)
            told = {"loss": loss + self.loss.kl * kl, "kl": kl, "adversarial": -self.critic(made).mean(),
                    "discriminator": self.critic_loss(made)}  # fmt: skip
        return {name: value.float() for name, value in told.items()}

    def step(self) -> Tensor:
        """One step of both networks."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.images.is_cuda):
            made, loss, kl = self.forward()
            fooled = -self.critic(made).mean()
        last = self.vae.decoder.conv_out.weight
        pull, push = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (loss, fooled))
        weight = (pull / (push + 1e-4)).clamp(0, 1e4).detach() * self.loss.adversarial
        self.take(self.optimizers[0], loss + self.loss.kl * kl + weight * fooled)
        self.average.step(self.vae.parameters())
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.images.is_cuda):
            judged = self.critic_loss(made)
        self.take(self.optimizers[1], judged)
        return loss.detach()

    def take(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Gradients and one step."""
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


CASES = (Step(), Encode(), Decode())
