"""A folder of shards belongs to one writer at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import UserError
from training.files import hold
from training.guarding import disk_error

LOCK = ".lock"


@contextmanager
def claimed(folder: Path, hint: str = "wait for it, or choose another --output") -> Iterator[None]:
    """Holds a folder while it is written, and leaves nothing in it.

    Raises UserError (code 4) with `hint` where another process holds it, whose number it names, and (code 6) where
    nothing can be written.
    """
    lock = folder / LOCK
    while True:
        try:
            file = hold(folder)
        except UserError as problem:
            raise UserError(problem.what, hint=hint, code=problem.code) from None
        except OSError as failure:
            raise disk_error(lock, failure) from None
        with file:
            if not _is(file.fileno(), lock):
                continue  # removed by who held it, after we opened it and before we held it
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
