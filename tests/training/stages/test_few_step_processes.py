"""Two processes teach a student as one does: networks, companions and moments, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import student_ranks
import student_steps
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from student_steps import CASES, Case, each_case

teacher = student_steps.teacher
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def together(latents: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Every member, trained by two processes in one launch."""
    home = tmp_path_factory.mktemp("together")
    script = Path(student_ranks.__file__).with_suffix("")
    assert ranks.start(2, home, script, latents, teacher, home) == [0, 0], ranks.said(home)
    found: dict[str, dict[str, str]] = json.loads((home / "hashes.json").read_text())
    assert list(found) == ["-".join(case) for case in CASES]
    return found


@each_case
def test_two_processes_train_as_one(case: Case, together: dict[str, dict[str, str]], latents: Path, teacher: Path,
                                    tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    alone = student_ranks.hashes(case, latents, teacher, tmp_path, Accelerator(cpu=True))
    ours = together["-".join(case)]
    assert ours.keys() == alone.keys() and [name for name in ours if ours[name] != alone[name]] == []
