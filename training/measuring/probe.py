"""How well a denoiser will learn an autoencoder's latents, asked of a small one with a fixed seed and budget.

The probe is an unconditional flow-matching transformer, the same for every autoencoder but for the patch that brings
its latents to at most 64 tokens. What its ranking can tell: of autoencoders measured on the same pictures with the
same budget and features, which latents a network learns soonest, and (Frechet distance) what comes of it in pictures,
the decoder's own mistakes included. What it cannot: how a large denoiser fares after a long training, where capacity
makes up for difficult latents; how captions are obeyed; and, from the loss alone, anything between autoencoders of
different latent shapes, whose losses are means over different numbers of values. Distances of few samples are too
large by an amount that depends on their number: compare equal numbers only, beside that of the reconstructions.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from autoencoder.images import to_uint8, to_unit
from autoencoder.precision import double_device
from ldm.backbones.dit import DiT
from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.grids import Uniform
from ldm.noise import Noise
from ldm.objectives import LEVELS, Denoising
from ldm.predictions import Velocity
from ldm.samplers import prior, sample
from ldm.samplers.ode import Euler
from ldm.schedules import Flow
from ldm.times import LogitNormal
from ldm.weighting import UniformWeight
from training.data.images import Images
from training.data.order import Slot
from training.data.samples import Batch
from training.loop.short_run import short_run
from training.loop.stage import StatelessStage
from training.machine import processes
from training.measuring.distances import frechet_distance
from training.measuring.held_out import gather, warn_of_few
from training.measuring.networks.base import Features
from training.models.reconstructions import reconstructed
from training.progress import Progress
from training.settings.sections import Optimizer

SEED = 0
BATCH = 64
AT_ONCE = 32  # pictures encoded or decoded; changes no number
PICTURES = 4096  # of the training split, encoded once
HELD_OUT = 512  # pictures of the held-out loss
TOKENS = 64
RATE, WARMUP = 1e-3, 20
SAMPLING_STEPS = 25
DIFFUSION = Diffusion(schedule=Flow(), prediction=Velocity())
OBJECTIVE = Denoising(diffusion=DIFFUSION, times=LogitNormal(), weighting=UniformWeight())


def probe(
    model: Autoencoder, train: Images, held_out: Images, features: Features, steps: int, samples: int
) -> dict[str, Any]:
    """Train for `steps` on latents of `train`; held-out loss by noise level, Frechet distance of decoded samples.

    `frechet_reconstructed`, of as many reconstructions, is what samples could at best reach: both are of `samples`, or
    of as many as pictures are held out where those are fewer.
    """
    device, samples = model.norm.scale.device, min(samples, len(held_out))
    warn_of_few(features.dim, samples)
    moments = encode_all(model, train, PICTURES, device)
    network = denoiser(moments, model)
    losses = fit(network, model, moments, encode_all(model, held_out, HELD_OUT, device), steps)
    firsts = Progress("drawing", samples).each(range(0, samples, AT_ONCE), lambda _: AT_ONCE)
    size = tuple(moments.shape[2:])
    noises = (Noise.from_seeds(range(first, min(samples, first + AT_ONCE)), device) for first in firsts)
    real = gather(features, map(to_uint8, batches(held_out, len(held_out), device)))
    drawn = gather(features, (draw(network, model, noise, size) for noise in noises))
    copies = gather(features, (reconstructed(model, to_uint8(x)) for x in batches(held_out, samples, device)))
    return {
        "loss": sum(losses.values()) / len(losses),
        "loss_by_time": losses,
        "frechet": frechet_distance(real, drawn),
        "frechet_reconstructed": frechet_distance(real, copies),
        "features": features.name,
        "samples": len(drawn),
        "real_pictures": len(real),
        "steps": steps,
        "batch": BATCH,
        "training_pictures": len(moments),
        "parameters": sum(p.numel() for p in network.parameters()),
        "patch": network.config.patch,
    }


def batches(images: Images, count: int, device: torch.device) -> Any:
    """At most `count` pictures, spread over all of them, as float batches."""
    places = range(0, len(images), max(1, len(images) // count))[:count]
    for batch in images.chunks(places, AT_ONCE, "encoding"):
        yield to_unit(batch.data.to(device))


@torch.no_grad()
def encode_all(model: Autoencoder, images: Images, count: int, device: torch.device) -> Tensor:
    """Their moments, on the CPU."""
    return torch.cat([model.encode(part).cpu() for part in batches(images, count, device)])


def denoiser(moments: Tensor, model: Autoencoder) -> Any:
    """The probe's network, freshly initialised."""
    height, width = moments.shape[2:]
    fitting = [p for p in (1, 2, 4, 8, 16) if height % p == width % p == 0 and height * width <= TOKENS * p * p]
    shape = DiT(width=128, depth=4, heads=4, patch=next(iter(fitting), 1), text="none", pooled=False, base_size=height)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = shape.build(channels=model.latent_channels, context_dim=1)
    return network.to(model.norm.scale.device)


def nothing(count: int, device: torch.device) -> Cond:
    """The condition of a network that reads none."""
    return Cond(torch.zeros(count, 1, 1, device=device), torch.ones(count, 1, dtype=torch.bool, device=device))


class Draws:
    """Moments in memory, drawn with replacement by a generator of its own: as a data set, one sample a draw."""

    def __init__(self, moments: Tensor, steps: int) -> None:
        order = torch.Generator().manual_seed(SEED)
        chosen = [torch.randint(len(moments), (BATCH,), generator=order) for _ in range(steps)]
        self.moments, self.chosen = moments, torch.cat(chosen)
        self.shards = SimpleNamespace(windows=(), buckets={}, remote=None, key=str)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitems__(self, slots: list[Slot]) -> Batch:
        places = torch.tensor([slot.slot for slot in slots])
        return Batch(self.moments[self.chosen[places]], places, [""] * len(slots))


class ProbeStage(StatelessStage):
    """Flow matching without captions, its noise keyed by the draw."""

    def __init__(self, network: Any, model: Autoencoder, moments: Tensor, held_out: Tensor, steps: int) -> None:
        self.network, self.model, self.held_out = network, model, held_out
        self.dataset: Any = Draws(moments, steps)
        self.networks: dict[str, Any] = {"probe": network}
        self.averaged, self.optimizers, self.score = self.networks, {"probe": (["probe"], 1.0)}, ("loss", 1.0)
        self.losses: dict[str, float] = {}  # of the last look, by time

    def connect(self) -> None:
        """Every training call goes through the process wrapper."""
        self.forward = self.wrapped["probe"]

    def compiled_parts(self) -> tuple[nn.Module, ...]:
        """None: its settings never ask for it."""
        return ()

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """One micro-batch of latents: the flow-matching loss, its noise keyed by the draw."""
        device = self.accelerator.device
        noise = Noise(batch.slots.to(device)).fold("probe", SEED)
        x0 = latents(self.model, batch.data, noise)
        loss = OBJECTIVE(self.forward, x0, nothing(len(x0), device), noise).mean()
        self.accelerator.backward(loss * share)
        return {"loss": loss.detach()}

    def evaluate(self, folder: Path) -> dict[str, float]:
        """The mean held-out loss; the losses by time stay in `losses`. Draws no pictures."""
        self.losses = held_out_loss(self.network, self.model, self.held_out)
        return {"loss": sum(self.losses.values()) / len(self.losses)}


def fit(network: Any, model: Autoencoder, moments: Tensor, held_out: Tensor, steps: int) -> dict[str, float]:
    """AdamW, its rate warmed up and then falling to 0, so that the last weights need no averaging.

    Returns the held-out loss by time. Ends the program where a signal asked for it.
    """
    stage = ProbeStage(network, model, moments, held_out, steps)
    settings = Optimizer(lr=RATE, betas=(0.9, 0.99), weight_decay=0.0, clip=1.0)
    accelerator, rate = processes.start(str(next(network.parameters()).device)), partial(falling, steps)
    with TemporaryDirectory() as folder:
        short_run(stage, settings, accelerator, Path(folder), steps=steps, batch_size=BATCH, seed=SEED, rate=rate)
    return stage.losses


def falling(steps: int, step: int) -> float:
    """The rate of a 0-based step: RATE (step + 1) / WARMUP, and from where that is less RATE (1 - step / steps)."""
    return RATE * min((step + 1) / WARMUP, 1 - step / steps)


def latents(model: Autoencoder, moments: Tensor, noise: Noise) -> Tensor:
    """Normalised latents, drawn from the posterior where there is one."""
    shape = (model.latent_channels, *moments.shape[2:])
    return model.norm.latents(moments.to(noise.seeds.device), noise.normal(shape, "posterior"))


@torch.no_grad()
def held_out_loss(network: Any, model: Autoencoder, moments: Tensor) -> dict[str, float]:
    """The mean loss at fixed times, of fixed noise."""
    device, losses = next(network.parameters()).device, {}
    for t in LEVELS:
        rows = []
        for first in range(0, len(moments), BATCH):
            part = moments[first : first + BATCH]
            noise = Noise.from_seeds(range(first, first + len(part)), device).fold("held out", str(t))
            x0 = latents(model, part, noise)
            at = torch.full((len(part),), t, dtype=torch.float64, device=double_device(device))
            eps = noise.normal(x0.shape[1:], "eps")
            rows.append(OBJECTIVE.at(network, x0, nothing(len(part), device), at, eps))
        losses[str(t)] = torch.cat(rows).mean().item()
    return losses


@torch.no_grad()
def draw(network: Any, model: Autoencoder, noise: Noise, size: tuple[int, ...]) -> Tensor:
    """Decoded samples, one for each seed: uint8 (B, image_channels, H, W)."""
    denoise = Denoiser(network, DIFFUSION).bind(nothing(len(noise), noise.seeds.device))
    begin = prior(DIFFUSION.schedule, (model.latent_channels, *size), noise)
    grid = Uniform()(SAMPLING_STEPS, DIFFUSION.schedule)
    return to_uint8(model.decode(sample(Euler(), denoise, begin, grid, noise)))
