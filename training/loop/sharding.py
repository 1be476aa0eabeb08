"""Weights, gradients, moments and averages shared out over the processes (FSDP2): all that differs from replicas.

What is shared out is a DTensor, of which each process holds some rows. Units of a network, its blocks, are brought
together one at a time, for as long as they are at work; gradients are averaged into the rows of each process.
Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054); Zhao et al. 2023 (FSDP, arXiv 2304.11277).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.loop.stage import Stage

if TYPE_CHECKING:
    from accelerate import Accelerator


def shard(stage: Stage, accelerator: Accelerator) -> None:
    """Share out all weights of a stage's networks, unit by unit, so that no device ever holds a whole network."""
    from accelerate.utils import AutocastKwargs
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # By torch itself, the rest by Accelerate: its plugin is passed over on a CPU without a word, takes one model and
    # its optimiser, and computes bf16 from weights that are rounded, norms and all, where autocast does not round them.
    # Autocast keeps no rounded weights for the next call: it would keep those of all units at once.
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    stage.wrapped = {name: accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)
                     for name, network in stage.networks.items()}
    for part in (*stage.units(), *stage.networks.values()):
        fully_shard(part, mesh=mesh)


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any of these is shared out."""
    return any(isinstance(value, DTensor) for value in tensors.values())


@torch.no_grad()
def together(value: Tensor) -> Tensor:
    """The whole tensor. Collective where it is shared out."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The whole tensors on the CPU, in a process that is to `keep` them; the others give, and hold one at a time."""
    whole = ((name, together(value)) for name, value in tensors.items())
    return {name: value.cpu() for name, value in whole if keep}


@contextmanager
def whole(networks: Mapping[str, nn.Module], values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, the networks of this process are whole and answer without the others, which `lend` at the same time.

    They hold `values` by parameter, their own where there is none.
    """
    modules = [module for network in networks.values() for module in network.modules()]
    held = [(module, dict(module._parameters), module._forward_pre_hooks, module._forward_hooks) for module in modules]
    own = {p: nn.Parameter(value, p.requires_grad) for p, value in _brought(networks, values)}
    for module, parameters, *_ in held:
        module._parameters.update({name: p if p is None else own[p] for name, p in parameters.items()})
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()  # which call for the others
    try:
        yield
    finally:
        for module, parameters, before, after in held:
            module._parameters.update(parameters)
            module._forward_pre_hooks, module._forward_hooks = before, after


def lend(networks: Mapping[str, nn.Module], values: Mapping[Tensor, Tensor]) -> None:
    """Give this process's parts to the one that enters `whole`. Collective."""
    for _ in _brought(networks, values):
        pass


def _brought(networks: Mapping[str, nn.Module], values: Mapping[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for network in networks.values():
        for p in network.parameters():
            yield p, together(values.get(p, p).detach()).to(p.dtype)
