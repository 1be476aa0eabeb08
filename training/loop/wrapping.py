"""From a stage's declarations to networks that processes share: frozen parts moved, trained ones wrapped, compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from training.loop.sharding import shard
from training.loop.stage import Stage
from training.machine.compiling import compile_parts
from training.machine.processes import announce
from training.messages import note

if TYPE_CHECKING:
    from accelerate import Accelerator


def wrap(stage: Stage, accelerator: Accelerator, *, compiles: bool, shards: bool = False) -> None:
    """Put a stage on the accelerator's device and behind its process wrappers, which average gradients; where it
    `shards`, its networks are shared out over the processes instead.

    Parts are compiled inside their wrappers, so that a checkpoint's names stay those of the bare networks.
    """
    stage.accelerator = accelerator
    for module in stage.frozen:
        module.to(accelerator.device)
    if shards and accelerator.num_processes > 1:
        shard(stage, accelerator)
        return stage.connect()
    if shards:
        announce(accelerator, "train.sharding full: one process holds all that several would share out", note)
    if stage.unused_gradients:
        from accelerate import DistributedDataParallelKwargs

        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    for network in stage.networks.values():  # one that only follows another has no gradients to be averaged
        network.to(accelerator.device)
    stage.wrapped = {name: accelerator.prepare(network) if any(p.requires_grad for p in network.parameters())
                     else network for name, network in stage.networks.items()}  # in one order
    compile_parts(stage.compiled_parts() if compiles else ())
    stage.connect()


@contextmanager
def unwrapped(stage: Stage) -> Iterator[None]:
    """Inside, networks answer in their own precision and as they are written, as those that are exported do.

    Accelerate has put autocast into the `forward` of the very modules it was given; the one it took away stays beside.
    Not compiled: other sizes, weights and precision than a step's would each take a compiler's minutes.
    """
    wrapped: dict[Any, Any] = {n: vars(n)["forward"] for n in stage.networks.values() if "_original_forward" in vars(n)}
    for network in wrapped:
        network.forward = network._original_forward
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for network, forward in wrapped.items():
            network.forward = forward
