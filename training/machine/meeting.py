"""How processes of one training join, wait for each other and agree, through the store that they met at.

A process group's own waits end after a fixed time, however busy the process waited for is. Here every process shows
that it lives, by a beat every few seconds; who waits, waits as long as the others live, and ends when one does not.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from training.errors import LOST, UserError
from training.messages import note

BEAT = 2.0  # seconds between two signs of life
LOST_AFTER = 45.0  # seconds without one after which a process counts as lost
TOLD_AFTER, JOIN_WITHIN = 30.0, 600.0  # seconds until one who waits for others to start says so, and until it ends
COLLECTIVE = timedelta(minutes=30)  # limit of one exchange of tensors, for which all processes are ready
FAILURE = "training/failure"  # who ended first, and its exit code
JOINING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Meetings:
    """The meetings of this process: each a number, the same in all processes."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size, self.number = store, rank, size, 0
        self.seen: dict[int, tuple[bytes, float]] = {}  # of each process: its last beat, and when it was new
        self.stop = Event()
        store.set(f"training/who/{rank}", json.dumps(_who(os.getpid())))
        store.set(f"training/beat/{rank}", "0")

    def beat(self) -> None:
        """Show, until the process ends, that it lives."""
        thread = Thread(target=self._beat, daemon=True)
        thread.start()
        # Stopped while Python still runs: a thread inside the store's code must not meet the interpreter's end.
        atexit.register(thread.join, BEAT)
        atexit.register(self.stop.set)  # called before the one above

    def _beat(self) -> None:
        number = 0
        with suppress(RuntimeError):  # the store is gone: whoever waits finds that, too
            while not self.stop.wait(BEAT):
                number += 1
                self.store.set(f"training/beat/{self.rank}", str(number))

    def meet(self) -> None:
        """Wait until every process is here. Raises UserError (exit 1) where one ended or is lost."""
        self.number += 1
        self.seen.clear()
        self.store.set(self._place(self.number, self.rank), "")
        pause, looked = 0.005, time.monotonic()
        while missing := [r for r in range(self.size) if not self.store.check([self._place(self.number, r)])]:
            if self.store.check([FAILURE]):
                raise lost("another process ended")
            if time.monotonic() - looked > BEAT:
                looked = time.monotonic()
                self._look_after(missing)
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        if self.number > 1:  # every process has left that one
            self.store.delete_key(self._place(self.number - 1, self.rank))

    def watch(self) -> None:
        """Raise UserError (exit 1) where another process ended or is lost, without waiting: asked again and again by
        one that works alone."""
        if self.store.check([FAILURE]):
            raise lost("another process ended")
        self._look_after([rank for rank in range(self.size) if rank != self.rank])

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise UserError (exit 2), in all processes, where a fact is not the same in all. Collective."""
        self.store.set(f"training/facts/{self.rank}", json.dumps(facts, default=str))
        self.meet()
        every = [json.loads(self.store.get(f"training/facts/{rank}")) for rank in range(self.size)]
        names = [name for name in every[0] if any(row.get(name) != every[0][name] for row in every)]
        if names:
            raise UserError(
                "processes were started with different settings: " + "; ".join(_difference(n, every) for n in names),
                hint="start every process with the same command, data and software",
            )
        self.meet()  # nobody leaves facts of the next agreement before all have read these

    def _look_after(self, missing: list[int]) -> None:
        for rank in missing:
            beat, now = self.store.get(f"training/beat/{rank}"), time.monotonic()
            last, since = self.seen.get(rank, (b"", now))
            self.seen[rank] = (beat, since if beat == last else now)
            gone = beat == last and _gone(json.loads(self.store.get(f"training/who/{rank}")))
            if gone or now - self.seen[rank][1] > LOST_AFTER:
                raise lost(f"process {rank} of {self.size}" + ("" if gone else f", silent for {LOST_AFTER:g} s"))

    def _place(self, number: int, rank: int) -> str:
        return f"training/meeting/{number}/{rank}"


_meetings: Meetings | None = None


def join(backend: str) -> None:
    """Join the process group that the environment names; without one, do nothing.

    Says how many are there where others do not come. Raises UserError (exit 1) where they have not after 10 minutes,
    (2) where the port they are to meet at is taken.
    """
    global _meetings
    if distributed.is_initialized() or not all(os.environ.get(name) for name in JOINING):
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        return
    place = _store(rank, size)
    meetings = Meetings(place, rank, size)
    _await_all(place, rank, size)
    distributed.init_process_group(backend, store=place, rank=rank, world_size=size, timeout=COLLECTIVE)
    meetings.beat()
    _meetings = meetings


def meet() -> None:
    """Wait until every process is here, however long their work before it takes. Raises UserError where one is lost."""
    with _connected():
        if _meetings:
            _meetings.meet()
        elif distributed.is_initialized():  # a group made by someone else
            distributed.barrier()


def watch() -> None:
    """Raise UserError where another process ended or is lost; for work of which no part waits for another's."""
    with _connected():
        if _meetings:
            _meetings.watch()


def agree(facts: Mapping[str, Any]) -> None:
    """Raise UserError (exit 2), in all processes, where these facts are not the same in all. Collective."""
    with _connected():
        if _meetings:
            _meetings.agree(facts)


def store() -> Any:
    """The store that the processes met at. RuntimeError or ValueError where they did not."""
    return _meetings.store if _meetings else distributed.distributed_c10d._get_default_store()


@contextmanager
def _connected() -> Iterator[None]:
    """Inside, the end of the store, or of the way to it, is that of another process."""
    try:
        yield
    except distributed.DistError:
        raise lost("the store they met at does not answer") from None


def lost(why: str) -> UserError:
    """The error of a process that another has left alone."""
    hint = "see what the other process said; then go on with the same command, a training with --resume auto"
    return UserError(f"lost another process ({why})", hint=hint, code=LOST)


def _store(rank: int, size: int) -> Any:
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"MASTER_PORT={port}: expected a port", hint="give one from 1024 to 65535, as 29500")
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's agent does
    told = _told_unless_over(f"process {rank} waits for an answer at {host}:{port} (MASTER_ADDR, MASTER_PORT)")
    try:
        limit = timedelta(seconds=JOIN_WITHIN)
        store = TCPStore(host, int(port), size, hosts, limit, wait_for_workers=False, multi_tenant=True)
    except (distributed.DistError, ValueError) as failure:
        if "EADDRINUSE" in str(failure) or "in use" in str(failure):
            hint = "give every process another MASTER_PORT, or start with torchrun --standalone"
            raise UserError(f"MASTER_PORT {port} is in use", hint=hint) from None
        hint = "start the first process, and give every process its MASTER_ADDR and MASTER_PORT"
        raise UserError(f"nobody answers at {host}:{port}", hint=hint, code=LOST) from None
    finally:
        told.set()
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _await_all(store: Any, rank: int, size: int) -> None:
    store.set(f"training/joined/{rank}", "")
    began, told = time.monotonic(), False
    while missing := [r for r in range(size) if not store.check([f"training/joined/{r}"])]:
        waited = time.monotonic() - began
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        joined = f"{size - len(missing)} of {size} processes have joined (missing: {names})"
        if waited > JOIN_WITHIN:
            hint = "see what the missing one said; start every process with the same WORLD_SIZE, each with its RANK"
            raise UserError(f"after {JOIN_WITHIN:g} s only {joined}", hint=hint, code=LOST)
        if waited > TOLD_AFTER and not told:
            note(f"process {rank} waits: {joined}; it ends after {JOIN_WITHIN:g} s")
            told = True
        time.sleep(0.02 if waited < 5 else 0.5)


def _told_unless_over(text: str) -> Event:
    """Have `text` told after a while, unless the event returned is set before."""
    over = Event()

    def tell_unless_over() -> None:
        if not over.wait(TOLD_AFTER):
            note(text)

    Thread(target=tell_unless_over, daemon=True).start()
    return over


def _difference(name: str, every: list[dict[str, Any]]) -> str:
    """`train.seed 0 in process 0, 1 in process 1`, each value with the first process that has it."""
    first: dict[str, int] = {}
    for rank, row in enumerate(every):
        first.setdefault(str(row.get(name)), rank)
    return f"{name} " + ", ".join(f"{value[:40]} in process {rank}" for value, rank in list(first.items())[:3])


def _who(pid: int) -> list[Any]:
    """[machine and process space, process, when it began]: what tells another process on this machine."""
    space = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
    return [f"{socket.gethostname()} {space}", pid, _status(pid)[1]]


def _status(pid: int) -> tuple[str, str]:
    """(state, when it began) of a process, both empty where the system keeps no /proc. Raises ProcessLookupError."""
    if not os.path.exists("/proc/self/stat"):
        os.kill(pid, 0)
        return "", ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()  # after its name
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    return fields[0], fields[19]


def _gone(who: list[Any]) -> bool:
    """Whether a process of this machine ended; False for one elsewhere, of which only its beats tell."""
    if _who(os.getpid())[0] != who[0]:
        return False
    try:
        state, began = _status(who[1])
    except ProcessLookupError:
        return True
    except OSError:  # it lives, and is another's
        return False
    return began != who[2] or state == "Z"


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
