"""What a model or an adapter is shown: an example kept beside its weights to draw by; of hints, what they are, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoencoder.images import to_uint8
from ldm.adapters.controlled import ControlConfig
from ldm.image_conditions import ImageCondition
from ldm.image_conditions.hint import Hint
from ldm.pipeline import Pipeline
from training.data.latents import Latents
from training.errors import CHECKPOINT, UserError
from training.files import write_bytes, write_json
from training.guarding import read_record
from training.models.cards import HINT, HOLE, SHOWN
from training.models.folders import find
from training.pictures import grids
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


def keep_hint(final: Path, told: Mapping[str, Any] | None, held_out: Latents,
              size: tuple[int, int] = (0, 0)) -> None:
    """Write down what the hints of the latents are, as the summary of their index has `told`, and the first one; in
    buckets, of that of `size`."""
    if told:
        write_json(final / NOTED, dict(told))
    (hint,) = held_out[held_out.evenly(1, size)[0]].extras[EXTRA]
    write_bytes(final / HINT, stored(as_bytes(hint[None])[0]))


def keep_shown(final: Path, condition: ImageCondition, held_out: Latents, pipeline: Pipeline) -> None:
    """Write down the first held-out picture, in buckets of that which is drawn, as who draws gives it to the model:
    small, before its change, or whole with the middle as the hole. Of the latter two there are latents alone, which are
    decoded."""
    batch = held_out[held_out.evenly(1, pipeline.size)[0]]
    if condition.kind == "low-res":
        pixels = to_uint8(2 * batch.extras[EXTRA] - 1)
    else:
        norm, device = pipeline.autoencoder.norm, pipeline.device
        latents = batch.extras[EXTRA] if condition.kind == "source" else norm.mean_latents(batch.data.to(device))
        with torch.no_grad():
            pixels = to_uint8(pipeline.decode(latents.to(device)))
    grids.write(grids.to_pil(pixels.cpu())[0], final / SHOWN)
    if condition.kind == "masked":
        height, width = pixels.shape[-2:]
        hole = torch.zeros(1, 1, height, width, dtype=torch.uint8)
        hole[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = 255
        grids.write(grids.to_pil(hole)[0], final / HOLE)


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
