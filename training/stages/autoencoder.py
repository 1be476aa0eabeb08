"""Stage one's gradient step and evaluation: reconstruction + LPIPS + KL + patch-GAN, balanced at the last layer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.adversarial import Split, adaptive_weight, last_layer_gradients, split_gradients, surrogate
from autoencoder.alignment import Alignment, Tap, VisionFeatures
from autoencoder.base import Autoencoder
from autoencoder.critic import AUGMENTED_BY, Plateau
from autoencoder.discriminator import LEAST_SIDE
from autoencoder.images import to_unit
from autoencoder.losses import RECONSTRUCTIONS, LogVariance, of_kind
from autoencoder.perceptual import Perceptual
from autoencoder.quantizer import Quantizer, identity
from autoencoder.regularisers import Move
from ldm.noise import Noise
from training.data.images import Images
from training.data.samples import Batch
from training.loop.rollback import Rollback
from training.loop.stage import Stage
from training.loop.validation import CHUNK, as_many
from training.models.latent_scale import fit_norm
from training.models.reconstructions import mean_psnr, measure
from training.settings.decoding import AutoencoderConfig
from training.stages.adversary import Adversary
from training.stages.checks import check_returns


class AutoencoderStage(Stage):
    """Trains `model` and, unless the adversarial weight is 0, its discriminator.

    The two parts of the decoder's gradient are taken at the reconstruction and go through the network in one backward
    pass. Their balance uses the last layer's gradients over the whole global batch of the step before (checkpointed
    state), so that it does not depend on how the batch is split over micro-batches and processes.
    """

    dataset: Images

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
        self.vision, self.frozen = vision, [part for part in (perceptual, vision) if part is not None]
        if not self.loss.adversarial:
            self.frozen.append(discriminator)
        if vision:
            margins = self.loss.align_cosine_margin, self.loss.align_distance_margin
            self.networks["alignment"] = Alignment(model.latent_channels, vision.width, *margins)
            self.optimizers["alignment"] = (["alignment"], 1.0)
        self.averaged, self.score = {"autoencoder": model}, ("psnr", -1.0)
        self.training_score = self.psnr_of_training
        self.distance = of_kind(RECONSTRUCTIONS, self.loss.reconstruction)
        self.adversary = Adversary(self.loss, discriminator)
        self.balance = torch.zeros(())
        self.sums: Tensor | None = None  # both gradients at the last layer, this step's so far
        self.logits: Tensor | None = None  # mean logits of images and reconstructions, this step's so far
        self.align_balance = torch.zeros(())  # what multiplies the alignment's weight where that is adaptive
        self.pulls: Tensor | None = None  # squared gradients of decoder and alignment at z, this step's so far
        self.plateau = Plateau(self.loss.plateau, self.loss.plateau_steps)
        self.level: Tensor | None = None  # the reconstruction loss, this step's so far
        self.start = None if self.loss.plateau else self.loss.adversarial_start
        if self.loss.return_margin:
            margin, pause, limit = self.loss.return_margin, self.loss.return_pause, self.loss.return_limit
            self.rollback = Rollback(margin, pause, limit, self.ramp)
        self.codes = model.quantize if isinstance(model.quantize, Quantizer) and model.quantize.adapts else None
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []  # slots, z, codes of this step, for a codebook to follow
        self.forward: Any = model

    def connect(self) -> None:
        """Every training call goes through the process wrappers; the balances live where the gradients do."""
        device, self.forward = self.accelerator.device, self.wrapped["autoencoder"]
        self.adversary.accelerator = self.accelerator
        self.adversary.judge = self.wrapped.get("discriminator", self.discriminator)
        self.balance, self.align_balance = self.balance.to(device), self.align_balance.to(device)

    def compiled_parts(self) -> Iterator[nn.Module]:
        """All but the decoder's last layer, through which alone the balance takes its gradients."""
        model: Any = self.model
        groups = [[*c] if isinstance(c, nn.ModuleList | nn.Sequential) else [c] for c in model.decoder.children()]
        blocks = [block for group in groups for block in group if any(True for _ in block.children())]
        for part in filter(None, (model.encoder, *blocks, self.discriminator, self.perceptual)):
            if not any(p is model.last_layer for p in part.parameters()):
                yield part

    def ramp(self, step: int) -> float:
        """The share of the adversarial gradient that reaches the decoder: 0 before its start, then linearly to 1, or
        less after a return.
        """
        if not self.loss.adversarial or self.start is None or step < self.start:
            return 0.0
        full = self.rollback.weight if self.rollback else 1.0
        return full * min(1.0, (step - self.start + 1) / max(1, self.loss.adversarial_ramp))

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """One micro-batch: the decoder's balanced gradient, then the discriminator's own."""
        images = to_unit(batch.data.to(self.accelerator.device, non_blocking=True))
        slots, move = batch.slots.to(images.device, non_blocking=True), self.move(images, step)
        noise = posterior_noise(self.model, images, slots, self.seed, step)
        tap = Tap(move or identity) if self.loss.align_adaptive else None
        with self.accelerator.autocast():
            x_hat, moments = self.forward(images, noise, *filter(None, [tap or move]))
        # What is asked of the latents goes by the moments, which are of the picture as it was. The decoder saw moved
        # latents: from here on the picture moved alike is what its output is compared with.
        latent, penalty = self.latent_terms(moments, images)
        alignment, pull_square = self.align(moments, images)
        images = move(images, self.model.factor) if move else images
        uniform = Noise(slots).uniform((AUGMENTED_BY,), self.seed, step, "augment")
        playing = self.ramp(step + 1) > 0  # the step before the start measures the first balance
        fool = (lambda x: self.adversary.decoder_loss(x, uniform)) if playing else None
        parts, variance_loss = self.weigh(split_gradients(x_hat, lambda x: self.reconstruction(x, images), fool))
        gradient = parts.reconstruction
        if playing:
            # The balance used is that of the step before: this step's needs the gradients of all micro-batches of all
            # processes, for it divides norms of mean gradients, which are not means of norms.
            gradients_here = torch.stack(last_layer_gradients(x_hat, self.model.last_layer, parts)) * share
            self.sums = add_part(self.sums, gradients_here)
            gradient = gradient + self.loss.adversarial * self.ramp(step) * self.balance * parts.adversarial
        # One pass for all terms: a second would cost as much again, and the process wrapper would average in both.
        self.accelerator.backward((surrogate(x_hat, gradient) + penalty + alignment + variance_loss) * share)
        self.note(parts, moments, slots, share)
        if tap:  # which has heard the decoder only now that the pass is done
            self.pulls = add_part(self.pulls, torch.stack([tap.square / self.scale**2, pull_square * share**2]))
        values = self.values(parts, latent, penalty, alignment)
        if self.loss.adversarial and step >= self.loss.discriminator_start:
            # After the autoencoder's pass: R1 has images take gradients. Detached: the graphs have nothing in common.
            values["discriminator"], logits = self.adversary.learn(images, x_hat.detach(), uniform, step, share)
            self.logits = add_part(self.logits, logits * share) if logits is not None else None
        return values

    def values(self, parts: Split, latent: Tensor, penalty: Tensor, alignment: Tensor) -> dict[str, Tensor]:
        """What the log holds of a micro-batch, detached (0-dim); `latent` is before its weight, `penalty` after it."""
        values: dict[str, Tensor] = {
            "loss": parts.reconstruction_loss + (penalty + alignment).detach(),
            "codebook" if self.model.quantize else "kl": latent.detach(),
            "adversarial": parts.adversarial_loss,
            "balance": self.balance,
        }
        values |= {"alignment": alignment.detach()} if self.vision else {}
        return values | ({"align_balance": self.align_balance} if self.loss.align_adaptive else {})

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

    def align(self, moments: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """What is asked of the mean latents beside the vision model's features of the images, weighted; and where its
        weight is adaptive, the squared norm of its gradient at the moments before any weight.
        """
        none = images.new_zeros(())
        if not self.vision:
            return none, none
        z = self.model.norm.mean_latents(moments)
        with self.accelerator.autocast():
            features = self.vision(images, (z.shape[2], z.shape[3]))
        loss = self.wrapped["alignment"](z, features).mean()
        if not self.loss.align_adaptive:
            return self.loss.align * loss, none
        (slope,) = torch.autograd.grad(loss, moments, retain_graph=True)  # through the small head alone
        return self.loss.align * self.align_balance * loss, slope.square().sum()

    @property
    def scale(self) -> float:
        """What fp16's scaler multiplies the gradients of a backward pass by."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0

    def weigh(self, split: Split) -> tuple[Split, Tensor | float]:
        """The split under the learned log-variance s, and the loss that trains s (0 where s is fixed)."""
        if self.log_variance is None:
            return split, 0.0
        loss: Tensor = self.wrapped["log_variance"](split.reconstruction_loss)
        scale = (-self.log_variance.value.detach()).exp()
        scaled = split._replace(reconstruction=split.reconstruction * scale, reconstruction_loss=loss.detach())
        return scaled, loss

    def note(self, split: Split, moments: Tensor, slots: Tensor, share: float) -> None:
        """Keep what `after_backward` needs of this micro-batch."""
        if self.loss.plateau:
            self.level = add_part(self.level, split.reconstruction_loss * share)
        if self.codes:
            self.seen.append((slots, moments.detach(), self.codes.indices(moments)))

    def reconstruction(self, x_hat: Tensor, images: Tensor) -> Tensor:
        """Mean over the batch of distance + weight * LPIPS."""
        loss: Tensor = self.distance(x_hat, images).mean()
        if self.perceptual and self.loss.perceptual:
            loss = loss + self.loss.perceptual * self.perceptual(x_hat, images).mean()
        return loss

    def after_backward(self, step: int) -> None:
        """Measure what the next step uses, over the global batch: gradients are averaged before their norms."""
        if self.sums is not None:
            rec, adv = self.accelerator.reduce(self.sums, "mean")
            self.balance, self.sums = adaptive_weight(rec.norm(), adv.norm()), None
        if self.pulls is not None:  # each image has its own z: over the global batch the squares add up
            ours, theirs = self.accelerator.reduce(self.pulls, "sum").sqrt()
            self.align_balance, self.pulls = adaptive_weight(ours, theirs), None
        if self.logits is not None:
            self.adversary.remember(self.accelerator.reduce(self.logits, "mean"))
            self.logits = None
        if self.level is not None:
            reached = self.plateau.add(self.accelerator.reduce(self.level, "mean"))
            if reached and self.start is None:
                self.start = max(self.loss.adversarial_start, step + 2)  # the step between measures the balance
            self.level = None
        if self.codes and self.seen:
            slots, z, nearest = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
            seed = torch.full((1,), self.seed, dtype=torch.int64, device=z.device)  # made there: a copy would wait
            uniform = Noise(seed).uniform((self.codes.codes,), step, "revival")[0]
            reduce = partial(self.accelerator.reduce, reduction="sum")
            self.codes.adapt_(step, z, slots, uniform, reduce, self.accelerator.gather, nearest)
            self.seen.clear()

    def state(self) -> dict[str, Any]:
        """The balances, LeCAM's anchors, the plateau and the returns: all that steps carry over beside weights."""
        plateau = {**vars(self.plateau), "total": float(self.plateau.total), "start": self.start}
        anchors = None if self.adversary.anchors is None else self.adversary.anchors.tolist()
        counted = self.rollback and self.rollback.count
        returns = {"returns": {"count": counted, "start": self.start}} if counted else {}
        alignment = {"align_balance": float(self.align_balance)} if self.loss.align_adaptive else {}
        return {"balance": float(self.balance), "anchors": anchors, "plateau": plateau, **returns, **alignment}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; checkpoints of earlier versions lack some of it."""
        self.balance = torch.tensor(float(state["balance"]), device=self.accelerator.device)
        self.align_balance = self.balance.new_tensor(float(state.get("align_balance", 0.0)))
        anchors = state.get("anchors")  # absent from checkpoints of earlier versions
        self.adversary.anchors = torch.tensor(anchors, device=self.accelerator.device) if anchors else None
        if self.loss.plateau and "plateau" in state:
            plateau = dict(state["plateau"])
            self.start = plateau.pop("start")
            self.plateau = Plateau(**{**plateau, "share": self.loss.plateau, "steps": self.loss.plateau_steps})
        if self.rollback and "returns" in state:
            self.rollback.count, self.start = state["returns"]["count"], state["returns"]["start"]

    def evaluate(self, folder: Path) -> dict[str, float]:
        """PSNR, SSIM, LPIPS of held-out reconstructions (posterior mean, 8-bit); a grid of input, output, error."""
        places = self.held_out.evenly(self.config.train.validation_size)
        batches = self.held_out.chunks(places, CHUNK, "validating")
        pixels = (batch.data.to(self.accelerator.device) for batch in batches)
        return measure(self.model, self.perceptual, pixels, folder)

    def psnr_of_training(self) -> float | None:
        """The PSNR of as many training pictures."""
        batches = as_many(self.dataset, self.held_out.evenly(self.config.train.validation_size))
        return None if batches is None else mean_psnr(self.model, (batch.data for batch in batches))

    def normalise(self) -> None:
        """The last act: measure per-channel shift and scale of z with the weights in place, evenly over the data."""
        fit_norm(self.model, self.dataset)


def add_part(total: Tensor | None, part: Tensor) -> Tensor:
    """A sum begun with its first part. Not in place: a step may be undone and taken again."""
    return part if total is None else total + part


def posterior_noise(model: Autoencoder, images: Tensor, slots: Tensor, seed: int, step: int) -> Tensor:
    """The posterior's draw for each image, keyed by (seed, step, slot)."""
    h, w = images.shape[-2] // model.factor, images.shape[-1] // model.factor
    return Noise(slots.to(images.device)).normal((model.latent_channels, h, w), seed, step, "posterior")
