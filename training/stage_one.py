"""Stage one's gradient step and evaluation: reconstruction + LPIPS + KL + patch-GAN, balanced at the last layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoencoder.adversarial import adaptive_weight, last_layer_gradients, split_gradients, surrogate
from autoencoder.base import Autoencoder
from autoencoder.fidelity import psnr, ssim
from autoencoder.images import to_uint8, to_unit
from autoencoder.losses import ADVERSARIALS, RECONSTRUCTIONS
from autoencoder.norm import LatentStatistics
from autoencoder.perceptual import Perceptual
from ldm.noise import Noise
from training import pictures
from training.config import AutoencoderConfig
from training.data import Batch, Images
from training.loop import Stage
from training.order import Slot

if TYPE_CHECKING:
    from accelerate import Accelerator

SHOWN = 8  # columns of the picture grid
MEASURED = 10_000  # images that the latent normaliser is measured on


class AutoencoderStage(Stage):
    """Trains `model` and, unless the adversarial weight is 0, its discriminator.

    The two parts of the decoder's gradient are taken at the reconstruction and go through the network in one backward
    pass. Their balance uses the last layer's gradients over the whole global batch of the step before (checkpointed
    state), so that it does not depend on how the batch is split over micro-batches and processes.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        model: Autoencoder,
        discriminator: nn.Module,
        perceptual: Perceptual | None,
        dataset: Images,
        held_out: Images,
    ) -> None:
        self.config, self.loss, self.seed = config, config.loss, config.train.seed
        self.model, self.discriminator, self.perceptual = model, discriminator, perceptual
        self.dataset, self.held_out = dataset, held_out
        self.networks, self.optimizers = {"autoencoder": model}, {"autoencoder": (["autoencoder"], 1.0)}
        if self.loss.adversarial:
            self.networks["discriminator"] = discriminator
            self.optimizers["discriminator"] = (["discriminator"], self.loss.discriminator_lr)
        self.averaged = {"autoencoder": model}
        self.distance = next(member for member in RECONSTRUCTIONS if member().kind == self.loss.reconstruction)()
        self.game = next(member for member in ADVERSARIALS if member().kind == self.loss.adversarial_loss)()
        self.balance = torch.zeros(())
        self.sums: Tensor | None = None  # both gradients at the last layer, this step's so far
        self.forward: Any = model
        self.judge: Any = discriminator

    def wrap(self, accelerator: Accelerator) -> None:
        """Every training call goes through the process wrappers, which average gradients."""
        self.accelerator = accelerator
        self.forward, self.balance = accelerator.prepare(self.model), self.balance.to(accelerator.device)
        self.wrapped = {"autoencoder": self.forward}
        if self.perceptual:
            self.perceptual.to(accelerator.device).to(memory_format=torch.channels_last)
        if self.loss.adversarial:
            self.judge = accelerator.prepare(self.discriminator)
            self.wrapped["discriminator"] = self.judge
        else:
            self.discriminator.to(accelerator.device)

    def ramp(self, step: int) -> float:
        """The share of the adversarial gradient that reaches the decoder: 0 before its start, then linearly to 1."""
        if not self.loss.adversarial or step < self.loss.adversarial_start:
            return 0.0
        return min(1.0, (step - self.loss.adversarial_start + 1) / max(1, self.loss.adversarial_ramp))

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """One micro-batch: the decoder's balanced gradient, then the discriminator's own."""
        images = to_unit(batch.data.to(self.accelerator.device, non_blocking=True))
        with self.accelerator.autocast():
            x_hat, moments = self.forward(images, self.noise(batch.slots, images, step))
        latent = self.model.regularisation(moments).mean() / images[0].numel()
        playing = self.ramp(step + 1) > 0  # the step before the start measures the first balance
        split = split_gradients(x_hat, lambda x: self.reconstruction(x, images), self.fool if playing else None)
        gradient = split.reconstruction
        if playing:
            measured = torch.stack(last_layer_gradients(x_hat, self.model.last_layer, split)) * share
            self.sums = measured if self.sums is None else self.sums + measured
            gradient = gradient + self.loss.adversarial * self.ramp(step) * self.balance * split.adversarial
        self.accelerator.backward((surrogate(x_hat, gradient) + self.loss.kl * latent) * share)
        values: dict[str, Tensor] = {
            "loss": split.reconstruction_loss + self.loss.kl * latent,
            "kl": latent,
            "adversarial": split.adversarial_loss,
            "balance": self.balance,
        }
        if self.loss.adversarial and step >= self.loss.discriminator_start:
            values["discriminator"] = self.judge_step(images, x_hat.detach(), share)
        return values

    def reconstruction(self, x_hat: Tensor, images: Tensor) -> Tensor:
        """Mean over the batch of distance + weight * LPIPS."""
        loss = self.distance(x_hat, images).mean()
        if self.perceptual and self.loss.perceptual:
            loss = loss + self.loss.perceptual * self.perceptual(x_hat, images).mean()
        return loss

    def fool(self, x_hat: Tensor) -> Tensor:
        """The decoder's adversarial loss, through the bare discriminator: its own gradient is not wanted here."""
        with self.accelerator.autocast():
            logits = self.discriminator(x_hat)
        return self.game.generator(logits.float()).mean()

    def judge_step(self, images: Tensor, fakes: Tensor, share: float) -> Tensor:
        """Add the discriminator's gradient, from images and detached reconstructions."""
        with self.accelerator.autocast():
            logits = self.judge(torch.cat([images, fakes])).float()
        real, fake = logits.chunk(2)
        loss = self.game.discriminator(real, fake).mean()
        self.accelerator.backward(loss * share)
        return loss.detach()

    def noise(self, slots: Tensor, images: Tensor, step: int) -> Tensor:
        """The posterior's draw, keyed by (seed, step, slot)."""
        h, w = images.shape[-2] // self.model.factor, images.shape[-1] // self.model.factor
        return Noise(slots.to(images.device)).normal((self.model.latent_channels, h, w), self.seed, step, "posterior")

    def after_backward(self, step: int) -> None:
        """Measure the balance that the next step uses: gradients averaged over the global batch before their norms."""
        if self.sums is not None:
            rec, adv = self.accelerator.reduce(self.sums, "mean")
            self.balance, self.sums = adaptive_weight(rec.norm(), adv.norm()), None

    def state(self) -> dict[str, Any]:
        return {"balance": float(self.balance)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.balance = torch.tensor(float(state["balance"]), device=self.accelerator.device)

    def evaluate(self, folder: Path) -> dict[str, float]:
        """PSNR, SSIM, LPIPS of held-out reconstructions (posterior mean, 8-bit); a grid of input, output, error."""
        rows: dict[str, list[Tensor]] = {name: [] for name in ("psnr", "ssim", "lpips")[: 3 if self.perceptual else 2]}
        for images in self.looks(self.held_out, self.config.train.validation_size):
            pixels, ours = to_uint8(images), to_uint8(self.model(images, None)[0])
            rows["psnr"].append(psnr(ours, pixels))
            rows["ssim"].append(ssim(ours, pixels))
            if self.perceptual:
                rows["lpips"].append(self.perceptual(to_unit(ours), images))
            if len(rows["psnr"]) == 1:
                shown = [
                    p[:SHOWN].cpu()
                    for p in (pixels, ours, (ours.int() - pixels.int()).abs().mul(2).clamp(max=255).byte())
                ]
                pictures.grid(torch.cat(shown), SHOWN, rows=["input", "reconstruction", "difference x2"]).save(
                    folder / "grid.png"
                )
        return {name: torch.cat(values).mean().item() for name, values in rows.items()}

    def looks(self, dataset: Images, count: int, size: int = 64) -> Any:
        """The first `count` images as float batches."""
        count = min(count, len(dataset)) or len(dataset)
        for first in range(0, count, size):
            batch = dataset.__getitems__([Slot(i, 0, i) for i in range(first, min(count, first + size))])
            yield to_unit(batch.data.to(self.accelerator.device))

    @torch.no_grad()
    def normalise(self) -> None:
        """The last act: measure per-channel shift and scale of z with the weights in place, evenly over the data."""
        statistics = LatentStatistics(self.model.norm, self.model.latent_channels)
        stride = max(1, len(self.dataset) // MEASURED)
        chosen = range(0, len(self.dataset), stride)[:MEASURED]
        for first in range(0, len(chosen), 64):
            batch = self.dataset.__getitems__([Slot(i, 0, i) for i in chosen[first : first + 64]])
            statistics.add(self.model.encode(to_unit(batch.data.to(self.accelerator.device))))
        statistics.fit()
