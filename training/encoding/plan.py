"""What latents are made from, as encoding.json says it: the first file of their folder, which claims it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ldm.representation import VISION
from training.errors import CHECKPOINT, UserError
from training.files import remove_partials, write_json
from training.guarding import read_record
from training.shards.claims import LOCK
from training.shards.index import ENCODING
from training.shards.remote import Remote

BESIDE = 3000  # bytes of a sample beyond its moments: captions, metadata, headers


def claim(target: Path, plan: dict[str, Any], pictures: str) -> None:
    """Refuse a folder that holds anything but an unfinished encoding of the same thing."""
    plan_file = target / ENCODING
    if plan_file.is_file():
        before = {"tile": 0, "hint": None, "image": None, VISION: None, **read_record(plan_file, {})}
        if found := list(differences(before, plan)):
            raise UserError(
                f"{target} holds latents made from something else ({'; '.join(found)})",
                hint="choose another --output, or remove that folder",
                code=CHECKPOINT,
            )
        remove_partials(target)
    elif any(path.name != LOCK for path in target.iterdir()):
        raise UserError(f"{target} is not empty and holds no latents", hint="choose another --output", code=CHECKPOINT)
    write_json(plan_file, {**plan, "pictures": pictures})


def differences(before: dict[str, Any], plan: dict[str, Any], within: str = "") -> Iterator[str]:
    """What of a plan is not as it was before: of tables in it the entries, but for the data's, which are many."""
    for key in dict.fromkeys([*plan, *(before if within else ())]):  # a whole file may say more than a plan
        was, now = before.get(key), plan.get(key)
        if isinstance(was, dict) and isinstance(now, dict) and key != "data":
            yield from differences(was, now, f"{within}{key}.")
        elif was != now:
            yield f"{within}{key} {_short(was)}, now {_short(now)}"


def _short(value: object) -> str:
    """A hash by its beginning, anything else as it is, a table by the hash of all its entries."""
    if isinstance(value, dict) and all(isinstance(part, str) and len(part) == 64 for part in value.values()):
        return f"{len(value)} shards {sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]}"
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def told_from(source: Path | Remote, target: Path) -> str:
    """Where the pictures lie, as the folder of latents may say it to whom it is given: an address, without what may be
    secret, or a path from this folder on; "" for one that names the user's home."""
    if isinstance(source, Remote):
        return str(source)
    path = os.path.relpath(os.path.realpath(source), os.path.realpath(target))
    home = Path(os.path.expanduser("~")).name
    return "" if home in Path(path).parts else path


def sample_bytes(plan: Mapping[str, Any], *, flip: bool) -> int:
    """What a sample will take on disk, embeddings of its captions aside; `flip`: its mirrored picture, too."""
    latent = plan["latent"]
    size: int = math.prod(latent["shape"]) * np.dtype(latent["dtype"]).itemsize
    size += math.prod(latent["picture"]) * (plan.get("hint") or {}).get("channels", 0)
    size += 2 * math.prod(latent["shape"][1:]) * (plan.get(VISION) or {}).get("width", 0)
    return size * (2 if flip else 1) + BESIDE
