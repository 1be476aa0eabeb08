"""The averaged weights that evaluation, pictures and export use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.loop.sharding import is_sharded, lend, whole
from training.runs.parts import local


class EMA:
    """Exponential moving average of parameters: e <- e + (1 - d)(p - e), d = min(decay, (1 + n)/(10 + n)), n updates.

    Of those that gradients move, and those that a module names in `followers`, which move with them by other means.
    The warm-up keeps early averages short, so that a run of any length ends with sound weights (as in EMA of TF's
    `ExponentialMovingAverage(num_updates)`). Shadows are float32 whatever the model's dtype, and shared out over the
    processes as the parameters are.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float,
                 networks: dict[str, nn.Module] | None = None) -> None:
        """`networks`: what `modules` are parts of, where they are shared out and called whole."""
        self.decay, self.updates, self.networks = decay, 0, networks or modules
        self._live = averaged_parameters(modules)
        self.shadow = {key: p.detach().float().clone() for key, p in self._live.items()}

    def due(self) -> bool:
        """Whether a step moves any of what is averaged, which then has a gradient."""
        return any(p.grad is not None for p in self._live.values())

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the live weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        live = [local(p.detach()).float() for p in self._live.values()]
        torch._foreach_lerp_([local(shadow) for shadow in self.shadow.values()], live, 1 - decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the modules hold the averaged weights; outside, their own again. Off (decay 0) changes nothing.

        Where processes share them out, they are whole inside, in this process, while the others `lend`.
        """
        if is_sharded(self.shadow):
            with whole(self.networks, self._averages()):
                yield
            return
        if not self.decay:
            yield
            return
        live = {key: p.data for key, p in self._live.items()}
        for key, p in self._live.items():
            p.data = self.shadow[key].to(p.dtype)
        try:
            yield
        finally:
            for key, p in self._live.items():
                p.data = live[key]

    def lend(self) -> None:
        """Do a process's part while another enters `averaged_weights`: none, where nothing is shared out."""
        if is_sharded(self.shadow):
            lend(self.networks, self._averages())

    def _averages(self) -> dict[Tensor, Tensor]:
        return {p: self.shadow[key] for key, p in self._live.items()} if self.decay else {}

    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Take back saved shadows and their counter; after the weights, from which what was not averaged is taken."""
        self.updates = updates
        for key, shadow in self.shadow.items():
            live = self._live[key].detach()
            without = key not in tensors and not self._live[key].requires_grad  # followers, in an earlier version
            shadow.copy_(live if without else tensors[key])


def averaged_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """What is averaged, by `module.parameter`."""
    live: dict[str, nn.Parameter] = {}
    for name, module in modules.items():
        followers = _followers(module)
        parameters = ((key, p) for key, p in module.named_parameters() if p.requires_grad or key in followers)
        live |= {f"{name}.{key}": p for key, p in parameters}
    return live


def _followers(module: nn.Module) -> set[str]:
    """The names of all parameters that parts of the module name in `followers`."""
    parts = ((name, getattr(part, "followers", ())) for name, part in module.named_modules())
    return {f"{name}.{key}" if name else key for name, keys in parts for key in keys}
