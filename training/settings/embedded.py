"""Models that go by a name: `demo` and its one-call student `demo-student`, which come with the package, and
`hf:ORG/NAME` of the Hugging Face hub. Free of torch."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from training.commands import DEMO, EMBEDDED
from training.errors import CHECKPOINT, UserError
from training.messages import note

HUB = "hf:"  # before the name of a repository
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "README.md")  # what a model folder holds, and no more of it
WANTED = f"give a run folder, its final/ or one of its checkpoints; {DEMO} is a small model that comes with the package"


def located(model: str | Path, stage: str | None = None) -> Path:
    """The folder of a model: a name of `EMBEDDED` is in the package, `hf:ORG/NAME` is downloaded, all else is a path.

    Where an autoencoder is asked for, by `stage`, a name means the one in it. A folder of that name is `./demo`; a
    `Path` is never a name. Raises UserError where the hub has no such model, or is not there.
    """
    if isinstance(model, Path) or not (model in EMBEDDED or model.startswith(HUB)):
        return Path(model)
    home = Path(str(resources.files("training"))) / "models" / model if model in EMBEDDED else _downloaded(model)
    inner = home / "autoencoder"
    return inner if stage == "autoencoder" and inner.is_dir() else home


@cache
def _downloaded(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.removeprefix(HUB), allow_patterns=list(FILES)))
    except Exception as failure:  # offline, missing, gated, no name: the hub has a class of its own for each
        what = f"{model} could not be had from the Hugging Face hub ({type(failure).__name__})"
        hint = "look up its name; or download it elsewhere, and give its folder"
        raise UserError(what, hint=hint, code=CHECKPOINT) from None


def check_model(model: str) -> None:
    """Raises UserError where there is no folder of that name."""
    if model in EMBEDDED and Path(model).exists():
        note(f"{model} is the model that comes with the package; what is in this folder is ./{model}")
    if not located(model).is_dir():
        raise UserError(f"{model}: no such run", hint=WANTED, code=CHECKPOINT)
