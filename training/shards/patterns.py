"""The names that a pattern of the command line stands for."""

from __future__ import annotations

import re
from glob import glob
from pathlib import Path

from training.errors import UserError

MOST_SHARDS = 1_000_000  # that one pattern may mean


def braces(pattern: str) -> list[str]:
    """`a{00..02}b` or `a{x,y}b` written out, ranges keeping their width. Raises UserError for more than MOST_SHARDS."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if ends:
        if int(ends[2]) - int(ends[1]) >= MOST_SHARDS:
            raise UserError(f"{pattern}: more than {MOST_SHARDS:,} shards", hint="name them in several packings")
        words = [f"{number:0{len(ends[1])}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    else:
        words = match[1].split(",")
    return [rest for word in words for rest in braces(pattern[: match.start()] + word + pattern[match.end() :])]


def matching(pattern: str) -> list[Path]:
    """The files a star or question mark stands for; brackets are letters like others."""
    return [path for path in map(Path, sorted(glob(pattern.replace("[", "[[]")))) if path.is_file()]
