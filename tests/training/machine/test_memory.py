"""What a process is told of memory and open files, on both systems."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest

from training.machine import memory
from training.shards.offset_index import Descriptors


def test_the_peak_is_in_bytes_on_both_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = memory.peak_memory()
    assert 50 << 20 < peak < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.peak_memory() in range(peak // 1024, 2 * peak // 1024)


def test_the_limit_of_open_files_is_raised_where_it_may_be() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        memory.allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(memory.FILES, before[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        memory.allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]  # never lowered
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    """Read again by fewer at a time: no sample counts as broken for it."""
    for number in range(100):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    files, before = Descriptors(256), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, before[1]))
        for number in [*range(100), 0, 99]:
            assert files.read(str(tmp_path / str(number)), 1, 0) == bytes([number])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        files.close()
