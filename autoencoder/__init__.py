"""Stage one, pure tensor code: autoencoders, their posterior, latent normalisation, losses and discriminator."""

from __future__ import annotations

from autoencoder.dc import DC
from autoencoder.identity import Identity
from autoencoder.kl import KL
from autoencoder.tiny import Tiny
from autoencoder.vq import FSQ, LFQ, VQ

AUTOENCODERS = (KL, VQ, FSQ, LFQ, DC, Tiny, Identity)
