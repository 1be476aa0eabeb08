"""All doors as one program: `python -m training VERB …`; where the package is installed also `latent-diffusion VERB …`
and, for each door, `latent-diffusion-VERB …`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import training
from training.commands import INSTALLED
from training.errors import UserError
from training.messages import answer
from training.settings.families import suggestion
from training.settings.flags import run_main
from training.shadows import leave_working_folder

DOORS = Path(__file__).parent / "doors"


def __getattr__(verb: str) -> Callable[[], None]:
    """What the installed command `latent-diffusion-VERB` calls: `from training.__main__ import generate`."""
    if verb in verbs():
        return partial(run_main, partial(open_door, verb))
    raise AttributeError(f"module {__name__!r} has no attribute {verb!r}")


def verbs() -> dict[str, str]:
    """Verb -> what it does, in one line; read from the doors without importing them."""
    files = sorted(path for path in DOORS.glob("*.py") if path.stem != "__init__")
    texts = {path.stem: ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "" for path in files}
    return {verb: text.partition("\n")[0] for verb, text in texts.items()}


def open_door(verb: str) -> None:
    """Run the main of a door, which then is this program: its commands are told as this one was called."""
    called, named = Path(sys.argv[0]), f"{INSTALLED}-{verb.replace('_', '-')}"
    own = called.with_name(named) if called.name in (INSTALLED, named) else DOORS / f"{verb}.py"
    sys.argv[0] = str(own)
    import_module(f"training.doors.{verb}").main()


def choose() -> None:
    """Open the door that the first word names, or list them all. Raises UserError for any other word."""
    program = INSTALLED if Path(sys.argv[0]).name == INSTALLED else "python -m training"
    word = sys.argv.pop(1) if sys.argv[1:] else "--help"
    found, verb = verbs(), word.replace("-", "_")
    if verb in found:
        open_door(verb)
    elif word == "--version":
        answer(training.__version__)
    elif word in ("-h", "--help"):
        width = max(map(len, found))
        answer(f"usage: {program} VERB …", "", f"VERB is one of these; {program} VERB --help lists its flags:", "")
        answer(*(f"  {name.replace('_', '-'):{width}}  {text}" for name, text in found.items()))
    else:
        near = suggestion(word, [name.replace("_", "-") for name in found])
        raise UserError(f"{word}: no such verb{near}", hint=f"{program} --help lists them")


def main() -> None:
    """What `latent-diffusion` and `python -m training` call."""
    run_main(choose)


if __name__ == "__main__":
    leave_working_folder()
    main()
