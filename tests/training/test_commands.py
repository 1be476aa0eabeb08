"""Commands are told in the way the program was called, and every door is a verb and an installed command."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny

import training
from training import __main__ as program
from training import commands
from training.errors import UserError

DOORS = sorted(path.stem for path in (tiny.ROOT / "training" / "doors").glob("*.py") if path.stem != "__init__")
MODULE = str(tiny.ROOT / "training" / "doors" / "train_denoiser.py")


@pytest.fixture
def bin_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed commands, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("", *(f"-{door.replace('_', '-')}" for door in DOORS)):
        (folder / f"latent-diffusion{name}").touch(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def called(monkeypatch: pytest.MonkeyPatch, argv: str, orig_argv: str = "", launcher: str = "bash") -> None:
    """As if this process had been started so, by a parent of that command line."""
    monkeypatch.setattr(sys, "argv", shlex.split(argv))
    monkeypatch.setattr(sys, "orig_argv", shlex.split(orig_argv or f"python {argv}"))
    monkeypatch.setattr(commands, "_arguments", lambda process: shlex.split(launcher))
    commands._started.cache_clear()


def test_the_installed_commands_are_the_doors() -> None:
    table = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    expected = {f"latent-diffusion-{door.replace('_', '-')}": f"training.__main__:{door}" for door in DOORS}
    missing = [f'{name} = "{target}"' for name, target in expected.items() if table.get(name) != target]
    assert not missing, "add to [project.scripts] of pyproject.toml:\n" + "\n".join(missing)
    assert table == {"latent-diffusion": "training.__main__:main", **expected}
    assert all(callable(getattr(program, door)) for door in DOORS) and not hasattr(program, "no_door")


def test_a_script_tells_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called(monkeypatch, f"{tiny.SCRIPTS}/generate.py --prompt x")
    assert commands.door("make_shards pack", "a b") == f"python {tiny.SCRIPTS}/make_shards.py pack 'a b'"
    assert commands.own_name() == "generate.py" and commands.own_verb() == "generate"


def test_a_module_tells_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    called(monkeypatch, f"{MODULE} --lr 1", "python3 -u -m training train-denoiser --lr 1")
    assert commands.door("make_shards pack", "a b") == "python3 -m training make-shards pack 'a b'"
    assert commands.own_name() == "python -m training train-denoiser" and commands.own_verb() == "train_denoiser"


def test_an_installed_command_tells_the_installed(monkeypatch: pytest.MonkeyPatch, bin_on_path: Path) -> None:
    called(monkeypatch, f"{bin_on_path}/latent-diffusion-generate")
    assert commands.door("make_shards pack", "a b") == "latent-diffusion-make-shards pack 'a b'"
    assert commands.own_name() == "latent-diffusion-generate" and commands.own_verb() == "generate"
    monkeypatch.setenv("PATH", "/nowhere")  # called by its path, and not found by its name
    assert commands.door("make_shards index") == f"{bin_on_path}/latent-diffusion-make-shards index"


def test_another_program_is_told_what_works_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A notebook, or a script of the user's: the module; in the checkout itself, the script."""
    called(monkeypatch, f"{tmp_path}/my_program.py")
    monkeypatch.chdir(tiny.ROOT)
    assert commands.door("make_shards index") == "python scripts/make_shards.py index"
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "make_shards.py").touch()  # of another project
    monkeypatch.chdir(tmp_path)
    assert commands.door("make_shards index") == "python -m training make-shards index"


ALL, ONE = "/opt/bin/latent-diffusion", "/opt/bin/latent-diffusion-train-denoiser"
TORCHRUN = "python torchrun --standalone --nproc-per-node 2"
AGAIN = {  # argv, orig_argv, the parent's -> the command that goes on; {} is the training's flag
    "module": (f"{MODULE} {{}}", "python -u -m training train_denoiser {}", "bash",
               "python -u -m training train_denoiser {}"),
    "installed": (f"{ONE} {{}}", f"python3 {ONE} {{}}", "bash", f"{ONE} {{}}"),
    "installed, a verb": (f"{ONE} {{}}", f"python3 {ALL} train_denoiser {{}}", "bash", f"{ONE} {{}}"),
    "installed, by an interpreter": (f"{ONE} {{}}", f"python -X dev {ONE} {{}}", "bash", f"python -X dev {ONE} {{}}"),
    "torchrun of the module": (f"{MODULE} {{}}", "python -u -m training train_denoiser {}",
                               f"{TORCHRUN} -m training train_denoiser {{}}",
                               f"{TORCHRUN} -m training train_denoiser {{}}"),
    "accelerate of the module": (f"{MODULE} {{}}", "python -m training train-denoiser {}",
                                 "python accelerate launch --module training train-denoiser {}",
                                 "python accelerate launch --module training train-denoiser {}"),
    "torchrun of the installed": (f"{ONE} {{}}", f"python -u {ONE} {{}}", f"{TORCHRUN} {ONE} {{}}",
                                  f"{TORCHRUN} {ONE} {{}}"),
    "a runner of the installed": (f"{ONE} {{}}", f"python {ONE} {{}}", "runner run latent-diffusion-train-denoiser {}",
                                  "runner run latent-diffusion-train-denoiser {}"),
    "forked": (f"{MODULE} {{}}", "python -c spawn_main", "bash", "python -m training train-denoiser {}"),
}  # fmt: skip


@pytest.mark.parametrize("name", AGAIN)
def test_the_command_that_goes_on_is_the_one_that_was_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv, orig_argv, parent, expected = (text.format("--output 'a b'") for text in AGAIN[name])
    called(monkeypatch, argv, orig_argv, parent)
    words, _ = commands.again(["--resume", "auto"])
    assert words == [*shlex.split(expected), "--resume", "auto"]


def module(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**tiny.ENVIRONMENT, "PYTHONPATH": str(tiny.ROOT)}
    command = [sys.executable, "-m", "training", *words]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_every_verb_is_listed_with_a_line(words: tuple[str, ...], tmp_path: Path) -> None:
    done = module(*words, folder=tmp_path)
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()[4:]]
    assert done.returncode == 0 and not done.stderr
    assert [name.replace("-", "_") for name, _ in rows] == DOORS
    stage_two = "Stage two: train a denoiser on encoded latents; or, with --base, an adapter upon a trained one."
    assert ["train-denoiser", stage_two] in rows
    assert all(text[0].isupper() and text.endswith(".") for _, text in rows)


def test_a_wrong_verb_is_refused_with_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the hint, followed, is the list."""
    monkeypatch.setattr(sys, "argv", ["latent-diffusion", "train-denoisre", "--lr", "1"])
    with pytest.raises(UserError) as caught:
        program.choose()
    assert caught.value.what == "train-denoisre: no such verb; did you mean 'train-denoiser'?"
    assert caught.value.code == 2 and caught.value.hint == "latent-diffusion --help lists them"
    done = module("generat", folder=tmp_path)
    said = "error: generat: no such verb; did you mean 'generate'?\nhint: python -m training --help lists them\n"
    assert done.returncode == 2 and done.stderr == said


def test_a_verb_is_its_door_spelled_either_way(tmp_path: Path) -> None:
    for verb in ("make-shards", "make_shards"):
        done = module(verb, "pack", "nowhere", "--output", "x", folder=tmp_path)
        assert done.returncode == 3 and done.stderr.startswith("error: nowhere: no such folder")
    shown = module("make-shards", "--help", folder=tmp_path).stdout
    assert shown.startswith("usage: python -m training make-shards ")
    assert f"  {sys.executable} -m training make-shards verify data/photos\n" in shown
    refused = module("train_denoiser", "--frobnicate", folder=tmp_path)
    assert refused.stderr.endswith(f"hint: {sys.executable} -m training train-denoiser --help lists the flags\n")


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    stated = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert training.__version__ == stated and module("--version", folder=tmp_path).stdout == f"{stated}\n"
