"""Pictures made by the machines of a Ray cluster. Needs the package ray.

This process goes through the source and writes the shards, in the source's order as ever; the others read the files of
pictures where they lie, at the same path, and make what is stored of them. What decides the bytes besides is compared.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import socket
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features

from training.errors import DATA, LOST, UserError
from training.packing.settings import Settings
from training.packing.workers import AHEAD, Picture, Task, make_picture
from training.pictures.formats import formats

CHUNK = 16  # pictures of one task: a task costs Ray about a millisecond
LIBRARIES = ("pil", "jpg", "jpg_2000", "zlib", "zlib_ng", "libtiff", "webp", "avif", "littlecms2")
INSTALL = "install the same versions, this package among them, on every machine of the cluster"

Made = tuple[str, dict[str, str], list[Picture | UserError]]  # by which machine, by what, and what


def ray_pool(count: int) -> Callable[[Settings], RayPool]:
    """What starts a pool of `count` processes, 0: as many as the cluster has CPUs. Raises UserError(code 3) where ray
    is not installed."""
    try:
        return partial(RayPool, importlib.import_module("ray"), count)
    except ImportError:
        what = "--engine ray: the package ray is not installed"
        hint = "pip install ray, or leave --engine out: processes of this machine pack, --num-workers N of them"
        raise UserError(what, hint=hint, code=DATA) from None


@cache
def made_by() -> dict[str, str]:
    """What decides the bytes of a packed picture besides its file and the settings: packages, and the code here."""
    home, code = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for room in ("packing", "pictures") for path in (home / room).glob("*.py")):
        code.update(path.read_bytes())
    libraries = {name: str(features.version(name)) for name in LIBRARIES}
    return {"numpy": np.__version__, **libraries, "formats": " ".join(formats()), "code": code.hexdigest()[:12]}


def make_all(tasks: list[Task], settings: Settings) -> Made:
    """The pictures of some samples: what a process of the cluster does."""
    return socket.gethostname(), made_by(), [make_picture(task, settings) for task in tasks]


class Chunk:
    """The pictures of one task of Ray's, which are sent for when it is full or one of them is asked for."""

    def __init__(self, pool: RayPool) -> None:
        self.pool, self.tasks, self.sent, self.made = pool, list[Task](), None, list[Picture | UserError]()

    def picture(self, place: int) -> Picture | UserError:
        """The picture at a place. Raises UserError as `RayPool.made`."""
        if self.tasks:
            self.made = self.pool.made(self.tasks, self.sent or self.pool.send(self))
            self.tasks, self.sent = [], None
        return self.made[place]


class Place:
    """A picture that is on its way."""

    def __init__(self, chunk: Chunk, place: int) -> None:
        self.chunk, self.place = chunk, place

    def result(self) -> Picture | UserError:
        """The picture, or why it cannot be used."""
        return self.chunk.picture(self.place)


class RayPool:
    """Processes of the cluster that RAY_ADDRESS or `ray start` names; of this machine alone where there is none.

    Raises UserError (code 1) where Ray does not start or a task is lost for good, (2) where a machine has other
    versions or cannot read what this one can.
    """

    def __init__(self, ray: Any, count: int, settings: Settings) -> None:
        self.ray, self.settings = ray, settings
        self._ours = not ray.is_initialized()
        if self._ours:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports its use to its makers
            try:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            except Exception as failure:  # of no cluster a ConnectionError, of a node that does not come up a bare one
                hint = "see `ray status`, or leave --engine out: processes of this machine pack"
                raise UserError(f"Ray does not start ({_first(failure)})", hint=hint, code=LOST) from None
        self._make = ray.remote(make_all).options(num_cpus=1)
        self.ahead = AHEAD * CHUNK * (count or max(1, int(ray.cluster_resources().get("CPU", 1))))
        self._chunk = Chunk(self)

    def submit(self, task: Task) -> Place:
        """Have a picture made."""
        if len(self._chunk.tasks) == CHUNK or self._chunk.made:
            self._chunk = Chunk(self)
        self._chunk.tasks.append(task)
        if len(self._chunk.tasks) == CHUNK:
            self._chunk.sent = self.send(self._chunk)
        return Place(self._chunk, len(self._chunk.tasks) - 1)

    def send(self, chunk: Chunk) -> Any:
        """Give a chunk to the cluster, which takes it up again where a machine is lost."""
        return self._make.remote(chunk.tasks, self.settings)

    def made(self, tasks: list[Task], sent: Any) -> list[Picture | UserError]:
        """What came of a chunk. Of what cannot be used this machine's word is taken: another may not see the files."""
        machine: str
        by: dict[str, str]
        found: list[Picture | UserError]
        try:
            machine, by, found = self.ray.get(sent)
        except self.ray.exceptions.RayError as failure:
            what = f"the Ray cluster lost pictures that it was to make ({_first(failure)})"
            hint = f"{INSTALL}, and run the same command again"
            raise UserError(what, hint=hint, code=LOST) from None
        if other := [f"{name} {by.get(name)}, here {mine}" for name, mine in made_by().items() if by.get(name) != mine]:
            what = f"{machine} would pack other bytes ({'; '.join(other)})"
            raise UserError(what, hint=INSTALL)
        for place, problem in enumerate(found):
            if isinstance(problem, UserError):
                here = make_picture(tasks[place], self.settings)
                if isinstance(here, Picture):
                    what = f"{machine} cannot make {tasks[place].key} ({problem.what}), which this machine can"
                    raise UserError(what, hint="have every machine see the source at the same path")
                found[place] = here
        return found

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._ours:
            self.ray.shutdown()


def _first(failure: Exception) -> str:
    """The last line of a failure that says something, where Ray puts the cause."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(failure).__name__
