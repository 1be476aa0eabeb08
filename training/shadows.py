"""Whether `import ldm` and `import autoencoder` give ours: other programs have packages and folders of these names."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from training.errors import UserError

HOME = Path(__file__).parents[1]  # where ours lie beside each other, in a checkout as where they are installed


def refuse_shadows() -> None:
    """Raise UserError where a package or a folder of another program would be imported in place of ours."""
    for name in ("autoencoder", "ldm"):
        spec = find_spec(name)  # which imports nothing
        places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else []
        if places and (place := Path(places[0])) != HOME / name:
            what = f"{place} is imported as {name}, in place of {HOME / name}"
            raise UserError(what, hint=_way_out(name, place))


def leave_working_folder() -> None:
    """Of `python -m`, which looks for packages where it is run first: no longer there, where a run's folder may be
    called autoencoder."""
    with suppress(FileNotFoundError):  # it is gone
        if not sys.flags.safe_path and sys.path[0] == os.getcwd() != str(HOME):
            del sys.path[0]


def _way_out(name: str, place: Path) -> str:
    folders = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if place.parent.resolve() in folders:
        return f"take {place.parent} out of PYTHONPATH, or rename {place.name}"
    if place.parent.name in ("site-packages", "dist-packages"):
        owners = {*metadata.packages_distributions().get(name, ["it"])} - {"latent-diffusion-from-scratch"}
        return f"use an environment for each of the two packages, or pip uninstall {min(owners, default='it')}"
    return f"rename it, or run from another folder than {place.parent}"
