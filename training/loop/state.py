"""All that a run needs to go on, gathered into a checkpoint and taken back from one: the only place that does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from training.loop import optim
from training.runs.checkpoints import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from training.loop.loop import Loop


def snapshot(loop: Loop, step: int) -> Checkpoint:
    """Everything a run needs to go on from `step`: its tensors themselves, not copies."""
    networks, names = loop.stage.networks.items(), _names(loop)
    model = {f"{n}.{key}": value for n, network in networks for key, value in network.state_dict().items()}
    moments = {f"{name}/{key}": v for name, o in loop.optimizers.items() for key, v in optim.pack(o, names).items()}
    state = {
        "ema_updates": loop.ema.updates,
        "scaler": loop.accelerator.scaler.state_dict() if loop.accelerator.scaler else {},
        "stage": loop.stage.state(),
        "journal": loop.journal.state(),
        "watchdogs": loop.watchdogs.state(),
        "place": loop.batches.order.place(step),
        "score": loop.scored[1] if loop.scored and loop.scored[0] == step else None,
        **({"micro": loop.micro} if loop.shrinks else {}),
    }
    averages = {**loop.ema.shadow, **loop.powers.tensors()}
    return Checkpoint(step, {"model": model, "ema": averages, "optimizer": moments}, state)


def restore(loop: Loop, checkpoint: Checkpoint) -> None:
    """The inverse of `snapshot`, in every process. Raises UserError where the weights do not fit."""
    from training.models.folders import fill  # which itself needs this file

    tensors, state, names = checkpoint.tensors, checkpoint.state, _names(loop)
    for name, network in loop.stage.networks.items():
        fill(network, _under(f"{name}.", tensors["model"]), loop.checkpoints.folder / f"step-{checkpoint.step:08d}")
    for name, optimizer in loop.optimizers.items():
        optim.unpack(optimizer, names, _under(f"{name}/", tensors["optimizer"]))
    loop.ema.load(dict(tensors["ema"]), int(state["ema_updates"]))
    loop.powers.load(tensors["ema"])
    if loop.accelerator.scaler and state["scaler"]:
        loop.accelerator.scaler.load_state_dict(state["scaler"])
    loop.stage.load_state(state["stage"])
    loop.journal.resume(checkpoint.step, state["journal"])
    if "watchdogs" in state:  # not in checkpoints of earlier versions
        loop.watchdogs.load(state["watchdogs"])
        loop.base = checkpoint.step, int(state["place"])
    held = loop.micro * loop.accumulation
    if loop.shrinks and "micro" in state and held % int(state["micro"]) == 0:  # what was found to fit
        loop.micro, loop.accumulation = int(state["micro"]), held // int(state["micro"])


def _names(loop: Loop) -> dict[int, str]:
    """id(parameter) -> its name in checkpoints."""
    return {id(p): f"{n}.{key}" for n, network in loop.stage.networks.items() for key, p in network.named_parameters()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
