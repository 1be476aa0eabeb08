"""What `training` offers by name: lazy, documented, and the way it was reached before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import training
from training.models.assembly import load_pipeline


def test_the_face_is_what_it_names() -> None:
    assert all(getattr(training, name).__name__ == name for name in training.__all__)
    assert training.load_pipeline is load_pipeline
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        training.load_everything  # noqa: B018  # what is not named there is not there


def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    code = "import sys, training; print([m for m in ('torch', 'training.models') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_old_line_works_with_a_note() -> None:
    with pytest.warns(DeprecationWarning, match="from training import load_pipeline"):
        from training.system import load_pipeline as old
    assert old is load_pipeline
