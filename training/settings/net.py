"""How a script's main ends: whatever goes wrong becomes one sentence, a next step and an exit code."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from training.errors import DATA, DISK, USAGE, UserError
from training.guarding import disk_error
from training.messages import open_streams, say, silence, speak_any_encoding
from training.shadows import refuse_shadows

PACKAGE = Path(__file__).parents[2]  # a checkout, or where packages are installed
OURS = ("autoencoder", "ldm", "training", "scripts")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
SCARCE = {errno.EMFILE: "ulimit -n 4096", errno.ENFILE: "ulimit -n 4096", errno.EAGAIN: "ulimit -u unlimited"}
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError)
MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)


def run_main(function: Callable[[], object]) -> None:
    """Run a script's main. Exit codes: a UserError's own, 130 and 143 by signal, 1 for a fault of the program.

    With --debug whatever was raised comes with its traceback.
    """
    open_streams()
    speak_any_encoding()
    code: Any = 0
    try:
        refuse_shadows()
        function()
        sys.stdout.flush()  # here, where a full disk is told; python itself would say it later, without a code
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt as stopped:
        code = 128 + getattr(stopped, "number", 2)
    except BrokenPipeError:  # the reader of our output closed it before it was all said, as `| head` does
        silence("stdout")
        code = 141  # as a shell counts SIGPIPE
    except Exception as failure:
        if "--debug" in sys.argv:
            raise
        problem = failure if isinstance(failure, UserError) else explain(failure)
        _say(problem)
        code = problem.code
        with suppress(OSError):  # what a full disk did not take would be tried again by python, and told with code 120
            sys.stdout.flush()
            sys.exit(code)
        silence("stdout")
    sys.exit(code)


def _say(problem: UserError) -> None:
    say(f"error: {problem.what}")
    if problem.hint:
        say(f"hint: {problem.hint}")


def explain(failure: Exception) -> UserError:
    """A failure that nobody foresaw, as a sentence: of the disk or memory where it is one, else of the program."""
    place, at_work_on = _place(failure.__traceback__)
    if isinstance(failure, OSError):
        return _of_system(failure, at_work_on)
    if isinstance(failure, MemoryError) or (isinstance(failure, RuntimeError) and MEMORY.search(str(failure))):
        hint = "use a smaller --batch-size, or smaller pictures; close other programs"
        return UserError(f"out of memory{_on(at_work_on)}", hint=hint, code=DISK)
    if isinstance(failure, RecursionError):
        return UserError(f"nested too deeply{_on(at_work_on)}", hint="is this the right file?", code=DATA)
    reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
    hint = "run again with --debug for the traceback, which a report needs"
    if at_work_on and isinstance(failure, MALFORMED):
        hint = f"if {at_work_on} is damaged or another program's, use another copy; else {hint}"
    return UserError(f"unexpected {reason} ({place}{_on(at_work_on)})", hint=hint, code=1)


def _of_system(failure: OSError, at_work_on: Path | None) -> UserError:
    """A refusal of the operating system: of a disk or of memory (6), of a right or a file (2)."""
    named = failure.filename if isinstance(failure.filename, (str, bytes, os.PathLike)) else None
    path = Path(os.fsdecode(named)) if named else at_work_on
    reason = failure.strerror or str(failure) or type(failure).__name__
    if failure.errno in FULL:
        return disk_error(path or Path("the output"), failure)
    if failure.errno == errno.ENOMEM:
        return UserError("out of memory", hint="use a smaller --batch-size; close other programs", code=DISK)
    what = f"{reason}{_on(path)}"
    if failure.errno in SCARCE:
        return UserError(what, hint=f"raise the limit: {SCARCE[failure.errno]}", code=DISK)
    if isinstance(failure, (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)):
        hint = "check the folder and its permissions, or choose another one"
        return UserError(f"{path or 'a file'}: {reason}", hint=hint, code=DISK)
    if isinstance(failure, FileNotFoundError):
        hint = "is the path right, and was nothing moved while this ran?"
        return UserError(f"{path or 'a file'}: no such file", hint=hint, code=USAGE)
    if failure.errno == errno.ENAMETOOLONG:
        return UserError(f"{str(path)[:80]}…: the name is too long", hint="choose a shorter one", code=USAGE)
    return UserError(what, hint="run again with --debug for the traceback", code=DISK)


def _on(path: Path | None) -> str:
    return f", at work on {path}" if path else ""


def _place(trace: TracebackType | None) -> tuple[str, Path | None]:
    """The innermost line of ours, and the innermost path that a function of ours was called with."""
    place, found = "", None
    while trace:
        code = trace.tb_frame.f_code
        if any(Path(code.co_filename).is_relative_to(PACKAGE / name) for name in OURS):
            place = f"{Path(code.co_filename).relative_to(PACKAGE)}:{trace.tb_lineno}"
            paths = [value for value in trace.tb_frame.f_locals.values() if isinstance(value, Path)]
            found = paths[-1] if paths else found
        trace = trace.tb_next
    return place, found
