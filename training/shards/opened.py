"""A file's bytes by offset: what a tar is walked through."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol

from training.errors import DATA, UserError
from training.guarding import without_waiting


class Bytes(Protocol):
    """What a tar is read from: `size` bytes at `at`, fewer only at its `end`."""

    end: int

    def read(self, size: int, at: int) -> bytes: ...

    def close(self) -> None: ...


class Opened:
    """A regular file's bytes by offset. Raises UserError(code 3) for what cannot be opened or is none."""

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = without_waiting(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened: {error.strerror}", code=DATA) from None
        status = os.fstat(self.descriptor)
        self.end = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise UserError(f"{path}: is not a regular file", code=DATA)

    def read(self, size: int, at: int) -> bytes:
        """The bytes at `at`."""
        return os.pread(self.descriptor, size, at)

    def close(self) -> None:
        """Nothing is read after it."""
        os.close(self.descriptor)
