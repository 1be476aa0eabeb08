"""What a drawing costs: calls of the network, counted where they happen, and seconds, those of decoding apart."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from training.models.assembly import HashedPipeline


class Cost(NamedTuple):
    """What one batch of pictures cost: samples that the network was called on, and seconds by what was done."""

    pictures: int
    calls: int
    reading: float  # of captions, by the text encoder
    denoising: float
    decoding: float


@dataclass
class Meter:
    """What was drawn since it was last asked."""

    pictures: int = 0
    calls: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timing(self, what: str, device: torch.device) -> Iterator[None]:
        """Inside, the time counts as that of `what`, the device's own work included."""
        _wait(device)
        since = time.perf_counter()
        yield
        _wait(device)
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - since

    def take(self) -> Cost:
        """The cost since it was last asked."""
        told = (self.seconds.get(what, 0.0) for what in ("reading", "denoising", "decoding"))
        cost = Cost(self.pictures, self.calls, *told)
        self.pictures, self.calls, self.seconds = 0, 0, {}
        return cost


class Counted:
    """A backbone that counts the samples it is called on; a call of two conditions at once is of twice the samples. All
    else that is asked of it is its network's own."""

    def __init__(self, network: Any, meter: Meter) -> None:
        self.network, self.meter = network, meter

    def __call__(self, inputs: Tensor, *told: Any) -> Any:
        self.meter.calls += len(inputs)
        return self.network(inputs, *told)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["network"], name)


@dataclass(frozen=True, eq=False, repr=False)
class Metered(HashedPipeline):
    """A pipeline whose drawings are counted and timed by `meter`, and are what they are without."""

    meter: Meter = field(default_factory=Meter)

    def guided(self, *asked: Any, **named: Any) -> Denoise:
        with self.meter.timing("reading", self.device):
            return super().guided(*asked, **named)

    def latents(self, *asked: Any, **named: Any) -> Tensor:
        with self.meter.timing("denoising", self.device):
            latents = super().latents(*asked, **named)
        self.meter.pictures += len(latents)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        with self.meter.timing("decoding", self.device):
            return super().decode(latents)


def metered(pipeline: HashedPipeline) -> Metered:
    """The same pipeline under a meter of its own."""
    meter, parts = Meter(), {part.name: getattr(pipeline, part.name) for part in dataclasses.fields(pipeline)}
    counted = dataclasses.replace(pipeline.denoiser, backbone=Counted(pipeline.denoiser.backbone, meter))
    return Metered(**{**parts, "denoiser": counted}, meter=meter)


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
