"""A tiny autoencoder for previews, distilled from a trained one (the layout of TAESD)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder, Unregularised
from autoencoder.norm import LatentNorm
from autoencoder.recompute import Block, save_memory

REACH = 3.0  # latents beyond, which hardly occur, are squashed


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Shape of a tiny autoencoder of factor 2^(len(encoder_blocks) - 1) and one width; the default is TAESD's.

    encoder_blocks count from the finest level, decoder_blocks from the coarsest. gradient_checkpointing as
    in KL. ValueError for what cannot be built.
    """

    kind: Literal["tiny"] = "tiny"
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    image_channels: int = 3
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if min(self.width, self.latent_channels, self.image_channels) < 1:
            raise ValueError("width, latent_channels and image_channels must be at least 1.")
        if len(self.encoder_blocks) != len(self.decoder_blocks) or not self.encoder_blocks:
            raise ValueError("encoder_blocks and decoder_blocks must name the blocks of the same levels, at least one.")
        if min(*self.encoder_blocks, *self.decoder_blocks) < 0:
            raise ValueError("a level cannot have fewer than 0 blocks.")

    @property
    def factor(self) -> int:
        """Image size over latent size."""
        return 1 << (len(self.encoder_blocks) - 1)

    def fit_to(self, factor: int, latent_channels: int) -> Tiny:
        """This shape for the latents of a teacher: levels are left out, or repeated, where latents are coarsest.

        `factor`: a power of 2, as every factor here.
        """
        levels = factor.bit_length()
        encoder = (*self.encoder_blocks, *[self.encoder_blocks[-1]] * levels)[:levels]
        decoder = (*[self.decoder_blocks[0]] * levels, *self.decoder_blocks)[-levels:]
        return replace(self, encoder_blocks=encoder, decoder_blocks=decoder, latent_channels=latent_channels)

    def build(self) -> TinyAutoencoder:
        """A freshly initialised model (torch's default initialisation, seeded by the caller)."""
        return TinyAutoencoder(self)


class TinyBlock(Block):
    """relu(x + conv(relu(conv(relu(conv(x)))))): (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def compute(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        y: Tensor = (self.conv(x) + x).relu()
        return y


class TinyEncoder(nn.Module):
    """images in [-1, 1] -> z."""

    def __init__(self, config: Tiny) -> None:
        super().__init__()
        width = config.width
        parts: list[nn.Module] = [nn.Conv2d(config.image_channels, width, 3, padding=1)]
        for i, count in enumerate(config.encoder_blocks):
            parts += [nn.Conv2d(width, width, 3, 2, 1, bias=False)] if i else []
            parts += [TinyBlock(width) for _ in range(count)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, image_channels, H, W) in [-1, 1] -> z (B, latent_channels, H/f, W/f)."""
        z: Tensor = self.layers((images + 1) / 2)
        return z


class TinyDecoder(nn.Module):
    """z -> images."""

    def __init__(self, config: Tiny) -> None:
        super().__init__()
        width = config.width
        parts: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for i, count in enumerate(config.decoder_blocks):
            parts += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)] if i else []
            parts += [TinyBlock(width) for _ in range(count)]
        self.layers = nn.Sequential(*parts, nn.Conv2d(width, config.image_channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        """z (B, latent_channels, h, w), bounded to ±REACH by tanh -> images (B, image_channels, f·h, f·w)."""
        images: Tensor = self.layers((z / REACH).tanh() * REACH)
        return images * 2 - 1


class TinyAutoencoder(Unregularised):
    """Encoder and decoder without a posterior: moments are z. Keys as diffusers' AutoencoderTiny, and `norm`.

    Distilled (`distillation`), z are the teacher's normalised latents and `norm` stays the identity.
    """

    decoder: TinyDecoder

    def __init__(self, config: Tiny) -> None:
        super().__init__()
        self.factor = config.factor
        self.image_channels, self.latent_channels = config.image_channels, config.latent_channels
        self.encoder, self.decoder = TinyEncoder(config), TinyDecoder(config)
        self.norm = LatentNorm(config.latent_channels, gaussian=False)
        save_memory(self, config.gradient_checkpointing)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the last convolution."""
        weight: Tensor = self.decoder.layers[-1].weight  # type: ignore[assignment]
        return weight


class Distilled(NamedTuple):
    """A student beside its teacher: the picture that each decodes from the same latents, images (B, C, H, W); and the
    error of the student's own latents (B,)."""

    images: Tensor
    target: Tensor
    latents: Tensor


def distillation(
    student: Autoencoder,
    teacher: Autoencoder,
    images: Tensor,
    noise: Tensor | None,
    forward: Callable[..., Any] | None = None,
) -> Distilled:
    """D_s(z), D_t(z) and mean (E_s(x) − z̄)² per image (B,): z the teacher's normalised latents, z̄ their mean.

    The teacher gets no gradient. noise (B, C, h, w) ~ N(0, I), None = its posterior mean. forward: the student's, where
    processes share it. ValueError where the two do not share factor and latent channels, and for a student with a
    posterior or codes, which a teacher's latents would not train.
    """
    check_student(student, teacher)
    with torch.no_grad():
        moments = teacher.encode(images)
        mean, latents = teacher.norm.mean_latents(moments), teacher.norm.latents(moments, noise)
        target = teacher.decode(latents)
    answer, z = (forward or student)(images, None, lambda _: student.norm.inverse(latents))
    return Distilled(answer, target, (student.norm.mean_latents(z) - mean).square().flatten(1).mean(1))


def check_student(student: Autoencoder, teacher: Autoencoder) -> None:
    """ValueError where `distillation` cannot be."""
    if student.norm.gaussian or student.quantize:
        raise ValueError("a model with a posterior or codes of its own cannot be distilled: use kind tiny or dc.")
    if student.image_channels != teacher.image_channels:
        theirs, ours = teacher.image_channels, student.image_channels
        raise ValueError(f"the teacher has {theirs} image channels, the student {ours}.")
    if (student.factor, student.latent_channels) != (teacher.factor, teacher.latent_channels):
        raise ValueError(
            f"the teacher has factor {teacher.factor} and {teacher.latent_channels} latent channels, "
            f"the student {student.factor} and {student.latent_channels}."
        )
