"""The mutation drill: its list fits the code, and it tells survivors from the killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from training.drills.mutations import Mutation, drill, outcome, read_mutations, report, unfit_rows
from training.errors import UserError

LIST = tiny.ROOT / "tests" / "mutations.toml"
CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = '''from sums import double, half


def test_double():
    assert double(3) == 6


def test_half():
    assert half(0) == 0
'''
DOUBLE = Mutation("double", "sums.py", "2 * x", "3 * x", ("tests/test_sums.py::test_double",))
HALF = Mutation("half", "sums.py", "x / 2", "x / 3", ("tests/test_sums.py::test_half",))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two functions, one of which its test does not notice."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which take longer to import than all this
    (tmp_path / "tests").mkdir()
    (tmp_path / "sums.py").write_text(CODE)
    (tmp_path / "tests" / "test_sums.py").write_text(TESTS)
    return tmp_path


def test_the_list_fits_the_code() -> None:
    """Each old text is there exactly once, each test exists: a list that nobody mends would rot."""
    mutations = read_mutations(LIST)
    assert len(mutations) > 60 and unfit_rows(tiny.ROOT, mutations) == []


def test_the_drill_names_survivors(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tree itself stays as it is."""
    outcomes = drill(tree, [DOUBLE, HALF], 60)
    assert outcomes == {"double": "killed", "half": "SURVIVED"}
    assert report(outcomes) == 1 and report({"double": "killed"}) == 0
    said = capsys.readouterr().out
    assert "1 of 2 mutations killed\nsurvived: half\n" in said and "survived: double" not in said
    assert (tree / "sums.py").read_text() == CODE and not list(tree.rglob("__pycache__"))


def test_what_never_ends_is_stopped(tree: Path) -> None:
    (tree / "tests" / "test_sums.py").write_text("import time\n\n\ndef test_half():\n    time.sleep(600)\n")
    assert outcome(tree, HALF.tests, 0.5) == "killed (time limit)"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"old": "4 * x"}, "its old text occurs 0 times in sums.py"),
        ({"old": "x"}, "its old text occurs 4 times in sums.py"),
        ({"file": "products.py"}, "its old text occurs 0 times in products.py"),
        ({"new": "2 * x"}, "changes nothing"),
        ({"tests": ()}, "names no test"),
        ({"tests": ("tests/test_sums.py::test_triple",)}, "no test tests/test_sums.py::test_triple"),
        ({"tests": ("tests/test_products.py",)}, "no test tests/test_products.py"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tree: Path, changes: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match="double: ") as caught:
        drill(tree, [HALF, Mutation(**{**vars(DOUBLE), **changes})], 60)
    assert caught.value.code == 2 and told in caught.value.what
    with pytest.raises(UserError, match="half: the name is given twice"):
        drill(tree, [HALF, HALF], 60)


def test_tests_that_fail_anyway_say_nothing(tree: Path) -> None:
    (tree / "sums.py").write_text(CODE.replace("2 * x", "4 * x"))
    with pytest.raises(UserError, match="the tests fail without any mutation") as caught:
        drill(tree, [HALF, Mutation("double", "sums.py", "4 * x", "5 * x", DOUBLE.tests)], 60)
    assert caught.value.code == 3


def test_the_door(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = tiny.refused("mutation_drill", "--only", "no such mutation")
    assert refused.code == 2 and "no such mutation" in refused.what
    file = tree / "mutations.toml"
    file.write_text('[[mutation]]\nname = "clip"\n')
    assert tiny.refused("mutation_drill", "--list", file).hint.startswith("each [[mutation]] has name")
