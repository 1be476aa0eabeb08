"""Large files written piece by piece that appear whole or not at all; small ones are `training.files.write_bytes`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from training.files import disk_error, sync_folder


@contextmanager
def staged(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` whole, synced and at once.

    Raises UserError(code 6) where the disk refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as failure:
        raise disk_error(path, failure) from None
    finally:
        partial.unlink(missing_ok=True)
