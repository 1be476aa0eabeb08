"""Tars of captioned pictures written member by member, and what make_shards says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.doors.make_shards import main
from training.errors import UserError
from training.pictures.decoding import encode_png
from training.shards.tars import END, member_bytes


def png(seed: int, side: int = 16) -> bytes:
    """A picture of noise, another for each seed."""
    return encode_png(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def tar_of(path: Path, members: dict[str, bytes], end: bytes = END) -> Path:
    """A tar of the members named, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(member_bytes(name, data) for name, data in members.items()) + end)
    return path


def refused(*words: object) -> UserError:
    """The UserError that `make_shards WORDS` ends with."""
    with pytest.raises(UserError) as caught:
        main(list(map(str, words)))
    return caught.value
