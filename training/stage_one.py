"""Stage one's gradient step and evaluation: reconstruction + LPIPS + KL + patch-GAN, balanced at the last layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoencoder.adversarial import Split, adaptive_weight, last_layer_gradients, split_gradients, surrogate
from autoencoder.alignment import Alignment, VisionFeatures
from autoencoder.base import Autoencoder
from autoencoder.critic import AUGMENTED_BY, Plateau, augment, lecam, move_anchors, r1
from autoencoder.discriminator import LEAST_SIDE, maps
from autoencoder.images import to_unit
from autoencoder.losses import ADVERSARIALS, RECONSTRUCTIONS, LogVariance, of_kind
from autoencoder.norm import LatentStatistics
from autoencoder.perceptual import Perceptual
from autoencoder.quantizer import Quantizer
from autoencoder.regularisers import Move
from ldm.noise import Noise
from training.config import AutoencoderConfig
from training.data import Batch, Images
from training.looking import Returns, check_returns
from training.loop import Stage
from training.reconstructions import measure

if TYPE_CHECKING:
    from accelerate import Accelerator

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
        vision: VisionFeatures | None = None,
    ) -> None:
        self.config, self.loss, self.seed = config, config.loss, config.train.seed
        check_returns(config.loss, config.train)
        self.model, self.discriminator, self.perceptual = model, discriminator, perceptual
        self.dataset, self.held_out = dataset, held_out
        self.networks, self.optimizers = {"autoencoder": model}, {"autoencoder": (["autoencoder"], 1.0)}
        if self.loss.adversarial:
            self.networks["discriminator"] = discriminator
            self.optimizers["discriminator"] = (["discriminator"], self.loss.discriminator_lr)
        self.log_variance = LogVariance() if self.loss.log_variance == "learned" else None
        if self.log_variance:
            self.networks["log_variance"] = self.log_variance
            self.optimizers["log_variance"] = (["log_variance"], 1.0)
        self.vision = vision
        if vision:
            margins = self.loss.align_cosine_margin, self.loss.align_distance_margin
            self.networks["alignment"] = Alignment(model.latent_channels, vision.width, *margins)
            self.optimizers["alignment"] = (["alignment"], 1.0)
        self.averaged, self.score = {"autoencoder": model}, ("psnr", -1.0)
        self.distance = of_kind(RECONSTRUCTIONS, self.loss.reconstruction)
        self.game = of_kind(ADVERSARIALS, self.loss.adversarial_loss)
        self.balance = torch.zeros(())
        self.sums: Tensor | None = None  # both gradients at the last layer, this step's so far
        self.anchors: Tensor | None = None  # moving averages of the logits of images and reconstructions
        self.logits: Tensor | None = None  # their means, this step's so far
        self.plateau = Plateau(self.loss.plateau, self.loss.plateau_steps)
        self.level: Tensor | None = None  # the reconstruction loss, this step's so far
        self.start = None if self.loss.plateau else self.loss.adversarial_start
        if self.loss.return_margin:
            margin, pause, limit = self.loss.return_margin, self.loss.return_pause, self.loss.return_limit
            self.returns = Returns(margin, pause, limit, self.ramp)
        self.codes = model.quantize if isinstance(model.quantize, Quantizer) and model.quantize.adapts else None
        self.seen: list[tuple[Tensor, Tensor]] = []  # slots and z of this step, for a codebook that follows them
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
        if self.vision:
            self.vision.to(accelerator.device)
        for name in [name for name in self.networks if name not in self.wrapped]:  # in one order everywhere
            self.wrapped[name] = accelerator.prepare(self.networks[name])
        model: Any = self.model  # compiled but for its last layer, through which alone the balance takes its gradients
        groups = [[*c] if isinstance(c, nn.ModuleList | nn.Sequential) else [c] for c in model.decoder.children()]
        blocks = [block for group in groups for block in group if any(True for _ in block.children())]
        for part in filter(None, (model.encoder, *blocks, self.discriminator, self.perceptual)):
            if self.config.train.compile and not any(p is model.last_layer for p in part.parameters()):
                part.compile()

    def ramp(self, step: int) -> float:
        """The share of the adversarial gradient that reaches the decoder: 0 before its start, then linearly to 1, or
        less after a return.
        """
        if not self.loss.adversarial or self.start is None or step < self.start:
            return 0.0
        whole = self.returns.weight if self.returns else 1.0
        return whole * min(1.0, (step - self.start + 1) / max(1, self.loss.adversarial_ramp))

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """One micro-batch: the decoder's balanced gradient, then the discriminator's own."""
        images = to_unit(batch.data.to(self.accelerator.device, non_blocking=True))
        slots, move = batch.slots.to(images.device), self.move(images, step)
        noise = posterior_noise(self.model, images, slots, self.seed, step)
        with self.accelerator.autocast():
            x_hat, moments = self.forward(images, noise, *([move] if move else []))
        latent, penalty = self.latent_terms(moments, images)
        aligned = self.align(moments, images)
        images = move(images, self.model.factor) if move else images
        uniform = Noise(slots).uniform((AUGMENTED_BY,), self.seed, step, "augment")
        playing = self.ramp(step + 1) > 0  # the step before the start measures the first balance
        fool = (lambda x: self.fool(x, uniform)) if playing else None
        split, spread = self.weigh(split_gradients(x_hat, lambda x: self.reconstruction(x, images), fool))
        gradient = split.reconstruction
        if playing:
            measured = torch.stack(last_layer_gradients(x_hat, self.model.last_layer, split)) * share
            self.sums = measured if self.sums is None else self.sums + measured
            gradient = gradient + self.loss.adversarial * self.ramp(step) * self.balance * split.adversarial
        self.accelerator.backward((surrogate(x_hat, gradient) + penalty + aligned + spread) * share)
        self.note(split, moments, slots, share)
        values: dict[str, Tensor] = {
            "loss": split.reconstruction_loss + (penalty + aligned).detach(),
            "codebook" if self.model.quantize else "kl": latent.detach(),
            "adversarial": split.adversarial_loss,
            "balance": self.balance,
        }
        if self.vision:
            values["alignment"] = aligned.detach()
        if self.loss.adversarial and step >= self.loss.discriminator_start:
            values["discriminator"] = self.judge_step(images, x_hat.detach(), uniform, share)
        return values

    def move(self, images: Tensor, step: int) -> Move | None:
        """How this step's latents and images are moved, the same for all its micro-batches and processes."""
        uniform = Noise.from_seeds([self.seed]).uniform((3,), step, "move")[0]
        cells = images.shape[-2] // self.model.factor, images.shape[-1] // self.model.factor
        smallest = LEAST_SIDE if self.perceptual else 1
        if self.loss.adversarial:
            smallest = max(smallest, self.config.discriminator.smallest_image)
        move: Move | None = self.config.latent.move(uniform, cells, -(-smallest // self.model.factor))
        return move

    def latent_terms(self, moments: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own regulariser (KL in nats per image value), and all that is asked of the latents, weighted."""
        latent = self.model.regularisation(moments, lambda value: self.accelerator.reduce(value, "mean")).mean()
        if self.model.norm.gaussian:
            latent = latent / images[0].numel()
        penalty = (self.loss.kl if self.model.norm.gaussian else self.loss.codebook) * latent
        more = self.config.latent.term(self.model.norm.mean_latents(moments), images)
        return latent, penalty if more is None else penalty + more.mean()

    def align(self, moments: Tensor, images: Tensor) -> Tensor:
        """What is asked of the mean latents beside the vision model's features of the images, weighted."""
        if not self.vision:
            return images.new_zeros(())
        z = self.model.norm.mean_latents(moments)
        with self.accelerator.autocast():
            features = self.vision(images, (z.shape[2], z.shape[3]))
        loss: Tensor = self.loss.align * self.wrapped["alignment"](z, features).mean()
        return loss

    def weigh(self, split: Split) -> tuple[Split, Tensor | float]:
        """The split under the learned log-variance s, and the loss that trains s (0 where s is fixed)."""
        if self.log_variance is None:
            return split, 0.0
        spread: Tensor = self.wrapped["log_variance"](split.reconstruction_loss)
        scale = (-self.log_variance.value.detach()).exp()
        scaled = split._replace(reconstruction=split.reconstruction * scale, reconstruction_loss=spread.detach())
        return scaled, spread

    def note(self, split: Split, moments: Tensor, slots: Tensor, share: float) -> None:
        """Keep what `after_backward` needs of this micro-batch."""
        if self.loss.plateau:
            level = split.reconstruction_loss * share
            self.level = level if self.level is None else self.level + level
        if self.codes:
            self.seen.append((slots, moments.detach()))

    def reconstruction(self, x_hat: Tensor, images: Tensor) -> Tensor:
        """Mean over the batch of distance + weight * LPIPS."""
        loss: Tensor = self.distance(x_hat, images).mean()
        if self.perceptual and self.loss.perceptual:
            loss = loss + self.loss.perceptual * self.perceptual(x_hat, images).mean()
        return loss

    def fool(self, x_hat: Tensor, uniform: Tensor) -> Tensor:
        """The decoder's adversarial loss, through the bare discriminator: its own gradient is not wanted here."""
        with self.accelerator.autocast():
            logits = maps(self.discriminator(augment(x_hat, uniform, self.loss.augment)))
        return torch.stack([self.game.generator(fake).mean() for fake in logits]).mean()

    def judge_step(self, images: Tensor, fakes: Tensor, uniform: Tensor, share: float) -> Tensor:
        """Add the discriminator's gradient, from images and detached reconstructions."""
        images = images.requires_grad_(bool(self.loss.r1))
        both = augment(torch.cat([images, fakes]), uniform.repeat(2, 1), self.loss.augment)
        with self.accelerator.autocast():
            logits = maps(self.judge(both))
        pairs = [part.chunk(2) for part in logits]
        loss = torch.stack([self.game.discriminator(real, fake).mean() for real, fake in pairs]).mean()
        total = loss
        if self.loss.r1:
            total = total + self.loss.r1 * r1([real for real, _ in pairs], images).mean()
        if self.loss.lecam:
            means = torch.stack([torch.stack([real.mean(), fake.mean()]) for real, fake in pairs]).mean(0) * share
            self.logits = means.detach() if self.logits is None else self.logits + means.detach()
            if self.anchors is not None:
                pull = torch.stack([lecam(real, fake, self.anchors).mean() for real, fake in pairs]).mean()
                total = total + self.loss.lecam * pull
        self.accelerator.backward(total * share)
        return loss.detach()

    def after_backward(self, step: int) -> None:
        """Measure what the next step uses, over the global batch: gradients are averaged before their norms."""
        if self.sums is not None:
            rec, adv = self.accelerator.reduce(self.sums, "mean")
            self.balance, self.sums = adaptive_weight(rec.norm(), adv.norm()), None
        if self.logits is not None:
            self.anchors = move_anchors(self.anchors, self.accelerator.reduce(self.logits, "mean"))
            self.logits = None
        if self.level is not None:
            reached = self.plateau.add(self.accelerator.reduce(self.level, "mean"))
            if reached and self.start is None:
                self.start = max(self.loss.adversarial_start, step + 2)  # the step between measures the balance
            self.level = None
        if self.codes:
            slots, z = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
            uniform = Noise.from_seeds([self.seed], z.device).uniform((self.codes.codes,), step, "revival")[0]
            self.codes.adapt_(
                step, z, slots, uniform, lambda value: self.accelerator.reduce(value, "sum"), self.accelerator.gather
            )
            self.seen.clear()

    def state(self) -> dict[str, Any]:
        plateau = {**vars(self.plateau), "total": float(self.plateau.total), "start": self.start}
        anchors = None if self.anchors is None else self.anchors.tolist()
        counted = self.returns and self.returns.count
        returns = {"returns": {"count": counted, "start": self.start}} if counted else {}
        return {"balance": float(self.balance), "anchors": anchors, "plateau": plateau, **returns}

    def load_state(self, state: dict[str, Any]) -> None:
        self.balance = torch.tensor(float(state["balance"]), device=self.accelerator.device)
        anchors = state.get("anchors")  # absent from checkpoints of earlier versions
        self.anchors = torch.tensor(anchors, device=self.accelerator.device) if anchors else None
        if self.loss.plateau and "plateau" in state:
            plateau = dict(state["plateau"])
            self.start = plateau.pop("start")
            self.plateau = Plateau(**{**plateau, "share": self.loss.plateau, "steps": self.loss.plateau_steps})
        if self.returns and "returns" in state:
            self.returns.count, self.start = state["returns"]["count"], state["returns"]["start"]

    def evaluate(self, folder: Path) -> dict[str, float]:
        """PSNR, SSIM, LPIPS of held-out reconstructions (posterior mean, 8-bit); a grid of input, output, error."""
        batches = self.held_out.chunks(self.held_out.first(self.config.train.validation_size), 64)
        shown = (to_unit(batch.data.to(self.accelerator.device)) for batch in batches)
        return measure(self.model, self.perceptual, shown, folder)

    @torch.no_grad()
    def normalise(self) -> None:
        """The last act: measure per-channel shift and scale of z with the weights in place, evenly over the data."""
        statistics = LatentStatistics(self.model.norm, self.model.latent_channels)
        stride = max(1, len(self.dataset) // MEASURED)
        for batch in self.dataset.chunks(range(0, len(self.dataset), stride)[:MEASURED], 64):
            statistics.add(self.model.encode(to_unit(batch.data.to(self.accelerator.device))))
        statistics.fit()


def posterior_noise(model: Autoencoder, images: Tensor, slots: Tensor, seed: int, step: int) -> Tensor:
    """The posterior's draw for each image, keyed by (seed, step, slot)."""
    h, w = images.shape[-2] // model.factor, images.shape[-1] // model.factor
    return Noise(slots.to(images.device)).normal((model.latent_channels, h, w), seed, step, "posterior")
