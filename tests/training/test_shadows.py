"""Packages and folders of others that are called like ours: what is told of them, and what they cannot do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

GENERATE = [str(tiny.SCRIPTS / "generate.py"), "--help"]
EDITABLE = '''
import sys
from importlib.machinery import PathFinder

class Finder:  # as an editable installation finds packages: after those on the path
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{root!r}]) if name in ("autoencoder", "configs", "ldm", "training") else None

sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, Finder)
sys.path += {last!r}
'''


class Place:
    """A folder to work in, and an environment in which our packages are installed as editable ones."""

    def __init__(self, folder: Path) -> None:
        self.work, self.site = folder / "work", folder / "site"
        self.others = folder / "lib" / "site-packages"
        for path in (self.work, self.site, self.others):
            path.mkdir(parents=True)
        finder = EDITABLE.format(root=str(tiny.ROOT), last=[str(self.others)])
        (self.site / "sitecustomize.py").write_text(finder)

    def run(self, *words: str, path: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**tiny.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, (path, str(self.site))))}
        command = [sys.executable, *words]
        return subprocess.run(command, env=environment, cwd=self.work, capture_output=True, text=True, timeout=120)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_folder_on_the_path_is_named_with_the_way_out(place: Place, tmp_path: Path) -> None:
    """An empty folder is enough; the command is refused in two lines, and works when it is renamed."""
    shadow = tmp_path / "projects" / "ldm"
    shadow.mkdir(parents=True)
    said = f"error: {shadow} is imported as ldm, in place of {tiny.ROOT / 'ldm'}\n"
    for command in (GENERATE, ["-m", "training", "generate", "--help"]):
        done = place.run(*command, path=str(shadow.parent))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"{said}hint: take {shadow.parent} out of PYTHONPATH, or rename ldm\n"
    shadow.rename(shadow.with_name("their_ldm"))
    assert place.run(*GENERATE, path=str(shadow.parent)).stdout.startswith("usage: generate.py")


def test_an_installed_package_is_named_with_its_owner(place: Place) -> None:
    (place.others / "ldm").mkdir()
    (place.others / "ldm" / "__init__.py").touch()
    about = place.others / "latent_ldm-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: latent-ldm\nVersion: 1.0\n")
    (about / "top_level.txt").write_text("ldm\n")
    (about / "RECORD").write_text("ldm/__init__.py,,\n")
    done = place.run(*GENERATE)
    assert done.returncode == 2 and f"error: {place.others / 'ldm'} is imported as ldm, in place of " in done.stderr
    way_out = "use an environment for each of the two packages, or pip uninstall latent-ldm"
    assert done.stderr.endswith(f"hint: {way_out}\n")
    shutil.rmtree(place.others / "ldm")
    assert place.run(*GENERATE).returncode == 0


def test_a_program_beside_a_run_is_told(place: Place) -> None:
    """From Python, where the folder of the program comes first: a run that is called autoencoder."""
    (place.work / "autoencoder").mkdir()
    (place.work / "mine.py").write_text("from training import load_pipeline\n")
    done = place.run("mine.py")
    assert f"error: {place.work / 'autoencoder'} is imported as autoencoder, in place of " in done.stderr
    assert done.stderr.endswith(f"hint: rename it, or run from another folder than {place.work}\n")


@pytest.mark.parametrize("name", ["autoencoder", "ldm", "configs"])
def test_the_module_looks_for_no_package_where_it_is_run(name: str, place: Place) -> None:
    (place.work / name).mkdir()
    said = place.run("-m", "training", "train-denoiser", "--print-config", "--config", "smoky").stderr
    assert said.startswith("error: no config named 'smoky'; did you mean 'smoke'?\nhint: known names: ")
