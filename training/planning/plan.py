"""A plan of a training: what it will take of parameters, FLOPs, memory, disk and time, from its own loop on trial."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.benchmarks.meters import allocated
from training.errors import UserError
from training.files import write_json
from training.guarding import make_folder
from training.loop.watchdogs import explain
from training.machine import launcher
from training.machine.memory import out_of_memory
from training.messages import answer, tell
from training.planning import disk, telling
from training.planning.memory import Observed, Seen, sizes
from training.planning.trial import Trial
from training.planning.weights import counts, split
from training.stages.beginning import config_of, make_ready
from training.stages.outlook import look_ahead
from training.stages.train import job_of, print_config

if TYPE_CHECKING:
    import argparse

    from training.loop.stage import Stage
    from training.stages.job import Job

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
SPARE = 1.1  # of what is predicted, that it fits: how far off it may be
MOST = 8  # times the first small micro-batch: where operations differ still, peaks alone count
SWITCH = "gradient_checkpointing"
PARTS = {"autoencoder": "model", "denoiser": "backbone"}  # stage -> the section that has it


def plan(args: argparse.Namespace, stage: str) -> int:
    """Say what the training that flags ask for will take. Returns the exit code.

    It is tried in one process; of several that a launcher started, the first plans for all.
    """
    if not launcher.first_process():
        return 0
    target, args.output = args.output and Path(args.output), None
    if target and target.exists() and not args.overwrite:
        raise UserError(f"{target} is there", hint="use --overwrite, or another --output")
    processes = args.processes or int(os.environ.get("WORLD_SIZE", "1"))
    try:
        os.environ["WORLD_SIZE"] = str(processes)  # by which a config is proposed
        kind, config = config_of(args, stage)
    finally:
        for name in LAUNCHED:
            os.environ.pop(name, None)
    if args.print_config:
        return print_config(config)
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        facts = Planning(job_of(kind)(args, config), processes, Path(folder)).facts()
    answer(*telling.lines(facts))
    if target:
        make_folder(target.parent)
        write_json(target, facts)
        tell(f"written: {target}")
    return 0


class Planning:
    """One training, opened and tried in this process for `processes` like it. Raises UserError as the training does."""

    def __init__(self, job: Job, processes: int, folder: Path) -> None:
        self.job, self.args, self.processes, self.folder = job, job.args, processes, folder
        self.accelerator, self.micro, self.accumulation = make_ready(job, processes)
        self.device = self.accelerator.device.type
        if self.device == "mps":
            raise UserError("memory is not counted on an Apple GPU", hint="plan with --device cpu")
        self.share, steps = self.micro * self.accumulation, job.config.train.max_steps
        first = max(0, steps - max(1, self.args.trial_steps))
        self.first = first - first % getattr(getattr(job.config, "loss", None), "r1_every", 1)  # a step of all losses

    def facts(self) -> dict[str, Any]:
        """All that is told, as JSON has it."""
        train = self.job.config.train
        try:
            trial, observed = self.observe()
            memory = self.memory(trial, observed)
            each, speed = trial.flops, None
            if memory["tried"]:
                trial.compile()
                memory["measured"] = observed[-1].held + trial.peak(self.micro, self.accumulation)
                speed = self.speed(trial)
        except RuntimeError as failure:
            raise explain(failure, self.first, self.micro, train.batch_size) from failure
        return {
            "stage": self.job.stage,
            "config": self.args.config,
            "device": self.device,
            "tried_at_step": self.first,
            "batch": train.batch_size,
            "micro_batch": self.micro,
            "accumulation": self.accumulation,
            "processes": self.processes,
            "parameters": counts(trial.stage, self.built.held()),
            "flops": {"each": each, "training": each * train.batch_size * train.max_steps},
            "memory": memory,
            "choices": (choices := self.choices(observed, memory, trial.stage.group)),
            "flags": flags(choices, PARTS[self.job.stage], own=observed[-1].saving),
            "disk": self.disk(trial.stage),
            "run": look_ahead(self.built, trial.stage).facts(),
            "speed": speed,
        }

    def observe(self) -> tuple[Trial, list[Observed]]:
        """The trial of the config, and what its steps hold: without and with gradient checkpointing, its own last."""
        own = getattr(getattr(self.job.config, PARTS[self.job.stage]), SWITCH, None)
        other = [] if own is None else [self.tried(saving=not own)[1]]  # of its trial nothing is kept
        trial, seen = self.tried(saving=own)
        return trial, [*other, seen]

    def tried(self, *, saving: bool | None) -> tuple[Trial, Observed]:
        """A trial with gradient checkpointing on or off, or of what has none, and what its steps hold."""
        if saving is not None:
            part = PARTS[self.job.stage]
            changed = replace(getattr(self.job.config, part), **{SWITCH: saving})
            self.job.config = replace(self.job.config, **{part: changed})
        trial, held = self.open()
        once, again = self.small_steps(trial)
        return trial, Observed(bool(saving), once, again, held)

    def small_steps(self, trial: Trial) -> list[tuple[Seen, Seen]]:
        """Steps of two small micro-batches, of one pass and of two. A batch of 1 is special to many operations: it is
        one of them only where there is no memory for more."""
        group, passes = trial.stage.group, (1, 2)
        try:
            return [self.alike(trial, 2 * group, k) for k in passes]
        except RuntimeError as failure:
            if not out_of_memory(failure):
                raise
        return [(trial.observe(group, k), trial.observe(2 * group, k)) for k in passes]

    def alike(self, trial: Trial, micro: int, passes: int) -> tuple[Seen, Seen]:
        """Steps of `micro` samples and of twice as many; of the next larger two while these are not of the same
        operations, as layers choose theirs by the size of a batch, and a process has so many."""
        small, large = trial.observe(micro, passes), trial.observe(2 * micro, passes)
        while len(small.line) != len(large.line) and 2 * large.micro <= min(self.share, MOST * micro):
            small, large = large, trial.observe(2 * large.micro, passes)
        return small, large

    def open(self) -> tuple[Trial, int]:
        """A trial that has all it holds between two steps, and how many bytes that is."""
        opened: list[Trial] = []
        self.built = copy(self.job)  # a job holds what it has built
        self.accelerator.free_memory()

        def build() -> None:
            stage = self.built.build(self.accelerator, None)
            if not stage.networks:
                what = f"config {self.args.config} has nothing to train: a run of it measures and exports"
                raise UserError(what, hint="choose another --config")
            opened.append(Trial(stage, self.job.config, self.accelerator, self.folder, self.first))
            opened[0].warm_up(stage.group)
            gc.collect()

        held, _ = allocated(build, self.device)
        return opened[0], held

    def memory(self, trial: Trial, observed: list[Observed]) -> dict[str, Any]:
        """Bytes of a process by part, as predicted, at the micro-batch of the config; and what the machine has."""
        learning, frozen = split(trial.stage, self.built.held())
        own, state = observed[-1], trial.state
        moments = [value for optimizer in trial.optimizers.values() for value in of_state(optimizer)]
        parts = {
            "weights": of(learning),
            "frozen weights": of(p for p in frozen if p.device.type == self.device),
            "optimizer": of(moments),
            "averages": of([*state.ema.shadow.values(), *state.powers.tensors().values()]),
        }
        parts["rest"] = own.held - sum(parts.values())
        parts |= own.peak(self.micro, self.accumulation)._asdict()
        shared = parts["weights"] + parts["optimizer"] + parts["averages"] + of(learning)
        if self.processes > 1:  # several exchange gradients in messages as large as these, or share all out
            whole = self.job.config.train.sharding == "none"
            parts["several processes"] = of(learning) if whole else -shared * (self.processes - 1) // self.processes
        there = machine_memory(self.accelerator.device)
        here = own.total(self.micro, self.accumulation)
        return {
            "parts": parts,
            "predicted": sum(parts.values()),
            "alone": here,
            "machine": there,
            "given": int(self.args.memory * 2**30) if self.args.memory else there,
            "tried": self.args.trial_steps > 0 and here <= there,
        }

    def choices(self, observed: list[Observed], memory: Mapping[str, Any], group: int) -> list[dict[str, Any]]:
        """Micro-batches without and with gradient checkpointing: what each is predicted to take, whether it fits."""
        more, found = memory["predicted"] - memory["alone"], []
        for seen in sorted(observed, key=lambda seen: seen.saving):
            for micro in sizes(self.share, group, self.micro):
                size = seen.total(micro, self.share // micro) + more
                fits = SPARE * size <= memory["given"]
                found.append({"micro_batch": micro, "checkpointing": seen.saving, "bytes": size, "fits": fits})
        return found

    def disk(self, stage: Stage) -> dict[str, Any] | None:
        """Of the data: of a stream nothing is known."""
        args, model = self.args, getattr(stage, "model", None)
        if args.stream:
            return None
        if self.job.stage == "denoiser":
            return disk.of_latents(args.latents, self.job.dataset.shards)
        return disk.of_pictures(args.data, self.job.dataset, model, flip=self.job.config.train.flip)

    def speed(self, trial: Trial) -> dict[str, Any]:
        """Of the timed steps, and what follows for the whole run."""
        steps, train = self.args.trial_steps, self.job.config.train
        seconds, waiting = trial.time(self.micro, self.accumulation, steps)
        each = median(seconds)
        hours = each * train.max_steps / 3600
        price = self.args.price_per_hour
        return {
            "steps": steps,
            "timed": len(seconds),
            "step_seconds": each,
            "images_per_second": train.batch_size / each,
            "waiting": waiting,
            "hours": hours,
            "price": None if price is None else hours * self.processes * price,
        }


def flags(choices: list[dict[str, Any]], section: str, *, own: bool) -> list[str]:
    """The words that ask for the largest micro-batch that fits, without gradient checkpointing where one does; none
    where nothing fits. `own`: whether the config has it on."""
    for saving in (False, True):
        fitting = [row["micro_batch"] for row in choices if row["fits"] and row["checkpointing"] == saving]
        if fitting:
            switch = [] if saving == own else [f"--{section}.{SWITCH}", str(saving).lower()]
            return ["--micro-batch-size", str(max(fitting)), *switch]
    return []


def of(tensors: Iterable[Tensor]) -> int:
    """Their bytes."""
    return sum(value.nbytes for value in tensors)


def of_state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What it remembers of each parameter."""
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))


def machine_memory(device: torch.device) -> int:
    """Bytes that a device has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
