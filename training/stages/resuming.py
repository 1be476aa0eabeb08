"""From an output folder to the step a training begins at: the run claimed, its checkpoint found and taken back."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import USAGE, UserError
from training.machine.processes import announce, meet
from training.messages import warn
from training.settings.decoding import DenoiserConfig

if TYPE_CHECKING:
    import argparse
    from contextlib import ExitStack

    from accelerate import Accelerator

    from training.loop.loop import Loop
    from training.runs.folder import Run, RunView


def open_run(
    args: argparse.Namespace, stage: str, config: Any, accelerator: Accelerator, ending: ExitStack
) -> RunView:
    """The run folder, claimed by the main process until `ending`; the others only know its place."""
    from training.runs.folder import Run, RunView

    view = RunView(Path(args.output), stage, config)
    if accelerator.is_main_process:
        view = run = Run(view.folder, stage, config, args.resume, other_batch=args.allow_batch_change)
        ending.callback(run.leave)
    meet()
    return view


def begin(args: argparse.Namespace, run: RunView, accelerator: Accelerator, facts: Mapping[str, Any]) -> Path | None:
    """Write down what the run is made of; returns the checkpoint to go on from. All that may be refused was tried."""
    from accelerate.utils import broadcast_object_list

    from training.runs.checkpoints import Checkpoints
    from training.runs.folder import Run

    checkpoint: list[Path | None] = [None]
    if isinstance(run, Run):
        checkpoints = Checkpoints(run.folder)
        checkpoints.sweep()
        checkpoint[0] = path = checkpoints.find(args.resume)
        run.same_ingredients(facts)
        number = path.name.rpartition("-")[2] if path else ""
        step = int(number) if number.isdecimal() else 0
        check_steps(run, step)
        run.note_environment(step, environment(run.config, accelerator))
        run.describe("training", step, facts)
    meet()  # checkpoints are hashed, however large they are
    return broadcast_object_list(checkpoint)[0]  # type: ignore[no-any-return]


def check_steps(run: Run, step: int) -> None:
    """Refuse a resume past the last step, or at another place of an objective's plan, and say aloud where the rate
    jumps for another `max_steps`: plan and schedule are laid over all of them. Raises UserError.
    """
    from training.loop.optim import learning_rate

    train = run.config.train
    if step > train.max_steps:
        raise UserError(
            f"the run is at step {step}, past train.max_steps {train.max_steps}",
            hint=f"give --max-steps {step} or more, or --resume an earlier checkpoint by name",
            code=USAGE,
        )
    if not run.before or not step:
        return
    _same_plan(run.before, run.config, step)
    was, now = (learning_rate(c.optimizer, step, c.train.max_steps) for c in (run.before, run.config))
    if not math.isclose(was, now, rel_tol=1e-6, abs_tol=1e-15):
        jump = (
            f"the learning rate at step {step} is {now:.3g}, where it was {was:.3g} for {run.before.train.max_steps} "
            f"steps: optimizer.decay {run.config.optimizer.decay} is laid over train.max_steps"
        )
        if run.begins_with_another():
            warn(jump)
        else:
            own = shlex.quote(str(run.folder))
            warn(f"{jump}. To learn on from these weights at a rate of your own: "
                 f"--init-from {own} --lr RATE --output NEW")


def _same_plan(before: Any, now: Any, step: int) -> None:
    """Raises UserError where other `max_steps` put a step elsewhere in what the objective does one after the other."""
    if not isinstance(now, DenoiserConfig):
        return
    was, would_be = (c.objective.plan(step, c.train.max_steps) for c in (before, now))
    if was != would_be:
        what = f"objective.kind {now.objective.kind} goes by the share of train.max_steps: at step {step} this run has"
        what = f"{what} come to {was}, and of {now.train.max_steps} steps it would be at {would_be}"
        hint = f"go on with --max-steps {before.train.max_steps}, or begin another run with --output"
        raise UserError(what, hint=hint, code=USAGE)


def environment(config: Any, accelerator: Accelerator) -> dict[str, Any]:
    """What, besides the versions of packages, the last bits of a run may depend on."""
    device, processes = accelerator.device.type, accelerator.num_processes
    kernels = {key: getattr(config.train, key) for key in ("compile", "tf32", "cudnn_benchmark", "sharding")}
    return {"device": device, "processes": processes, **kernels}


def resume(args: argparse.Namespace, loop: Loop, path: Path | None, accelerator: Accelerator) -> int:
    """Take back checkpoint `path`; the step to go on from."""
    if path is None:
        if args.resume:
            announce(accelerator, "note: no checkpoint yet; starting fresh")
            loop.journal.restart()
        return 0
    from training.runs.trackers import tell_left

    checkpoint = loop.checkpoints.load(path, verified=True)  # by `begin`, in one process
    loop.restore(checkpoint)
    if args.resume not in ("auto", "latest") and accelerator.is_main_process:
        loop.checkpoints.prune(path)  # the future that this run gives up: `auto` must not go back to it
    announce(accelerator, f"resumed from step {checkpoint.step}")
    if accelerator.is_main_process:
        tell_left(loop.run, args.report_to)
    return checkpoint.step
