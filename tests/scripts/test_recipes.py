"""Shell scripts call doors and hold no Python of their own; what they, README and docs name is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny

SHELL = sorted(tiny.SCRIPTS.rglob("*.sh"))
RECIPES = {
    "quickstart": ["--output", "OUT"],
    "recipes/fashion_mnist": ["--root", "idx", "--output", "OUT"],
    "recipes/fashion_pixels": ["--root", "idx", "--output", "OUT"],
    "recipes/emoji": ["--root", "package", "--text-encoder", "encoder", "--output", "OUT"],
    "recipes/shapes": ["--output", "OUT"],
    "recipes/control": ["--output", "OUT", "--emoji", "runs", "--root", "package", "--text-encoder", "encoder"],
    "recipes/upscale": ["--output", "OUT"],
    "recipes/few_steps": ["--output", "OUT"],
    "recipes/compare_autoencoders": ["--output", "OUT", "--data", "fashion/data"],
}
LAST = {"quickstart": "summarize", "recipes/compare_autoencoders": "summarize", "recipes/shapes": "evaluate"}
LAST["recipes/few_steps"] = "compare_steps"
LAST["recipes/control"] = "evaluate"
TEXTS = [*SHELL, tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_a_shell_script(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).stderr == b""
    text = path.read_text()
    assert "<<" not in re.sub(r"<<<", "", text), "embedded code"
    if path.name != "environment.sh":
        (sourced,) = re.findall(r'source "\$\(dirname "\$\{BASH_SOURCE\[0\]\}"\)/(\S+)"', text)
        assert (path.parent / sourced).resolve() == tiny.SCRIPTS / "environment.sh"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_the_scripts_it_names_are_there(path: Path) -> None:
    for name in re.findall(r"(?<!tests/)scripts/[\w/]+\.(?:py|sh)\b", path.read_text()):
        assert (tiny.ROOT / name).is_file(), name


class Understood(Exception):
    """Raised where a door has read its command line."""


def commands(recipe: str, folder: Path) -> list[list[str]]:
    """What a recipe calls, told by an interpreter that does nothing but note its arguments."""
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "out").mkdir()
    python = folder / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >> "{folder}/calls"\necho >> "{folder}/calls"\n')
    python.chmod(0o755)
    words = [str(folder / "out") if word == "OUT" else word for word in RECIPES[recipe]]
    environment = {**tiny.ENVIRONMENT, "VENV": str(folder / "venv")}
    command = ["bash", str(tiny.SCRIPTS / f"{recipe}.sh"), *words]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = [line.split("\0")[:-1] for line in (folder / "calls").read_text().splitlines()]
    return [call for call in calls if call[0] != "-m"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_speaks_the_doors_language(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of it is one that its door takes: flags, choices, keys, kinds and configs."""

    def understood(args: Any) -> None:
        raise Understood

    monkeypatch.setattr("training.settings.flags.check_inputs", understood)
    calls = commands(recipe, tmp_path)
    assert Path(calls[0][0]).stem in ("make_shards", "train_autoencoder") and len(calls) > 4
    assert Path(calls[-1][0]).stem == LAST.get(recipe, "generate")
    for script, *words in calls:
        with pytest.raises(Understood):
            tiny.call(Path(script).stem, *words)
