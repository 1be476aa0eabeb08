"""Pictures drawn by our pipeline beside diffusers' StableDiffusionPipeline: the same weights, noise, solver and calls.

A U-Net under classifier-free guidance by DDIM, then the decoder; the text's features are at hand on both sides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from autoencoder.kl import KL
from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.grids import Trailing
from ldm.guidance import ClassifierFree
from ldm.noise import Noise
from ldm.pipeline import Pipeline, Sampling
from ldm.predictions import Eps
from ldm.samplers import DDIM, prior
from ldm.schedules import DDPMScaledLinear
from training.benchmarks import autoencoder as verb
from training.benchmarks.case import (
    EAGER,
    EAGER_TARGETS,
    NOT_YET,
    OURS,
    SAME,
    SAME_SPEED,
    STOCK,
    STOCK_SPEED,
    Case,
    Contest,
    Place,
    peers,
)
from training.benchmarks.cases.autoencoders import frozen
from training.benchmarks.cases.denoisers import UNetStep, equal_pair

SCALE = 7.5
SCHEDULE = DDPMScaledLinear()


class Drawing(Case):
    kind = "sampling"
    title = "pictures of a U-Net by DDIM with guidance (`StableDiffusionPipeline`)"
    lanes, gpu_lanes = (OURS, STOCK, SAME), EAGER[:2]
    targets = (replace(STOCK_SPEED, least=1.3, checked=NOT_YET), SAME_SPEED)
    gpu_targets = EAGER_TARGETS[:1]
    # (autoencoder, pictures, steps)
    sizes: ClassVar = {"smoke": (KL(channels=(16, 32), blocks=1, groups=8), 2, 4),
                       "cpu": (KL(channels=(32, 64, 128), blocks=1), 4, 10), "gpu": (KL(), 16, 50)}  # fmt: skip

    def build(self, place: Place) -> Contest:
        shape, count, steps = self.sizes[place.size]
        settings, side, _ = UNetStep.sizes[place.size]
        pair = equal_pair("UNet2DConditionModel", settings, side, place.device)
        torch.manual_seed(0)
        decoders = verb.models(shape, place.device)
        random = torch.Generator().manual_seed(1)
        words = UNetStep.tokens, settings["cross_attention_dim"]
        null, text = (torch.randn(n, *words, generator=random).to(place.device) for n in (1, count))
        seeds = list(range(count))
        start = prior(SCHEDULE, (4, side, side), Noise.from_seeds(seeds, place.device))
        plan = Sampling(sampler=DDIM(), grid=Trailing(), guidance=ClassifierFree(scale=SCALE), steps=steps)
        told: Any = Told(text, null)
        denoiser = Denoiser(pair.ours.eval(), Diffusion(schedule=SCHEDULE, prediction=Eps()))
        pipeline = Pipeline(decoders["ours"].eval(), denoiser, told, plan, (side * shape.factor,) * 2)
        their_pipeline = peer(pair.theirs, decoders["diffusers"].eval())

        def ours() -> Tensor:
            (pixels,) = pipeline.pixels([str(i) for i in seeds], seeds)
            return pixels

        def theirs() -> Tensor:
            made = their_pipeline(prompt_embeds=text, negative_prompt_embeds=null.expand_as(text), latents=start,
                                  num_inference_steps=steps, guidance_scale=SCALE, output_type="pt")  # fmt: skip
            images: Tensor = made.images
            return (images * 255).round().to(torch.uint8)

        def agree() -> None:
            a, b = ours().float(), theirs().float()
            assert a.std() > 5, "the pictures are flat"
            torch.testing.assert_close(a, b, rtol=0, atol=1.0)  # a rounding to a grey level, and no more

        calls = {name: frozen(call, place.device) for name, call in (("ours", ours), ("peer", theirs))}
        return Contest(calls, agree, items=count, unit="pictures")


class Told:
    """In place of a text encoder: caption "0" is the first of the features, "" the null."""

    def __init__(self, text: Tensor, null: Tensor) -> None:
        self.text, self.null = text, null

    def __call__(self, captions: list[str]) -> Cond:
        context = torch.cat([self.text[int(c)][None] if c else self.null for c in captions])
        return Cond(context, torch.ones(context.shape[:2], dtype=torch.bool, device=context.device))


def peer(unet: Any, vae: Any) -> Any:
    """A StableDiffusionPipeline without text encoder, which is silent."""
    diffusers = peers()
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=SCHEDULE.beta_min, steps_offset=1,
                                        beta_end=SCHEDULE.beta_max, clip_sample=False, set_alpha_to_one=True,
                                        timestep_spacing="trailing")  # fmt: skip
    vae.register_to_config(scaling_factor=1.0)  # ours measures its latents' scale, and here has none yet
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CASES = (Drawing(),)
