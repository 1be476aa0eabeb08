"""The micro-batches of a process, read ahead by loader processes: those that die are replaced."""

from __future__ import annotations

import errno
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset

from training.data.arrivals import Arrivals, Losses
from training.data.prefetch import prefetching
from training.data.samples import Batch
from training.data.sharing import hand_over
from training.errors import DISK, UserError
from training.machine.signals import block_sigterm, shield
from training.messages import note, warn
from training.shards.streaming import StreamedShards

if TYPE_CHECKING:
    from training.data.images import Images
    from training.data.latents import Latents
    from training.data.order import Batches, Slot

AHEAD = 4  # batches that each loader process reads ahead
DEATHS = 3  # of loader processes within an hour, after which a training is to save and stop
HOUR = 3600.0
STUCK = 15.0  # seconds after a death in which the reader has noticed it, unless it is held up
FEWER = "lower --num-workers (0 reads in the training process), or give the machine more memory"


def stream(
    dataset: Images | Latents,
    batches: Batches,
    workers: int,
    *,
    pin: bool = False,
    give_up: Callable[[], None] = lambda: None,
) -> Iterator[Batch]:
    """The micro-batches of this process, in order, read ahead by `workers` processes.

    What a loader process that died would have read is read again by new ones. At the third death within an hour
    `give_up` is called, and one process reads on until the training has saved. Raises UserError (exit 6) where that one
    dies, too, or where no process can be started.
    """
    done, ahead, deaths = 0, AHEAD, list[float]()
    losses = Losses(dataset.bad) if isinstance(dataset.shards, StreamedShards) else None
    while True:
        try:
            again = done % batches.accumulation  # of the step that stands, read and given already
            for batch in _received(dataset, _from(batches, done), workers, ahead, pin=pin, skipped=again):
                if losses:
                    losses.count(batch)
                elif workers:  # what a loader process counts, it counts in a copy
                    dataset.count(batch.bad)
                done += 1
                yield batch
            return
        except Died as death:
            deaths = [*(before for before in deaths if death.at - before < HOUR), death.at]
            if len(deaths) > DEATHS:
                raise UserError(f"loader processes die again and again ({death.why})", hint=FEWER, code=DISK) from None
            warn(f"a loader process died ({death.why}), {len(deaths)} so far: a new one reads its batches again")
            if len(deaths) == DEATHS:
                workers, ahead = 1, 1
                give_up()


def loaders(workers: int, ahead: int) -> dict[str, Any]:
    """What a DataLoader is told of its processes, each `ahead` batches ahead of who asks."""
    # Forked, loaders are born with this process's answers to signals; a server of loaders would die of the first.
    context = "fork" if sys.platform == "linux" else None
    more = {"prefetch_factor": ahead, "worker_init_fn": shield, "multiprocessing_context": context} if workers else {}
    return {"num_workers": workers, **more}


@contextmanager
def loader_errors(incoming: list[Any]) -> Iterator[None]:
    """Inside, a loader process of `incoming` (the iterator of a DataLoader, once there is one) that died is a Died,
    and a system that gives no more processes or files is a UserError (exit 6)."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as failure:
        if incoming and (why := _cause(incoming[0])):
            raise Died(why) from None
        text = str(failure)
        if getattr(failure, "errno", 0) in (errno.EMFILE, errno.ENFILE) or "ancdata" in text or "open files" in text:
            hint = "raise the limit (ulimit -n 4096), or use --num-workers 0"
            raise UserError("too many open files for the loader processes", hint=hint, code=DISK) from None
        if not incoming and isinstance(failure, OSError):
            what = f"no loader process can be started ({failure.strerror})"
            raise UserError(what, hint="use --num-workers 0, or raise the limit (ulimit -u)", code=DISK) from None
        raise


class Died(Exception):
    """A loader process is gone."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why, self.at = why, time.monotonic()


def _from(batches: Batches, done: int) -> Batches:
    """What is left after `done` micro-batches, from the beginning of a step on."""
    return replace(batches, start=batches.start + done // batches.accumulation)


def _received(
    dataset: Images | Latents, batches: Batches, workers: int, ahead: int, *, pin: bool, skipped: int
) -> Iterator[Batch]:
    """The batches of one set of loader processes, but the first `skipped`."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # they may outnumber cores
    how: dict[str, Any] = {"collate_fn": _whole, "pin_memory": pin, **loaders(workers, ahead)}
    loader: Any
    if isinstance(dataset.shards, StreamedShards):
        loader = DataLoader(Arrivals(dataset, batches), batch_size=None, **how)
    else:
        loader = DataLoader(_Fetched(dataset), batch_sampler=prefetching(batches, dataset.shards), **how)
    through_pipes = False
    for batch in surviving(loader):
        if isinstance(batch, bytes):
            if not through_pipes:
                note("/dev/shm (or the limit of open files) is too small for batches: they take a slower way")
            batch, through_pipes = pickle.loads(batch), True  # of our own process
        if isinstance(batch, UserError):
            raise batch
        if skipped:
            skipped -= 1
            continue
        yield batch


def surviving(loader: Any) -> Iterator[Any]:
    """What a DataLoader gives. Raises Died where one of its processes does, UserError (exit 6) where the system gives
    no more processes or files."""
    incoming: list[Any] = []
    with loader_errors(incoming), block_sigterm(), _own_sigchld():
        incoming.append(iter(loader))
    over, nothing = _watch(incoming[0]), object()
    try:
        while True:
            with loader_errors(incoming):
                value = next(incoming[0], nothing)
            if value is nothing:
                return
            yield value
    finally:
        over.set()


def _watch(incoming: Any) -> threading.Event:
    """Until the event is set: see that a process which died while it handed a batch over does not hold its reader up.

    Who waits for the second half of a batch waits for ever, while anyone might still write it.
    """
    over, workers = threading.Event(), list(getattr(incoming, "_workers", []))

    def look() -> None:
        while not over.wait(1.0):
            if _codes(workers) and not over.wait(STUCK):  # as a rule it is noticed in less
                for worker in workers:
                    worker.kill()
                    worker.join()
                queue._writer.close()
                return

    if workers:
        queue = incoming._worker_result_queue
        threading.Thread(target=look, daemon=True).start()
    return over


@contextmanager
def _own_sigchld() -> Iterator[None]:
    """Have torch not take SIGCHLD over: its handler raises wherever this process is, in the midst of a step, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _cause(incoming: Any) -> str:
    """How one of the loader processes ended, after which the others are ended too; empty where all live."""
    processes = getattr(incoming, "_workers", [])
    for attempt in range(10):
        if codes := _codes(processes):
            break
        time.sleep(0.05 * bool(attempt))  # what it leaves breaks before the system says that it is gone
    else:
        return ""
    for process in processes:
        process.terminate()
    code = codes[0]
    if code >= 0:
        return f"exit code {code}"
    reason = ", as the system does where memory is short" if -code == signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{reason}"


def _codes(processes: list[Any]) -> list[int]:
    """The exit codes of those that did not end as they should."""
    return [process.exitcode for process in processes if process.exitcode]


class _Fetched(Dataset[Any]):
    """Hands a UserError over as a value: raised in a loader process, it would lose its hint and code."""

    def __init__(self, dataset: Images | Latents) -> None:
        self.dataset = dataset

    def __getitems__(self, slots: list[Slot]) -> Batch | UserError | bytes:
        try:
            batch = self.dataset.__getitems__(slots)
        except UserError as problem:
            return problem
        return hand_over(batch)


def _whole(batch: Any) -> Any:
    return batch
