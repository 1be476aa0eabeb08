"""Memory of a process: kept between steps, and what an out-of-memory message says of it; its limit of open files."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys

import torch

from training.guarding import gigabytes

FILES = 8192  # that a process may hold open
MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)
TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")


def out_of_memory(failure: RuntimeError) -> bool:
    """Whether memory ran out, on any device."""
    return isinstance(failure, torch.OutOfMemoryError) or MEMORY.search(str(failure)) is not None


def memory_needed(text: str) -> str:
    """The least memory that an out-of-memory message tells was needed, and what there is; empty where it tells none.

    The peak so far and the one allocation that failed: a lower bound.
    """
    if not (match := TRIED.search(text)):
        return ""
    allocation = float(match[1]) * 1024 ** ("bytes", "KiB", "MiB", "GiB").index(match[2])
    if torch.cuda.is_available() and "CUDA" in text:
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    else:
        peak = peak_memory()
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f" (at least {gigabytes(int(peak + allocation))} needed, {gigabytes(total)} available)"


def peak_memory() -> int:
    """The most memory that this process has held, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # what the system counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def allow_open_files() -> None:
    """Raise this process's limit of open files, where it may: shards and batches of loader processes need many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def keep_memory() -> None:
    """Have glibc keep freed activations instead of returning them: fresh pages cost a CPU step 20-50 % of its time.

    32 MiB is the largest threshold glibc accepts. Elsewhere than on glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        return
