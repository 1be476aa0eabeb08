"""The wheel, installed without the checkout: its commands, its module, its configs and its model."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import hints
import pytest
import tiny
from PIL import Image

PACKAGES = ("autoencoder", "configs", "ldm", "training")
PROJECT = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TABLE = PROJECT["scripts"]
ENVIRONMENT = {name: value for name, value in tiny.ENVIRONMENT.items() if name != "PYTHONPATH"}  # the checkout's


@pytest.fixture(scope="module")
def bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of an environment lie that holds the wheel, and finds all else in the one of this process."""
    home = tmp_path_factory.mktemp("installed")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in PACKAGES:
        shutil.copytree(tiny.ROOT / name, home / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(tiny.ROOT / name, home / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(home)]
    subprocess.run([*pip, "wheel", str(home / "source"), *options], check=True, timeout=200)
    (wheel,) = home.glob("*.whl")
    venv.create(home / "venv", symlinks=True)
    python = home / "venv" / "bin" / "python"
    install = [*pip, "--python", str(python), "install", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, env=ENVIRONMENT, timeout=200)
    (packages,) = (home / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    shutil.rmtree(home / "source")
    return python.parent


def call(bin: Path, command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command line as a user of that environment gives it, in a folder of theirs."""
    environment = {**ENVIRONMENT, "PATH": f"{bin}:{os.environ['PATH']}"}
    words = ["bash", "-c", command]
    return subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)


def test_the_wheel_holds_every_file_of_the_packages(bin: Path) -> None:
    """Configs, the demo, what pages are made of: nothing is left in the checkout."""
    (site_packages,) = bin.parent.glob("lib/python*/site-packages")
    held, there = (
        {path.relative_to(root).as_posix() for name in PACKAGES for path in (root / name).rglob("*")
         if path.is_file() and "__pycache__" not in path.parts}
        for root in (site_packages, tiny.ROOT)
    )  # fmt: skip
    assert there - held == set() and held <= there and {"training/py.typed", "ldm/py.typed"} <= held


def test_every_command_is_installed_and_is_its_own(bin: Path, tmp_path: Path) -> None:
    assert set(TABLE) <= {path.name for path in bin.iterdir()}
    where = f"from importlib.util import find_spec; print(*(find_spec(name).origin for name in {PACKAGES}))"
    files = call(bin, f'python -c "{where}"', tmp_path).stdout.split()
    assert len(files) == 4 and all(Path(file).is_relative_to(bin.parent) for file in files)


def test_the_list_the_version_and_a_mistake(bin: Path, tmp_path: Path) -> None:
    listed = call(bin, "latent-diffusion", tmp_path)
    verbs = [f"latent-diffusion-{line.split()[0]}" for line in listed.stdout.splitlines()[4:]]
    assert listed.returncode == 0 and {"latent-diffusion", *verbs} == set(TABLE)
    assert call(bin, "latent-diffusion --version", tmp_path).stdout == f"{PROJECT['version']}\n"
    for command in ("latent-diffusion-generate", "latent-diffusion generate"):
        assert call(bin, f"{command} --help", tmp_path).stdout.startswith("usage: latent-diffusion-generate ")
        refused = call(bin, f"{command} --promt x", tmp_path)
        assert refused.returncode == 2 and "did you mean '--prompt'?" in refused.stderr
        assert refused.stderr.endswith("hint: latent-diffusion-generate --help lists the flags\n")
    assert call(bin, "python -m training generate --help", tmp_path).stdout.startswith("usage: python -m training gen")
    shown = call(bin, "latent-diffusion-make-shards --help", tmp_path).stdout
    assert "\n  latent-diffusion-make-shards verify data/photos\n" in shown


def test_the_demo_draws(bin: Path, tmp_path: Path) -> None:
    command = 'latent-diffusion-generate --model demo --prompt "a red circle" --output pictures --steps 2 --device cpu'
    done = call(bin, command, tmp_path)
    assert done.returncode == 0 and (tmp_path / "pictures" / "00000.png").is_file(), done.stderr


def test_pack_and_train_by_a_packaged_config(bin: Path, tmp_path: Path) -> None:
    pack = "latent-diffusion make-shards pack shapes --samples 48 --output data"
    train = "latent-diffusion-train-autoencoder --config smoke --data data --output run --max-steps 2 --batch-size 8"
    done = call(bin, f"{pack} && {train} --device cpu", tmp_path)
    assert done.returncode == 0 and (tmp_path / "run" / "final" / "model.safetensors").is_file(), done.stderr


PAGE = (tiny.ROOT / "docs" / "install.md").read_text("utf-8")


def test_the_page_names_commands_and_flags_that_there_are() -> None:
    blocks = re.findall("```bash\n(.*?)```", PAGE, re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    named = [(words[0], words[1:]) for words in lines if words[0].startswith("latent-diffusion-")]
    launched = [words[words.index("training") + 1 :] for words in lines if "training" in words]
    doors = [(name.removeprefix("latent-diffusion-"), rest) for name, rest in named] + [
        (verb, rest) for verb, *rest in launched]  # fmt: skip
    assert len(named) == 3 and len(launched) == 2
    for verb, rest in doors:
        assert f"latent-diffusion-{verb}" in TABLE
        assert {word for word in rest if word.startswith("--")} <= hints.options(verb.replace("-", "_"))
    (extras,) = re.findall(r"Optional parts are extras.*?\n\n", PAGE, re.S)
    assert set(re.findall(r"`(\w+)`", extras)) - {"demo"} == PROJECT["optional-dependencies"].keys()


def test_the_lines_of_python_on_the_page_draw() -> None:
    said: dict[str, object] = {}
    exec(re.findall("```python\n(.*?)```", PAGE, re.S)[0], said)
    pictures = [said["picture"], *said["pictures"]]  # type: ignore[misc]
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    assert [picture.size for picture in pictures] == [(32, 32)] + [(48, 32)] * 4
