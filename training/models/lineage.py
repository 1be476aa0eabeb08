"""What a denoiser's final/ is made of, by content hash, and whether it still is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.errors import CHECKPOINT, UserError
from training.files import write_json
from training.guarding import read_record
from training.runs.folder import record
from training.runs.ingredients import difference

INGREDIENTS = "ingredients.json"  # in final/: the hashes of all that it draws with, by the names that pictures carry
BEGUN_WITH = ("autoencoder", "vocabulary", "tokenizer")  # of those, what run.json names from the first step
PLACES = {"denoiser": "model.safetensors", "vocabulary": "tokenizer"}  # in final/, where not a folder of that name


def stored_ingredients(final: Path) -> dict[str, Any]:
    """What `store_ingredients` wrote; nothing where it did not. Raises UserError for anything else."""
    own = final / INGREDIENTS
    return read_record(own, {}) if own.is_file() else {}


def store_ingredients(final: Path, hashes: Mapping[str, str]) -> None:
    """Write down what `final` holds; what is not among `hashes` stays as it was written before."""
    write_json(final / INGREDIENTS, stored_ingredients(final) | dict(hashes))


def same_ingredients(final: Path, current: Mapping[str, str]) -> None:
    """Raises UserError (code 4) with both hashes where a part of `final` is not the one that was trained, or with.

    What that was is told by `INGREDIENTS` and, before a run has ended, by its run.json; older runs say less.
    """
    begun = record(final.parent).get("hashes", {})
    baseline = {name: begun.get(name) for name in BEGUN_WITH} | stored_ingredients(final)
    if change := difference(baseline, current):
        place = final / PLACES.get(change.name, change.name)
        raise UserError(
            f"{place} is {change.now}, the denoiser was trained with {change.before}",
            hint="put back the one it was trained with, or go on with the run, which writes it again at its end",
            code=CHECKPOINT,
        )
