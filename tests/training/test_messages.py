"""What is printed cannot move the cursor, forge a line or hide letters, whatever names it holds."""

import subprocess
import sys

import pytest

from training.errors import UserError
from training.messages import note, per_second, printable, warn


def test_escapes_and_forged_lines() -> None:
    assert printable("a\x1b[2J\rb\nerror: forged\u202eabc\x9b") == "a\\x1b[2J\\rb\\nerror: forged\\u202eabc\\x9b"
    assert printable("two:\n  one\n  two") == "two:\n  one\n  two"  # our own lists
    assert printable("\ud83d half \U0001f388 שלום") == "\\ud83d half \U0001f388 שלום"


def test_errors_are_cleaned_part_by_part() -> None:
    assert str(UserError("a\nhint: no", hint="b\x07")) == "error: a\\nhint: no\nhint: b\\x07"


def test_notes_and_warnings_go_to_stderr(capsys) -> None:  # type: ignore[no-untyped-def]
    note("one\x1b")
    warn("two")
    assert capsys.readouterr() == ("", "note: one\\x1b\nwarning: two\n")


def test_an_ascii_terminal_gets_escapes_and_no_traceback() -> None:
    code = "from training.messages import *; speak_any_encoding(); answer('café'); note('é')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": "ascii"}, check=True
    )
    assert done.stdout == b"caf\\xe9\n" and done.stderr == b"note: \\xe9\n"


@pytest.mark.parametrize(("rate", "said"), [
    (0.0, "0.0 images/s"), (0.0005, "2,000 s/image"), (0.08, "12.5 s/image"), (0.999, "1 s/image"),
    (1.0, "1.0 images/s"), (31.44, "31.4 images/s"), (1234.5, "1,234 images/s"),
])  # fmt: skip
def test_a_speed_below_one_a_second_is_the_time_of_one(rate: float, said: str) -> None:
    assert per_second(rate) == said and per_second(rate, "picture") == said.replace("image", "picture")
