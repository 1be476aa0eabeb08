"""Checks of every step: losses and gradients are finite, spikes are skipped, all processes hold the same weights."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from training.errors import DISK, LOST, NUMERICAL, USAGE, UserError
from training.files import write_json
from training.machine.memory import memory_needed, out_of_memory
from training.machine.processes import is_lost_connection
from training.messages import warn
from training.settings.sections import Train

if TYPE_CHECKING:
    from accelerate import Accelerator

Keys = Callable[[int, int], list[str]]  # process and micro-batch -> the keys of its samples
WINDOW = 100  # gradient norms whose median a spike is measured against
LEAST = 20  # norms seen before the first is judged
IN_A_ROW = 20  # steps skipped one after the other before the run stops


class Seen(NamedTuple):
    """What a process saw of a step: its losses and gradient norms, and whom to blame."""

    step: int
    row: Tensor  # micro-batches' losses, then norms: on the device, float32
    parts: int
    norms: tuple[str, ...]
    keys: Keys


class Watchdogs:
    """Judges every step on what all processes saw, so that all stop at it or skip it together.

    Where a verdict may be to skip, it is read before the step is taken, for which the host waits. Where it can only be
    to stop, it is kept on the device, where it holds the optimisers back, and is read before anything is told or kept.
    """

    def __init__(self, run: Path, train: Train, accelerator: Accelerator) -> None:
        self.run, self.factor, self.accelerator = run, train.spike_factor, accelerator
        self.recent: dict[str, deque[float]] = {}
        self.in_a_row, self.skipped, self.overflows = 0, 0, 0
        self.unread: list[Seen] = []
        self.broken = torch.zeros((), device=accelerator.device)  # 1 from the first unread step on that is not finite
        self.stopped_at: int | None = None

    @property
    def skips(self) -> bool:
        """Whether a step may be skipped: for a spike, or by an fp16 scaler that overflows."""
        return bool(self.factor) or self.accelerator.scaler is not None

    def judge(self, step: int, losses: list[Tensor], norms: Mapping[str, Tensor], keys: Keys) -> bool:
        """Whether to take `step`, given this process's loss of each micro-batch and its gradient norms (all 0-dim).

        A norm above `train.spike_factor` (0 = off) times the running median of the last 100 skips the step; so does an
        fp16 scaler's overflow. Raises UserError (exit 5) where a loss is not finite, where a norm is not and no scaler
        is at work, and after 20 skips in a row; `keys(process, micro-batch)` names the samples to blame.
        """
        self._note(step, losses, norms, keys)
        return self.settle()

    def defer(self, step: int, losses: list[Tensor], norms: Mapping[str, Tensor], keys: Keys) -> Tensor:
        """1 where this step or one before it is not finite in this process, else 0: on the device, float32 (). The
        verdict is read in `settle`."""
        self._note(step, losses, norms, keys)
        self.broken = torch.maximum(self.broken, 1 - self.unread[-1].row.isfinite().all().float())
        return self.broken

    def _note(self, step: int, losses: list[Tensor], norms: Mapping[str, Tensor], keys: Keys) -> None:
        row = torch.stack([value.detach().float().reshape(()) for value in (*losses, *norms.values())])
        self.unread.append(Seen(step, row, len(losses), tuple(norms), keys))

    def settle(self) -> bool:
        """Read the verdicts on all steps since the last time; whether the latest is sound. Collective.

        Raises as `judge`, of the first step that is to stop the run.
        """
        unread, self.unread, sound = self.unread, [], True
        if not unread:
            return sound
        rows = self.accelerator.gather(torch.cat([seen.row for seen in unread])[None])
        split = rows.reshape(-1, rows.shape[-1]).split([len(seen.row) for seen in unread], dim=1)
        for seen, every in zip(unread, split, strict=True):
            sound = self._verdict(seen, every.tolist())
        return sound

    def _verdict(self, seen: Seen, every: list[list[float]]) -> bool:
        step, parts, norms, keys = seen.step, seen.parts, seen.norms, seen.keys
        if bad := [(r, a) for r, row in enumerate(every) for a in range(parts) if not math.isfinite(row[a])]:
            raise self._stop("loss is not finite", step, [key for r, a in bad for key in keys(r, a)], every)
        peaks = {name: [row[parts + i] for row in every] for i, name in enumerate(norms)}
        infinite = [name for name, values in peaks.items() if not all(map(math.isfinite, values))]
        if infinite and self.accelerator.scaler is None:
            everyone = [key for r in range(len(every)) for a in range(parts) for key in keys(r, a)]
            raise self._stop(f"{infinite[0].replace('/', ' of the ')} is not finite", step, everyone, every)
        reasons = [f"{name} overflows" for name in infinite]
        finite = {name: max(values) for name, values in peaks.items() if name not in infinite}
        reasons += [why for name, value in finite.items() if (why := self._spike(name, value))]
        self.in_a_row = self.in_a_row + 1 if reasons else 0
        if self.in_a_row >= IN_A_ROW:
            raise self._stop(f"{IN_A_ROW} steps in a row were skipped, the last", step, [], every)
        if infinite:  # the scaler's own business: it skips, and scales down
            self.overflows += 1
        elif reasons:
            self.skipped += 1
            self._say(f"step {step} is skipped: {'; '.join(reasons)} ({self.skipped} skipped so far)")
        return not reasons

    def _spike(self, name: str, value: float) -> str:
        """Why the norm is a spike; empty where it is none. Notes it either way."""
        if not self.factor or not value:
            return ""  # no usual norm is one of 0
        recent = self.recent.setdefault(name, deque(maxlen=WINDOW))
        usual = median(recent) if len(recent) >= LEAST else math.inf
        recent.append(value)
        if value <= self.factor * usual:
            return ""
        return f"{name} {value:.4g} is over {self.factor:g} times its median {usual:.4g}"

    def _stop(self, what: str, step: int, keys: list[str], every: list[list[float]]) -> UserError:
        """The error that ends the run, its batch written down beside it."""
        self.stopped_at = step
        report = f"stopped-at-step-{step:08d}.json"
        if self.accelerator.is_main_process:
            numbers = [[repr(value) for value in row] for row in every]  # NaN is no JSON
            write_json(self.run / report, {"what": what, "step": step, "samples": keys, "by_process": numbers})
        some = f" (samples {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})" if keys else ""
        return UserError(
            f"{what} at step {step}{some}",
            hint="lower --lr, check the data with make_shards verify, or use --mixed-precision no; "
            f"see {report}",
            code=NUMERICAL,
        )

    def compare(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Raise UserError (exit 5) where a weight or average is not the same in all processes. Collective."""
        if self.accelerator.num_processes == 1:
            return
        sums = torch.stack([checksum(value) for value in tensors.values()])
        every = self.accelerator.gather(sums[None])
        if different := (every != every[0]).any(0).nonzero().flatten().tolist():
            first = list(tensors)[different[0]]
            raise UserError(
                f"{len(different)} tensors differ between processes at step {step} (first: {first})",
                hint="a gradient is not averaged, or a process runs other software; go on from an earlier checkpoint",
                code=NUMERICAL,
            )

    def state(self) -> dict[str, Any]:
        """Plain state for checkpoints."""
        recent = {name: list(values) for name, values in self.recent.items()}
        return {"recent": recent, "in_a_row": self.in_a_row, "skipped": self.skipped, "overflows": self.overflows}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.recent = {name: deque(values, maxlen=WINDOW) for name, values in state["recent"].items()}
        self.in_a_row, self.skipped = int(state["in_a_row"]), int(state["skipped"])
        self.overflows = int(state.get("overflows", 0))  # not in checkpoints of earlier versions

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            warn(text)


def checksum(value: Tensor) -> Tensor:
    """The sum of the tensor's bits read as integers, modulo 2^64: exact, in any order, and quick on any device."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return value.detach().view(integers).sum(dtype=torch.int64)


def explain(failure: Exception, step: int, micro: int, batch: int, *, auto: bool = False) -> Exception:
    """What a failure inside a step means, as a UserError where its kind is known; else the failure itself.

    `auto`: the micro-batch was found by search, which another search would find again.
    """
    text = str(failure)
    if not isinstance(failure, RuntimeError):
        return failure
    if out_of_memory(failure):
        other = "" if auto else ", or auto,"
        half = f"--micro-batch-size {micro // 2}{other} trains the same with less (the global batch stays {batch})"
        least = half if micro > 1 else "more processes"
        what = f"out of memory at step {step} with a micro-batch of {micro}{memory_needed(text)}"
        return UserError(what, hint=f"{least}; or --mixed-precision bf16; or a smaller model", code=DISK)
    if is_lost_connection(failure):
        hint = "see what the other process said; then go on with the same command and --resume auto"
        return UserError(f"lost another process at step {step}", hint=hint, code=LOST)
    if type(failure).__module__.startswith(("torch._inductor", "torch._dynamo")):
        reason = text.strip().splitlines()[0][:200] if text.strip() else type(failure).__name__
        return UserError(f"torch.compile does not work here ({reason})", hint="use --train.compile false", code=USAGE)
    return failure
