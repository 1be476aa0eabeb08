"""The one exception a user's mistake becomes: a sentence, the next step, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from training.messages import printable

PACKAGE = "latent-diffusion-from-scratch"
LOST, USAGE, DATA, CHECKPOINT, NUMERICAL, DISK = 1, 2, 3, 4, 5, 6


class UserError(Exception):
    """Something the user can mend: WHAT went wrong, the HINT that mends it, and the exit CODE.

    Codes: 1 another process was lost, 2 usage or configuration, 3 data, 4 checkpoint or compatibility, 5 numerical,
    6 disk or memory.
    """

    def __init__(self, what: str, *, hint: str = "", code: int = USAGE) -> None:
        super().__init__(what)
        self.what, self.hint, self.code = what, hint, code

    def __str__(self) -> str:
        return f"error: {printable(self.what)}" + (f"\nhint: {printable(self.hint)}" if self.hint else "")


class Unreachable(UserError):
    """Data that lie elsewhere cannot be had: no fault of a sample, so that no other may stand in for it."""

    def __init__(self, what: str, *, hint: str = "", code: int = DATA) -> None:
        super().__init__(what, hint=hint, code=code)


def missing_extra(package: str, extra: str, what_for: str) -> UserError:
    """What to say where an optional package is not installed."""
    hint = f"pip install '{PACKAGE}[{extra}]'"
    return UserError(f"{what_for} needs {package}, which is not installed", hint=hint)


@contextmanager
def as_user_error(hint: str, code: int = USAGE) -> Iterator[None]:
    """Inside, a ValueError of the model packages, which is one clear sentence, becomes a UserError."""
    try:
        yield
    except ValueError as failure:
        raise UserError(str(failure).rstrip("."), hint=hint, code=code) from failure
