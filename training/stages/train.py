"""A training, top to bottom: from parsed flags to a finished run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands import again, assigned
from training.errors import DISK, UserError
from training.files import finite
from training.messages import answer, say, tell
from training.next_step import tell_next
from training.settings import decoding
from training.settings.without_use import without_use
from training.stages.beginning import config_of, make_ready

if TYPE_CHECKING:
    import argparse

    from accelerate import Accelerator
    from torch import Tensor

    from training.loop.loop import Loop
    from training.loop.stage import Stage
    from training.runs.folder import Run, RunView
    from training.stages.job import Job

# Kind -> module and class of its Job: read when it is asked for, so that mistakes are told before torch is loaded.
JOBS = {
    "autoencoder": ("training.stages.autoencoder_job", "AutoencoderJob"),
    "denoiser": ("training.stages.denoiser_job", "DenoiserJob"),
    "adapter": ("training.stages.adapter_job", "AdapterJob"),  # of the stage denoiser, upon a base
    "student": ("training.stages.student_job", "StudentJob"),  # of the same, taught by a teacher
}


def train(args: argparse.Namespace, stage: str) -> int:
    """Train one stage and export it. Returns the exit code. All processes end together; the folder is given back."""
    kind, config = config_of(args, stage)
    if args.print_config:
        return print_config(config)
    from training.machine.processes import together

    again()  # remembered, for the launcher may be gone when the command is told
    with together(), ExitStack() as ending:
        return _train(job_of(kind)(args, config), ending)


def print_config(config: Any) -> int:
    """Answer with all keys of a config, as resolved. Returns the exit code."""
    answer(*json.dumps(decoding.to_values(config), indent=1).splitlines())
    return 0


def job_of(kind: str) -> type[Job]:
    """The Job of a kind of training."""
    from importlib import import_module

    module, name = JOBS[kind]
    job: type[Job] = getattr(import_module(module), name)
    return job


def _train(job: Job, ending: ExitStack) -> int:
    from training.machine import meeting, processes
    from training.pages.writing import Renewed
    from training.runs.folder import Run
    from training.runs.trackers import choose
    from training.stages.outlook import tell_outlook
    from training.stages.resuming import begin, open_run

    args = job.args
    args.report_to = choose(args.report_to)
    accelerator, micro, accumulation = make_ready(job)
    run = None if args.dry_run else open_run(args, job.stage, job.config, accelerator, ending)
    if run and run.finished():
        return report_complete(job, run)
    stage = job.build(accelerator, run.folder / "final" if run else None)
    processes.announce(accelerator, job.description())
    outlook = tell_outlook(job, stage)
    if run is None:
        return 0
    facts = job.facts()
    if isinstance(run, Run):
        run.outlook = outlook
    checkpoint = begin(args, run, accelerator, facts)
    if accelerator.is_main_process:
        job.begin(run.folder / "final")
    meeting.meet()
    report = Renewed(job.dataset.shards.directory)
    if accelerator.is_main_process:
        ending.callback(report, run.folder)  # once more at the end, however it came
    loop, exit_code = fit(args, stage, accelerator, run, micro, accumulation, checkpoint, facts, [report])
    if exit_code:
        return exit_code
    return last_act(job, run, loop, facts)


def last_act(job: Job, run: RunView, loop: Loop, facts: dict[str, Any]) -> int:
    """The last act, with every step saved: a signal ends it at once. Returns the exit code. Collective."""
    from training.loop.wrapping import unwrapped
    from training.machine import meeting
    from training.machine.processes import end_all
    from training.machine.signals import Stopped
    from training.runs.folder import Run

    try:
        loop.signals.all_saved(main=isinstance(run, Run))
        if isinstance(run, Run):
            with loop.ema.averaged_weights(), unwrapped(loop.stage):
                tensors = job.export(run.folder, facts)
                finish(run, tensors, job.about(), close_books(loop, facts))
                tell_next_steps(job, run)
        else:
            loop.ema.lend()
        meeting.meet()  # measuring what is exported takes as long as it takes
    except Stopped as stopped:
        code = 0 if run.finished() else 128 + stopped.number  # 0: it came too late to stop anything
        end_all(code)
        if code and isinstance(run, Run):
            report_stopped(job.args, run, loop, facts, stopped.number, ", which is the last, but not final/")
        return code
    return 0


def fit(
    args: argparse.Namespace,
    stage: Stage,
    accelerator: Accelerator,
    run: RunView,
    micro: int,
    accumulation: int,
    path: Path | None,
    facts: Mapping[str, Any],
    watchers: Sequence[Callable[[Path], None]],
) -> tuple[Loop, int]:
    """Build the loop, resume from checkpoint `path`, train. Returns the loop and the exit code of a signal, or 0."""
    from training.data.loader import FEWER
    from training.loop.loop import Loop
    from training.machine.signals import GIVE_UP
    from training.runs.folder import Run
    from training.runs.trackers import Trackers
    from training.stages.checks import check_room
    from training.stages.resuming import resume

    config: Any = run.config
    loop = Loop(stage, config.train, config.optimizer, accelerator, run.folder, accumulation, micro, None, watchers)
    if accelerator.is_main_process:
        check_room(loop)
    for why in without_use(config, args.overrides, accelerator.device.type):
        loop.state.books.given.add("ignored", "settings without use here", why)
    start = resume(args, loop, path, accelerator)
    if path and isinstance(run, Run):  # the checkpoint's books, not those of a later end
        run.describe("training", start, {**facts, "ledger": loop.state.books.ledger().report()})
    names = args.report_to if accelerator.is_main_process else []
    try:
        with Trackers(names, run.folder, decoding.to_values(config), start) as loop.journal.trackers:
            number = loop.fit(start) if stage.networks else 0
    except Exception:
        if isinstance(run, Run):
            with suppress(UserError, OSError):  # a full disk, say: the first reason is the one to tell
                run.describe("failed", loop.done, close_books(loop, facts))
        raise
    if number == GIVE_UP:
        if isinstance(run, Run):
            run.describe("stopped", loop.done, close_books(loop, facts))
        what = f"loader processes die again and again: saved step {loop.done}"
        raise UserError(what, hint=f"{FEWER}; then go on with --resume auto", code=DISK)
    if number and isinstance(run, Run):
        report_stopped(args, run, loop, facts, number)
    return loop, 128 + number if number else 0


def report_stopped(
    args: argparse.Namespace, run: Run, loop: Loop, facts: Mapping[str, Any], number: int, more: str = ""
) -> None:
    """Write down that a signal stopped the run, and say how it goes on."""
    from training.shards.addresses import repeat_command

    run.describe("stopped", loop.done, close_books(loop, facts))
    words, environment = again([] if args.resume == "auto" else ["--resume", "auto"])
    notice = f"stopped by {signal.Signals(number).name}: saved step {loop.done}{more}"
    every = " (on every node)" if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 else ""
    command, *about = repeat_command(words).split("\nnote: ")
    say(f"{notice}; resume{every} with: {assigned(environment)}{command}")
    for line in about:
        say(f"note: {line}")


def close_books(loop: Loop, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Tell what the run did not use as it was given; returns `facts` with it, for run.json."""
    ledger = loop.state.books.ledger()
    for line in ledger.lines():
        tell(line)
    return {**facts, "ledger": ledger.report()}


def finish(run: Run, tensors: Mapping[str, Tensor], data: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Export final/ and close the books; its card tells of the `data`."""
    from training.models.cards import keep_samples, measured
    from training.models.folders import export
    from training.models.lineage import stored_ingredients
    from training.runs.checkpoint import refuse_non_finite
    from training.runs.folder import versions

    final, steps = run.folder / "final", run.config.train.max_steps
    refuse_non_finite(tensors)
    hashes = {**facts["hashes"], **stored_ingredients(final)}
    numbers = facts.get("validation") or measured(run.folder, steps)
    data = {**data, "index_sha256": facts["data"].get("index_sha256")}
    about = {"steps": steps, "data": data, "numbers": finite(numbers), "hashes": hashes}
    keep_samples(run.folder, steps, final)
    identity = export(final, decoding.to_values(run.config), tensors, {**about, "versions": versions()})
    run.describe("finished", steps, {**facts, "model": identity})
    tell(f"finished: {final}")


def report_complete(job: Job, run: RunView) -> int:
    """A finished run asked to go on is done."""
    from training.guarding import read_json
    from training.runs.folder import Run

    tell(f"{run.folder}: already complete at step {read_json(run.folder / 'run.json')['step']}")
    if isinstance(run, Run):
        tell_next_steps(job, run)
    return 0


def tell_next_steps(job: Job, run: Run) -> None:
    """The commands that go on from a finished run: none where a caption for them cannot be read, as of shards that lie
    elsewhere and have left the cache. The run is finished all the same."""
    with suppress(UserError, OSError):
        tell_next(*job.next_steps(run.folder))
