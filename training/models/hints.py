"""What a model or an adapter is shown as a hint: kept beside its weights, with an example, and read to draw by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm.adapters.controlled import ControlConfig
from ldm.image_conditions.hint import Hint
from training.data.latents import Latents
from training.data.order import Slot
from training.errors import CHECKPOINT, UserError
from training.files import write_bytes, write_json
from training.guarding import read_record
from training.models.cards import HINT
from training.models.folders import find
from training.pictures.flags import is_range
from training.pictures.hints import EXTRA, KINDS, as_bytes, stored

NOTED = "hint.json"  # in final/, beside `HINT`, the first held-out one: kind, channels, range


class HintRead(NamedTuple):
    """A hint's channels, its kind, None where the run does not say, whether a whole model is shown it, and what was
    black and white in files of more than 8 bits that it learned from, where that was not the range of their type."""

    channels: int
    kind: str | None
    by_model: bool
    range: tuple[float, float] | None = None


def keep_hint(final: Path, told: Mapping[str, Any] | None, held_out: Latents) -> None:
    """Write down what the hints of the latents are, as the summary of their index has `told`, and the first one."""
    if told:
        write_json(final / NOTED, dict(told))
    (hint,) = held_out.__getitems__([Slot(0, 0, 0)]).extras[EXTRA]
    write_bytes(final / HINT, stored(as_bytes(hint[None])[0]))


def hint_read(run: str | Path) -> HintRead | None:
    """The hint that the network of a run is shown; None for none. Raises UserError for no such run."""
    found = find(run, "denoiser")
    config: Any = found.config()
    for part, kind in ((config.adapter, ControlConfig), (config.image, Hint)):
        if isinstance(part, kind):
            noted = read_record(found.final / NOTED, {}) if (found.final / NOTED).is_file() else {}
            known = noted.get("kind") if noted.get("kind") in KINDS else None
            channels = part.hint_channels or noted.get("channels") or 3
            return HintRead(int(channels), known, part is config.image, _range(found.final, noted.get("range")))
    return None


def _range(final: Path, noted: Any) -> tuple[float, float] | None:
    """The range that a run's note tells, which anyone may have written. Raises UserError for what is none."""
    if noted is None:
        return None
    pair = isinstance(noted, list) and [type(end) for end in noted] in ([float, float], [int, int])
    if not (pair and is_range(noted)):
        what = f"{final / NOTED}: its range is not LOW HIGH, black and white of the hints"
        raise UserError(what, hint="fetch the run again, or take the range out", code=CHECKPOINT)
    return float(noted[0]), float(noted[1])
