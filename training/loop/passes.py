"""The backward passes of a step: micro-batches from the loader, gradients averaged over processes.

With the micro-batch "auto", where memory runs out in any process, all drop what they have of the step and take it again
in smaller parts. Several processes do so until a size has held for `HELD` steps. From then on gradients travel while
the backward pass goes on, as with a number, and memory that runs out ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.data.loader import stream
from training.data.order import Batches, Order, order_of
from training.data.permutation import RULE
from training.loop.stage import Stage
from training.loop.watchdogs import Keys
from training.machine.faults import fault
from training.machine.memory import out_of_memory
from training.machine.processes import announce
from training.runs.journal import Journal
from training.settings.sections import Train

if TYPE_CHECKING:
    from accelerate import Accelerator

HELD = 50  # steps after which several processes take a micro-batch for one that fits
BUCKET = 1 << 24  # numbers of which a process makes one message: 64 MiB of float32


class Attempt:
    """A step begun, that it can be undone: what the stage gathers over its passes, and the buffers they may change."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.networks = stage, list(stage.networks.values())
        self.gathered = {name: [*value] if isinstance(value, list) else value for name, value in vars(stage).items()}
        self.buffers = [(buffer, buffer.clone()) for network in self.networks for buffer in network.buffers()]

    def drop(self) -> None:
        """Undo the passes made since, gradients too."""
        vars(self.stage).update(self.gathered)
        for buffer, value in self.buffers:
            buffer.copy_(value)
        for network in self.networks:
            network.zero_grad(set_to_none=True)


class Passes:
    """Gradients of one step after another, each over the global batch."""

    def __init__(
        self,
        stage: Stage,
        train: Train,
        accelerator: Accelerator,
        journal: Journal,
        micro: int,
        accumulation: int,
        undoable: bool,
        give_up: Callable[[], None],
    ) -> None:
        """`undoable`: a step may be given up once its gradients are known; `give_up`: what reads cannot go on."""
        self.stage, self.train, self.accelerator, self.journal = stage, train, accelerator, journal
        self.micro, self.accumulation, self.undoable, self.give_up = micro, accumulation, undoable, give_up
        self.searches, self.held = train.micro_batch_size == "auto", 0  # steps that this size has held for
        self.base, self.rule = (0, 0), RULE  # of the data order
        self.losses: list[Tensor] = []  # of this step's micro-batches, each the sum of all it told
        self.attempt: Attempt | None = None
        self.open_data(0)

    @property
    def shrinks(self) -> bool:
        """Whether memory that runs out in the next step halves the micro-batch: in one process at any time."""
        return self.searches and (self.held < HELD or self.accelerator.num_processes == 1)

    def open_data(self, start: int) -> None:
        """Have the micro-batches from step `start` on read."""
        train = self.train
        self.read(order_of(self.stage.dataset, train.batch_size, train.seed, self.base, self.rule), start)

    def read(self, order: Order, start: int) -> None:
        """The same of any order."""
        dataset, train = self.stage.dataset, self.train
        dataset.rule = self.rule  # substitutes go by it, too
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.batches = Batches(order, self.micro, self.accumulation, process, processes, start, train.max_steps)
        pin = self.accelerator.device.type == "cuda"
        self.incoming = stream(dataset, self.batches, train.num_workers, pin=pin, give_up=self.give_up)

    def take(self, step: int) -> dict[str, Tensor]:
        """The gradients of one step, averaged over processes; returns the mean losses.

        Where the micro-batch may shrink, processes agree that none has failed before they exchange gradients, or one
        would wait for another's: no pass of an attempt averages, for it might have been undone.
        """
        fault("step")
        while True:
            self.attempt, reason = Attempt(self.stage) if self.shrinks or self.undoable else None, ""
            try:
                values = self._run(step)
            except RuntimeError as failure:
                if not (self.shrinks and out_of_memory(failure)):
                    raise
                reason = str(failure) or "out of memory"  # the exception itself would hold the activations
            if not self.shrinks:
                return values
            if not self._any_failed(bool(reason)):  # every process comes here, whether it failed or not
                self._average()
                self.held += 1
                return values
            self.undo()
            self._shrink(step, reason or "out of memory in another process")

    def undo(self) -> None:
        """Give up the step just taken: what its passes left in stage, buffers and gradients."""
        if self.attempt:
            self.attempt.drop()
        self.attempt = None

    def keys(self, step: int) -> Keys:
        """The samples of a micro-batch of `step` by process and part, as the step was split."""
        return partial(_keys, self.stage, self.batches, step)

    def place(self, step: int) -> dict[str, Any]:
        """Where the data stand before `step`, for checkpoints."""
        found = {"micro": self.micro, "held": self.held, "held_on": self._machines()} if self.searches else {}
        return {"place": self.batches.order.place(step), "order": self.rule, **found}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """The inverse of `place`; takes effect with `open_data`."""
        samples = self.micro * self.accumulation
        if "watchdogs" in state:  # not in checkpoints of earlier versions, which did not keep their place either
            self.base = step, int(state["place"])
        self.rule = int(state.get("order", 1))  # checkpoints name none from before there was a second
        if self.searches and "micro" in state and samples % int(state["micro"]) == 0:  # what was found to fit
            same = state.get("held_on") == self._machines()  # on others it has yet to show that it does
            self.held = int(state["held"]) if same else 0
            self.micro, self.accumulation = int(state["micro"]), samples // int(state["micro"])

    def _machines(self) -> list[int]:
        """How many processes there are, and the memory of this one's device in bytes, 0 for a CPU."""
        device = self.accelerator.device
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        return [self.accelerator.num_processes, memory]

    def _run(self, step: int) -> dict[str, Tensor]:
        """All backward passes of one step; the process wrappers average on the last, but where micro-batches shrink."""
        sums: dict[str, Tensor] = {}
        self.losses = []
        for part in range(self.accumulation):
            with self.journal.waiting():
                batch = next(self.incoming)
            with ExitStack() as stack:
                # Nothing to hold back where weights are shared out: every pass averages, and no process holds whole
                # gradients.
                if self.shrinks or part < self.accumulation - 1:
                    for network in self.stage.wrapped.values():
                        stack.enter_context(self.accelerator.no_sync(network))
                values = self.stage.backward(batch, step, 1 / self.accumulation)
            self.losses.append(torch.stack([value.detach().float() for value in values.values()]).sum())
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / self.accumulation
        return sums

    def _any_failed(self, failed: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return failed
        flag = torch.tensor(float(failed), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum"))

    def _average(self) -> None:
        """Average gradients over processes, some of them in one message: hundreds of small ones each wait for all."""
        processes = self.accelerator.num_processes
        networks = self.stage.networks.values() if processes > 1 else ()
        for bucket in buckets([p.grad for network in networks for p in network.parameters() if p.grad is not None]):
            message = torch.cat([gradient.reshape(-1) for gradient in bucket])
            torch.distributed.all_reduce(message)
            parts = (message / processes).split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))

    def _shrink(self, step: int, reason: str) -> None:
        """Halve the micro-batch (to a number that divides it) at equal global batch, and read again from `step`."""
        fitting = (n for n in range(self.micro // 2, 0, -1) if self.micro % n == 0 and n % self.stage.group == 0)
        smaller = next(fitting, 0)
        if not smaller:
            raise torch.OutOfMemoryError(reason)
        now = f"going on with {smaller} (the global batch stays {self.train.batch_size})"
        announce(self.accelerator, f"note: out of memory at step {step} with a micro-batch of {self.micro}; {now}")
        self.accumulation, self.micro, self.held = self.accumulation * self.micro // smaller, smaller, 0
        self.open_data(step)
        torch.cuda.empty_cache()


def _keys(stage: Stage, batches: Batches, step: int, process: int, part: int) -> list[str]:
    return [stage.dataset.shards.key(slot.index) for slot in batches.share(step, part, process)]


def buckets(tensors: list[Tensor], size: int = BUCKET) -> Iterator[list[Tensor]]:
    """The tensors in order, in runs of one type that hold up to `size` numbers, or one tensor."""
    run: list[Tensor] = []
    for tensor in tensors:
        if run and (tensor.dtype != run[0].dtype or sum(t.numel() for t in run) + tensor.numel() > size):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run
