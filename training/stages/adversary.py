"""The critic's half of stage one's step: what the decoder must do to fool it, and what it learns itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoencoder.critic import augment, lecam, move_anchors, r1
from autoencoder.discriminator import maps
from autoencoder.losses import ADVERSARIALS, of_kind
from training.settings.sections import Loss

if TYPE_CHECKING:
    from accelerate import Accelerator


class Adversary:
    """A discriminator and how it plays. Nothing here changes within a step: a step may be undone and taken again."""

    accelerator: Accelerator

    def __init__(self, loss: Loss, discriminator: nn.Module) -> None:
        self.loss, self.discriminator = loss, discriminator
        self.game = of_kind(ADVERSARIALS, loss.adversarial_loss)
        self.judge: Any = discriminator  # as the processes share it
        self.anchors: Tensor | None = None  # moving averages of the logits of images and reconstructions

    def decoder_loss(self, x_hat: Tensor, uniform: Tensor) -> Tensor:
        """The decoder's adversarial loss, through the bare discriminator: its own gradient is not wanted here."""
        with self.accelerator.autocast():
            logits = maps(self.discriminator(augment(x_hat, uniform, self.loss.augment)))
        return torch.stack([self.game.generator(fake).mean() for fake in logits]).mean()

    def learn(
        self, images: Tensor, fakes: Tensor, uniform: Tensor, step: int, share: float
    ) -> tuple[Tensor, Tensor | None]:
        """Add the discriminator's gradient, from images and detached reconstructions, `share` of the global batch.

        Returns its loss and, where LeCAM needs them, the mean logits (2,) of both. R1 is taken every `r1_every` steps
        at as many times its weight, for the same mean pull at less cost (lazy regularisation, Karras et al. 2020,
        section 3.1).
        """
        takes_r1 = bool(self.loss.r1) and step % self.loss.r1_every == 0
        images = images.requires_grad_(takes_r1)
        both = augment(torch.cat([images, fakes]), uniform.repeat(2, 1), self.loss.augment)
        # What is compiled has no second derivative, which R1 asks for.
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager" if takes_r1 else "default"):
            logits = maps(self.judge(both))
        pairs = [part.chunk(2) for part in logits]
        loss = torch.stack([self.game.discriminator(real, fake).mean() for real, fake in pairs]).mean()
        total, means = loss, None
        if takes_r1:
            total = total + self.loss.r1 * self.loss.r1_every * r1([real for real, _ in pairs], images).mean()
        if self.loss.lecam:
            means = torch.stack([torch.stack([real.mean(), fake.mean()]) for real, fake in pairs]).mean(0).detach()
            if self.anchors is not None:
                pull = torch.stack([lecam(real, fake, self.anchors).mean() for real, fake in pairs]).mean()
                total = total + self.loss.lecam * pull
        self.accelerator.backward(total * share)
        return loss.detach(), means

    def remember(self, means: Tensor) -> None:
        """Move the anchors after a step whose mean logits over the global batch are means (2,)."""
        self.anchors = move_anchors(self.anchors, means)
