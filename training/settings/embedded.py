"""The model that comes with the package, found by its name. Free of torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from training.errors import CHECKPOINT, UserError
from training.messages import note

DEMO = "demo"
WANTED = f"give a run folder, its final/ or one of its checkpoints; {DEMO} is a small model that comes with the package"


def located(model: str | Path, stage: str | None = None) -> Path:
    """The folder of a model as it is named: `demo` is the one of the package, all else is a path.

    Where an autoencoder is asked for, by `stage`, `demo` is the one in it. A folder of that name is `./demo`; a `Path`
    is never a name.
    """
    if model != DEMO:
        return Path(model)
    home = Path(str(resources.files("training"))) / "models" / DEMO
    return home / "autoencoder" if stage == "autoencoder" else home


def check_model(model: str) -> None:
    """Raises UserError where there is no folder of that name."""
    if model == DEMO and Path(model).exists():
        note(f"{DEMO} is the model that comes with the package; what is in this folder is ./{DEMO}")
    if not located(model).is_dir():
        raise UserError(f"{model}: no such run", hint=WANTED, code=CHECKPOINT)
