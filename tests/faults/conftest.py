"""What tests of faults share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that this user cannot write to, as is shown on the spot: a mount for root, who passes over rights."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o555)
    else:
        mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("root passes over rights, and may not mount here")
    try:
        with pytest.raises(OSError):
            (folder / "file").touch()
        yield folder
    finally:
        folder.chmod(0o755) if os.geteuid() else subprocess.run(["umount", folder], check=True)
