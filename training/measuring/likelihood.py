"""Log-likelihood of held-out latents under a denoiser's ODE, in bits per dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autoencoder.images import to_unit
from ldm.likelihood import bits_per_dim, log_likelihood
from ldm.noise import Noise
from ldm.students import unguided
from ldm.variational import bound
from training.drawing.prompts import tell_reading
from training.errors import as_user_error
from training.measuring.held_out import CHUNK, chunks, held_out
from training.models.judge import caption

if TYPE_CHECKING:
    import argparse

    from training.ledger import Ledger


def likelihood(
    pipeline: Any, sampling: Any, args: argparse.Namespace, device: torch.device, ledger: Ledger
) -> dict[str, Any]:
    """log p of held-out pictures' latents given their captions, by the probability-flow ODE; and the bound that a model
    of learned variance was trained on."""
    with as_user_error("measure a run that train_denoiser has trained"):
        denoiser = unguided(pipeline.student, pipeline.denoiser, "--likelihood")
    images, exact = held_out(args, "--likelihood"), args.likelihood_trace == "exact"
    log_likelihoods, bounds = [], []
    places = images.evenly(args.likelihood)
    captions = [caption(images, i) for i in places]
    tell_reading(captions, ledger, pipeline.text, aloud=False)
    for number, pixels in enumerate(chunks(images, places, device, "log-likelihood")):
        part = slice(number * CHUNK, number * CHUNK + len(pixels))
        latents = pipeline.autoencoder.norm.mean_latents(pipeline.autoencoder.encode(to_unit(pixels)))
        denoise = denoiser.bind(pipeline.text(captions[part]))
        probe = Noise.from_seeds([args.seed + i for i in places[part]], device)
        grid, probes = sampling.grid(sampling.steps, denoise.schedule), args.likelihood_probes
        log_likelihoods.append(log_likelihood(denoise, latents, grid, None if exact else probe, probes).cpu())
        if pipeline.denoiser.diffusion.learned_variance:
            bounds.append(bound(denoise, latents, probe).cpu())
    nats, dims = torch.cat(log_likelihoods).double(), latents[0].numel()
    return {
        "likelihood_trace": "exact" if exact else f"hutchinson, {args.likelihood_probes} probe(s) a picture",
        "log_likelihood": nats.mean().item(),
        "log_likelihood_error": (nats.std() / len(nats) ** 0.5).item() if len(nats) > 1 else None,
        "bits_per_dim": bits_per_dim(nats.mean(), dims).item(),
        "bound_bits_per_dim": torch.cat(bounds).double().mean().item() if bounds else None,
        "latent_dims": dims,
        "pictures": len(nats),
    }
