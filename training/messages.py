"""What the program says to people: one message at a time, cleaned of what a file's name could make a terminal do."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys

# Control characters (escape sequences begin with one), line separators, marks that turn the direction of text, halves
# of characters. A new line stays where it is followed by two spaces, as in our own lists: no name begins a line.
UNSAFE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]|\n(?!  )")


class Said:
    """What this process knows of its own speech: whether it is asked to be quiet, the line that it may write over."""

    quiet, shown = False, ""


SAID = Said()


def printable(text: object) -> str:
    """`text` as it may be printed: what moves the cursor, ends the line or hides letters stands as its escape."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(text))


def hush(quiet: bool) -> None:
    """With `quiet` nothing is said from here on but warnings, errors and answers."""
    SAID.quiet = quiet


def say(text: object) -> None:
    """One message on stderr, heard with --quiet too: why the program ended, how it goes on.

    Work goes on without a reader: a closed pipe, a terminal that is gone, a full disk.
    """
    _write("stderr", printable(text))


def tell(text: object) -> None:
    """One message on stderr, of how the work goes."""
    if not SAID.quiet:
        say(text)


def note(text: object) -> None:
    """Something done differently than one might think, on stderr."""
    tell(f"note: {text}")


def warn(text: object) -> None:
    """Something that may spoil the result, on stderr, heard with --quiet too."""
    say(f"warning: {text}")


def rewrites() -> bool:
    """Whether stderr is a terminal, on which a line may be written over."""
    return not SAID.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def show(line: str) -> None:
    """A line on a terminal that the next one, or any message, is written over. By a carriage return alone: no terminal
    needs to know more."""
    width = len(SAID.shown)
    SAID.shown = ""
    text = printable(line)[: shutil.get_terminal_size().columns - 1]  # one that wraps could not be written over
    _write("stderr", f"\r{text.ljust(width)}", end="")
    SAID.shown = text


def clear() -> None:
    """Free the line that `show` wrote."""
    if SAID.shown:
        width, SAID.shown = len(SAID.shown), ""
        _write("stderr", f"\r{' ' * width}\r", end="")


def answer(*lines: object) -> None:
    """What was asked for, on stdout. A reader may close it, as `| head` does. Raises OSError for a full disk."""
    _write("stdout", "\n".join(map(printable, lines)))


def per_second(rate: float, thing: str = "image") -> str:
    """A speed for people, in two significant digits or more: `31.4 images/s`; below one a second, `12.5 s/image`."""
    if 0 < rate < 1:
        return f"{1 / rate:.3g} s/{thing}" if rate > 0.001 else f"{1 / rate:,.0f} s/{thing}"
    return f"{rate:.1f} {thing}s/s" if rate < 100 else f"{rate:,.0f} {thing}s/s"


def duration(seconds: float) -> str:
    """A time for people, in its two largest units: `8 s`, `3 min 20 s`, `5 h 1 min`, `2 d 4 h`."""
    left, parts = round(seconds), list[str]()
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        parts += [f"{count} {unit}"] if count or parts or unit == "s" else []
    return " ".join(part for part in parts[:2] if part[0] != "0") or "0 s"


def roughly(seconds: float) -> str:
    """An estimated time for people, in one unit: `40 s`, `12 min`, `3.5 h`, `4.2 days`."""
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.0f} min" if name == "min" else f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def speak_any_encoding() -> None:
    """Have both streams write characters their encoding lacks as escapes, where they would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def open_streams() -> None:
    """Give stdin, stdout and stderr that were closed a place: else the next file opened, a checkpoint, gets theirs."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            silence(name)


def silence(name: str) -> None:
    """Have `stdout` or `stderr` say no more: its reader is gone."""
    setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for the process's life


def _write(name: str, text: str, end: str = "\n") -> None:
    clear()
    try:
        print(text, end=end, file=getattr(sys, name), flush=True)
    except (OSError, ValueError) as failure:  # ValueError: the stream object itself is closed
        if name == "stdout" and getattr(failure, "errno", None) not in (errno.EPIPE, errno.EIO, errno.EBADF, None):
            raise
        silence(name)
