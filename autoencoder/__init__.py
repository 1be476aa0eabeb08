"""Stage one, pure tensor code: autoencoders, their posterior, latent normalisation, losses and discriminator."""

from __future__ import annotations

from autoencoder.kl import KL
from autoencoder.vq import VQ

AUTOENCODERS = (KL, VQ)
