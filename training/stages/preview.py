"""A tiny autoencoder taught by a trained one: what its run is made of, its gradient step, its use as a preview."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from autoencoder.images import to_uint8, to_unit
from autoencoder.losses import RECONSTRUCTIONS, of_kind
from autoencoder.perceptual import Perceptual
from autoencoder.regularisers import Free
from autoencoder.tiny import Tiny, check_student, distillation
from training.data.images import Images
from training.data.samples import Batch
from training.errors import UserError, as_user_error
from training.loop.stage import StatelessStage
from training.messages import note
from training.models.autoencoders import finished_autoencoder, load_autoencoder
from training.models.reconstructions import Fidelity
from training.pictures import grids
from training.settings.decoding import AutoencoderConfig
from training.stages.autoencoder import posterior_noise

if TYPE_CHECKING:
    import argparse

SHOWN = 8  # columns of the picture grid
SHAPE = ("encoder_blocks", "decoder_blocks", "latent_channels")  # of a tiny model, as its teacher's latents ask


def fit_to_teacher(args: argparse.Namespace, config: AutoencoderConfig) -> tuple[AutoencoderConfig, Autoencoder | None]:
    """The teacher that --teacher names, if any, and the config with a tiny model fitted to its latents.

    What the command line says of the model stays as it is. Raises UserError for losses that distillation has not.
    """
    if not args.teacher:
        if config.model.kind == "tiny":
            note("without --teacher the tiny autoencoder learns latents of its own")
        return config, None
    finished_autoencoder(args.teacher)
    teacher, loss = load_autoencoder(args.teacher), config.loss
    more = loss.adversarial or loss.align or loss.return_margin or loss.log_variance == "learned"
    if more or not isinstance(config.latent, Free):
        what = "--teacher: distillation has no adversary, alignment, return, learned log-variance or latent regulariser"
        hint = "take --config tiny, or set loss.adversarial 0, latent.kind free and so on"
        raise UserError(what, hint=hint)
    if isinstance(config.model, Tiny):
        shape = {name: getattr(config.model, name) for name in SHAPE if f"model.{name}" in args.overrides}
        with as_user_error("leave the model's shape to the teacher"):
            model = dataclasses.replace(config.model.fit_to(teacher.factor, teacher.latent_channels), **shape)
        config = dataclasses.replace(config, model=model)
    return config, teacher


class DistillationStage(StatelessStage):
    """Trains `model` to decode and to encode as `teacher` does: distance + mean (E_s(x) − z̄)² + weight * LPIPS.

    Distance and LPIPS (where its weight is not 0) compare the pictures that both decode from the teacher's latents.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        model: Autoencoder,
        teacher: Autoencoder,
        perceptual: Perceptual | None,
        dataset: Images,
        held_out: Images,
    ) -> None:
        with as_user_error("choose a model that shares the teacher's latents, such as --config tiny"):
            check_student(model, teacher)
        self.config, self.model, self.teacher, self.perceptual = config, model, teacher, perceptual
        self.dataset, self.held_out = dataset, held_out
        self.networks, self.optimizers = {"autoencoder": model}, {"autoencoder": (["autoencoder"], 1.0)}
        self.averaged, self.score = {"autoencoder": model}, ("teacher_psnr", -1.0)
        self.distance = of_kind(RECONSTRUCTIONS, config.loss.reconstruction)
        self.forward: Any = model
        self.frozen = [part for part in (teacher, perceptual) if part is not None]
        for part in self.frozen:
            part.to(memory_format=torch.channels_last)

    def connect(self) -> None:
        """The student goes through the process wrapper; the teacher is only called."""
        self.forward = self.wrapped["autoencoder"]

    def compiled_parts(self) -> list[nn.Module]:
        """Encoder and decoder, the student's and the teacher's."""
        networks: list[Any] = [self.model, self.teacher]
        return [part for network in networks for part in (network.encoder, network.decoder)]

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """One micro-batch: the gradient of both halves at once."""
        images = to_unit(batch.data.to(self.accelerator.device, non_blocking=True))
        noise = posterior_noise(self.model, images, batch.slots, self.config.train.seed, step)
        with self.accelerator.autocast():
            pair = distillation(self.model, self.teacher, images, noise, self.forward)
        values = {"pictures": self.distance(pair.images, pair.target).mean(), "latents": pair.latents.mean()}
        if self.perceptual:
            values["perceptual"] = self.config.loss.perceptual * self.perceptual(pair.images, pair.target).mean()
        loss = torch.stack(list(values.values())).sum()
        self.accelerator.backward(loss * share)
        return {"loss": loss.detach(), **{name: value.detach() for name, value in values.items()}}

    def evaluate(self, folder: Path) -> dict[str, float]:
        """Held out: error of the latents; PSNR, SSIM, LPIPS of 8-bit pictures *against the teacher's*; a grid."""
        fidelity = Fidelity(self.perceptual)
        errors: list[Tensor] = []
        for batch in self.held_out.chunks(self.held_out.evenly(self.config.train.validation_size), 64, "validating"):
            pixels = batch.data.to(self.accelerator.device)
            pair = distillation(self.model, self.teacher, to_unit(pixels), None)
            ours, theirs = to_uint8(pair.images), to_uint8(pair.target)
            if not errors:
                rows = {"input": pixels[:SHOWN], "teacher": theirs[:SHOWN], "student": ours[:SHOWN]}
                grids.write(grids.comparison(rows), folder / "grid.png")
            fidelity.add(ours, theirs)
            errors.append(pair.latents)
        return {**fidelity.means("teacher_"), "latents": torch.cat(errors).mean().item()}

    def normalise(self) -> None:
        """z are the teacher's latents, normalised: there is nothing to measure."""
