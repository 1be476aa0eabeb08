"""What the program says to people: one message at a time, cleaned of what a file's name could make a terminal do."""

from __future__ import annotations

import re
import sys

# Control characters (escape sequences begin with one), line separators, marks that turn the direction of text, halves
# of characters. A new line stays where it is followed by two spaces, as in our own lists: no name begins a line.
UNSAFE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]|\n(?!  )")


def printable(text: object) -> str:
    """`text` as it may be printed: what moves the cursor, ends the line or hides letters stands as its escape."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(text))


def tell(text: object) -> None:
    """One message on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def note(text: object) -> None:
    """Something done differently than one might think, on stderr."""
    tell(f"note: {text}")


def warn(text: object) -> None:
    """Something that may spoil the result, on stderr."""
    tell(f"warning: {text}")


def answer(text: object) -> None:
    """What was asked for, on stdout."""
    print(printable(text), flush=True)


def speak_any_encoding() -> None:
    """Have both streams write characters their encoding lacks as escapes, where they would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
