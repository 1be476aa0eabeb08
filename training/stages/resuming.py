"""From an output folder to the step a training begins at: the run claimed, its checkpoint found and taken back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import USAGE, UserError
from training.machine.processes import announce

if TYPE_CHECKING:
    import argparse
    from contextlib import ExitStack

    from accelerate import Accelerator

    from training.loop.loop import Loop
    from training.runs.folder import Run


def open_run(
    args: argparse.Namespace, stage: str, config: Any, accelerator: Accelerator, ending: ExitStack
) -> Run | None:
    """The run folder, claimed by the main process until `ending`; the others only know its place."""
    from training.runs.folder import Run

    if accelerator.is_main_process:
        run = Run(Path(args.output), stage, config, args.resume, other_batch=args.allow_batch_change)
        ending.callback(run.leave)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        run = Run.__new__(Run)
        run.folder, run.stage, run.config = Path(args.output), stage, config
    return run


def begin(args: argparse.Namespace, run: Run, accelerator: Accelerator, facts: Mapping[str, Any]) -> Path | None:
    """Write down what the run is made of; returns the checkpoint to go on from. All that may be refused was tried."""
    from accelerate.utils import broadcast_object_list

    from training.runs.checkpoints import Checkpoints

    checkpoint: list[Path | None] = [None]
    if accelerator.is_main_process:
        checkpoints = Checkpoints(run.folder)
        checkpoints.sweep()
        checkpoint[0] = path = checkpoints.find(args.resume)
        run.same_ingredients(facts)
        number = path.name.rpartition("-")[2] if path else ""
        step = int(number) if number.isdecimal() else 0
        run.note_environment(step, environment(run.config, accelerator))
        run.describe("training", step, facts)
    return broadcast_object_list(checkpoint)[0]  # type: ignore[no-any-return]


def environment(config: Any, accelerator: Accelerator) -> dict[str, Any]:
    """What, besides the versions of packages, the last bits of a run may depend on."""
    device, processes = accelerator.device.type, accelerator.num_processes
    return {"device": device, "processes": processes, "compile": config.train.compile}


def resume(args: argparse.Namespace, loop: Loop, path: Path | None, accelerator: Accelerator) -> int:
    """Take back checkpoint `path`; the step to go on from."""
    if path is None:
        if args.resume:
            announce(accelerator, "note: no checkpoint yet; starting fresh")
            loop.journal.restart()
        return 0
    checkpoint = loop.checkpoints.load(path, verified=True)  # by `begin`, in one process
    if checkpoint.step > loop.train.max_steps:
        raise UserError(
            f"the run is at step {checkpoint.step}, past train.max_steps {loop.train.max_steps}",
            hint=f"give --max-steps {checkpoint.step} or more, or --resume an earlier checkpoint by name",
            code=USAGE,
        )
    loop.restore(checkpoint)
    if args.resume not in ("auto", "latest") and accelerator.is_main_process:
        loop.checkpoints.prune(path)  # the future that this run gives up: `auto` must not go back to it
    announce(accelerator, f"resumed from step {checkpoint.step}")
    return checkpoint.step
