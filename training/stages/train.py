"""A training, top to bottom: from parsed flags to a finished run."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import DISK, UserError
from training.messages import tell
from training.settings import decoding
from training.settings.upgrading import run_version

if TYPE_CHECKING:
    import argparse

    from accelerate import Accelerator

    from training.loop.loop import Loop
    from training.loop.stage import Stage
    from training.runs.folder import Run
    from training.stages.job import Job

# Stage -> module and class of its Job: read when it is asked for, so that mistakes are told before torch is loaded.
JOBS = {
    "autoencoder": ("training.stages.autoencoder_job", "AutoencoderJob"),
    "denoiser": ("training.stages.denoiser_job", "DenoiserJob"),
}


def train(args: argparse.Namespace, stage: str) -> int:
    """Train one stage and export it. Returns the exit code. All processes end together; the folder is given back."""
    _take_from_launcher(args, stage)
    config = decoding.load(stage, args.config, args.overrides, run_version(args.output))
    if args.print_config:
        print(json.dumps(decoding.to_values(config), indent=1))
        return 0
    from training.machine.processes import together

    with together(), ExitStack() as ending:
        return _train(job_of(stage)(args, config), ending)


def _take_from_launcher(args: argparse.Namespace, stage: str) -> None:
    """Precision and accumulation that `accelerate launch` asks for, where neither a flag nor the config says them."""
    from training.machine import launcher

    key = "train.mixed_precision"
    given = args.overrides.get(key) or decoding.stated(stage, args.config, key)
    taken = launcher.precision(given)
    if given is None and taken != "no":
        args.overrides = {**args.overrides, key: taken}
    accumulation = launcher.accumulation(getattr(args, "gradient_accumulation_steps", None))
    if accumulation is not None:
        args.gradient_accumulation_steps = accumulation


def job_of(stage: str) -> type[Job]:
    """The Job of a stage."""
    from importlib import import_module

    module, name = JOBS[stage]
    job: type[Job] = getattr(import_module(module), name)
    return job


def _train(job: Job, ending: ExitStack) -> int:
    from training.machine import meeting, processes
    from training.stages.checks import layout, shared_facts
    from training.stages.resuming import begin, open_run

    args, settings = job.args, job.config.train
    job.open_data()
    accelerator = processes.start(args.device, settings.mixed_precision, compiles=settings.compile)
    if processes.is_distributed():
        meeting.agree(shared_facts(job, accelerator))
    job.config, micro, accumulation = layout(job.config, args, accelerator.num_processes)
    job.settle()
    run = None if args.dry_run else open_run(args, job.stage, job.config, accelerator, ending)
    if run and run.finished():
        return report_complete(run)
    stage = job.build(accelerator, run.folder / "final" if run else None)
    processes.announce(accelerator, job.description())
    if run is None:
        return 0
    facts = job.facts()
    checkpoint = begin(args, run, accelerator, facts)
    if accelerator.is_main_process:
        job.begin(run.folder / "final")
    meeting.meet()
    loop, exit_code = fit(args, stage, accelerator, run, micro, accumulation, checkpoint, facts)
    if exit_code:
        return exit_code
    if accelerator.is_main_process:
        with loop.ema.averaged_weights():
            finish(run, job.export(run.folder, facts), job.title, facts)
    meeting.meet()  # measuring what is exported takes as long as it takes
    return 0


def fit(
    args: argparse.Namespace,
    stage: Stage,
    accelerator: Accelerator,
    run: Run,
    micro: int,
    accumulation: int,
    path: Path | None,
    facts: Mapping[str, Any],
) -> tuple[Loop, int]:
    """Build the loop, resume from checkpoint `path`, train. Returns the loop and the exit code of a signal, or 0."""
    from training.data.loader import FEWER
    from training.loop.loop import Loop
    from training.machine.signals import GIVE_UP
    from training.shards.addresses import repeat_command
    from training.stages.checks import check_room
    from training.stages.resuming import resume

    config: Any = run.config
    loop = Loop(stage, config.train, config.optimizer, accelerator, run.folder, accumulation, micro)
    if accelerator.is_main_process:
        check_room(loop)
    start = resume(args, loop, path, accelerator)
    try:
        number = loop.fit(start)
    except UserError:
        if accelerator.is_main_process:
            with suppress(UserError):  # a full disk, say: the first reason is the one to tell
                run.describe("failed", loop.done, facts)
        raise
    if number and accelerator.is_main_process:
        run.describe("stopped", loop.done, facts)
    if number == GIVE_UP:
        what = f"loader processes die again and again: saved step {loop.done}"
        raise UserError(what, hint=f"{FEWER}; then go on with --resume auto", code=DISK)
    if number and accelerator.is_main_process:
        command = repeat_command([*sys.argv, *([] if args.resume == "auto" else ["--resume", "auto"])])
        notice = f"stopped by {signal.Signals(number).name}: saved step {loop.done}"
        tell(f"{notice}; resume with: {command}")
    return loop, 128 + number if number else 0


def finish(run: Run, tensors: Mapping[str, Any], title: str, facts: Mapping[str, Any]) -> None:
    """Export final/ and close the books."""
    from training.models.folders import card, export
    from training.runs.checkpoints import refuse_non_finite

    values = decoding.to_values(run.config)
    refuse_non_finite(tensors)
    flat = {**facts.get("validation", {}), **facts["hashes"]}
    identity = export(
        run.folder / "final", values, tensors, card(title, {"steps": run.config.train.max_steps, **flat}, values)
    )
    run.describe("finished", run.config.train.max_steps, {**facts, "model": identity})
    tell(f"finished: {run.folder / 'final'}")


def report_complete(run: Run) -> int:
    """A finished run asked to go on is done."""
    from training.files import read_json

    tell(f"{run.folder}: already complete at step {read_json(run.folder / 'run.json')['step']}")
    return 0
