"""How a training begins: its config from the flags, its data opened, its device started, its batch split."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from training.settings import decoding
from training.settings.upgrading import run_version
from training.settings.upon import ADAPTER, load_upon, refuse_name_without_base, refuse_without_base, upon_another

if TYPE_CHECKING:
    import argparse

    from accelerate import Accelerator

    from training.stages.job import Job


def config_of(args: argparse.Namespace, stage: str) -> tuple[str, Any]:
    """The kind of training that flags ask for, and its config, proposed where none is named. Raises UserError."""
    _take_accumulation(args)
    args.steps_proposed = False
    upon = upon_another(args, stage)
    if args.config is None:
        from training.stages.proposing import settle_config, take_own

        if upon is None:
            settle_config(args, stage)
        elif not take_own(args, stage):
            raise upon.missing_config()
    if stage == "denoiser" and upon is None:
        refuse_name_without_base(args.config)
    kind = upon.folder if upon else stage
    _take_asked(args, kind)
    if upon:
        from training.models.adapters import config_of_base, config_of_teacher

        theirs = config_of_base(args.base) if upon is ADAPTER else config_of_teacher(args.teacher)
        config: Any = load_upon(upon, theirs, args.config, args.overrides)
    else:
        config = decoding.load(stage, args.config, args.overrides, run_version(args.output))
        refuse_without_base(config)
    if not args.print_config:
        from training.stages.checks import check_sharding

        check_sharding(config)
    return kind, config


def _take_accumulation(args: argparse.Namespace) -> None:
    """The accumulation that `accelerate launch` asks for, where no flag says it: a proposed batch is a multiple of it.
    """
    from training.machine import launcher

    accumulation = launcher.accumulation(getattr(args, "gradient_accumulation_steps", None))
    if accumulation is not None:
        args.gradient_accumulation_steps = accumulation


def _take_asked(args: argparse.Namespace, stage: str) -> None:
    """Precision and sharding that `accelerate launch` asks for, where neither a flag nor the config says it."""
    from training.machine import launcher

    for key, ask, usual in (
        ("train.mixed_precision", partial(launcher.precision, shards=True), "no"),
        ("train.sharding", launcher.sharding, "none"),
    ):
        given = args.overrides.get(key) or decoding.stated(stage, args.config, key)
        taken = ask(given)
        if given is None and taken != usual:
            args.overrides = {**args.overrides, key: taken}


def make_ready(job: Job, among: int = 0) -> tuple[Accelerator, int, int]:
    """Open the data, start the device, split the batch over the processes, or `among` so many; returns the accelerator,
    micro-batch and accumulation. Raises UserError for all that can be refused before a network is built."""
    from training.machine import meeting, processes
    from training.stages.checks import check_batch, layout, shared_facts

    args, settings = job.args, job.config.train
    job.open_data()
    accelerator = processes.start(args.device, settings.mixed_precision, compiles=settings.compile, shards=True)
    processes.choose_kernels(tf32=settings.tf32, benchmark=settings.cudnn_benchmark)
    if processes.is_distributed():
        meeting.agree(shared_facts(job, accelerator))
    job.config, micro, accumulation = layout(job.config, args, among or accelerator.num_processes)
    job.settle()
    check_batch(job.dataset, job.config.train)
    return accelerator, micro, accumulation
