"""Decoding by the light autoencoder `dc-f8` beside LDM's decoder: latents and pictures of the same sizes.

It is another network, so that pictures differ: what it costs in quality is in docs/autoencoders.md.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from training.benchmarks.autoencoder import peer
from training.benchmarks.case import CPU_LANES, EAGER, EAGER_TARGETS, SAME_SPEED, STOCK_SPEED, Case, Contest, Place
from training.benchmarks.cases.autoencoders import frozen
from training.benchmarks.meters import flops
from training.settings import decoding

# (channels of dc-f8, channels of kl-f8, latents a side, latents)
SIZES = {"smoke": ("[16,32,64,128]", "[32,64,128,128]", 8, 2), "cpu": ("[64,128,256,512]", "[128,256,512,512]", 8, 2),
         "gpu": ("[64,128,256,512]", "[128,256,512,512]", 32, 32)}  # fmt: skip


class Light(Case):
    """Latents to pictures, by a ninth of the multiply-adds."""

    kind = "light"
    title = "decoding by `dc-f8`, against LDM's of latents of the same size (`AutoencoderKL`)"
    targets = (replace(STOCK_SPEED, least=5.0), SAME_SPEED)
    lanes = CPU_LANES[:-1]
    gpu_lanes, gpu_targets = EAGER[:-1], EAGER_TARGETS[:1]

    def build(self, place: Place) -> Contest:
        light, heavy, side, count = SIZES[place.size]
        configs: list[Any] = [decoding.load("autoencoder", name, {"model.channels": channels})
                              for name, channels in (("dc-f8", light), ("kl-f8", heavy))]  # fmt: skip
        shapes = [config.model for config in configs]
        torch.manual_seed(0)
        ours = shapes[0].build().to(place.device, memory_format=torch.channels_last)
        theirs = peer(shapes[1]).to(place.device)
        z = torch.randn(count, shapes[0].latent_channels, side, side).to(place.device)
        calls = {"ours": lambda: ours.decode(z), "peer": lambda: theirs.decode(z).sample}

        def agree() -> None:
            a, b = (frozen(call, place.device)() for call in calls.values())
            assert a.shape == b.shape, f"pictures of {tuple(a.shape)} and {tuple(b.shape)}"

        def multiply_adds(model: Any) -> float:
            meta, code = copy.deepcopy(model).to("meta"), z[:1].to("meta")
            return flops(lambda: meta.decode(code)) / 2 / (side * int(shapes[0].factor)) ** 2

        facts = {"multiply-adds a pixel, ours": lambda: multiply_adds(ours),
                 "the peer's": lambda: multiply_adds(theirs)}  # fmt: skip
        return Contest({name: frozen(call, place.device) for name, call in calls.items()}, agree, items=count,
                       facts=facts)  # fmt: skip


CASES = (Light(),)
