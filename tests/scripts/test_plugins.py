"""A kind that an installed package brings: a config key, a flag, a name in --help, and a sampler that draws."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from training.settings import decoding, plugins

SAMPLER = '''
from dataclasses import dataclass

from torch import Tensor

from ldm.samplers import Sampler, mix


@dataclass(frozen=True, kw_only=True)
class Twice(Sampler):
    order = 1
    calls = 2
    rises = False
    kind: str = "twice"
    part: float = 0.5

    def step(self, denoise, x, t, s, memory, noise):
        middle = self.part * s + (1 - self.part) * t
        schedule = denoise.schedule
        return mix(schedule(s), denoise(mix(schedule(middle), denoise(x, t)), middle)), None
'''
OTHER = '''
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Own:
    kind: str = "own"
    part: float = 0.5
    t_min = 0.0  # a config asks a grid for its times, and a grid asks a schedule for this

    def __call__(self, steps, schedule):
        return None


@dataclass(frozen=True)
class Nameless:
    part: float = 0.5


class Plain:
    kind = "plain"
'''


class Installed:
    """Distributions in a folder that is on the path of this process, and of those that it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, package: str, source: str, **entries: str) -> None:
        """A distribution of one module; `sampler="twice:Twice"` is an entry point of the section `sampler`."""
        module = package.replace("-", "_")
        (self.folder / f"{module}.py").write_text(source)
        about = self.folder / f"{module}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        groups = [
            f"[latent_diffusion.{section}]\n{entry.partition(':')[0]} = {module}:{entry.partition(':')[2]}\n"
            for section, entry in entries.items()
        ]
        (about / "entry_points.txt").write_text("\n".join(groups))

    def door(self, name: str, *words: object) -> subprocess.CompletedProcess[str]:
        """A process of its own."""
        environment = {**tiny.ENVIRONMENT, "PYTHONPATH": f"{self.folder}:{tiny.ROOT}"}
        command = [sys.executable, str(tiny.SCRIPTS / f"{name}.py"), *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def forget() -> None:
    """What this process has found of installed packages."""
    plugins._installed.cache_clear()
    decoding.sections.cache_clear()


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Installed]:
    folder = tmp_path / "site"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        forget()
        yield Installed(folder)
    forget()
    for file in folder.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_an_installed_sampler_is_a_key_a_flag_and_a_name(
    installed: Installed, denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed.add("twice-sampler", SAMPLER, sampler="twice:Twice")
    shown = installed.door("generate", "--help")
    listed = " ".join(shown.stdout.split()).partition("--sampler.kind ")[2].partition("--grid.kind")[0]
    assert listed.split(", ")[0] == "dpmpp-2m" and listed.strip().endswith(", twice"), shown.stderr
    words = ("--print-config", "--sampler.kind", "twice", "--sampler.part", "0.25")
    assert tiny.call("train_denoiser", *words) == 0
    assert json.loads(capsys.readouterr().out)["sampler"] == {"kind": "twice", "part": 0.25}
    words = ("--model", denoiser, "--prompt", "a red circle", "--steps", 2, "--device", "cpu", "--sampler", "twice")
    assert tiny.call("generate", *words, "--output", tmp_path / "drawn") == 0
    assert (tmp_path / "drawn" / "00000.png").is_file()
    assert tiny.call("check_samplers", "--samplers", "twice", "--processes", "flow", "--steps", 4) == 0
    assert "| twice | flow | karras | 8 |" in capsys.readouterr().out


def test_a_kind_that_is_not_installed_is_unknown(denoiser: Path, tmp_path: Path) -> None:
    words = ("--model", denoiser, "--prompt", "a red circle", "--sampler", "twice", "--output", tmp_path / "none")
    assert 'unknown kind "twice"' in tiny.refused("generate", *words).what


def test_every_family_takes_one(installed: Installed) -> None:
    sections = {
        name: stage
        for stage in decoding.STAGES
        for name, members in decoding.sections(stage).items()
        if decoding.kinds(members)
    }
    assert {"sampler", "schedule", "backbone", "text", "model", "latent", "discriminator"} <= sections.keys()
    installed.add("own-kinds", OTHER, **dict.fromkeys(sections, "own:Own"))
    forget()
    for name, stage in sections.items():
        made = decoding.decode(stage, {name: {"kind": "own", "part": 0.75}})
        assert getattr(made, name).part == 0.75 and type(getattr(made, name)).__module__ == "own_kinds", name
        default = decoding.decode(stage, {})
        assert getattr(default, name).kind != "own", name


FAULTS = {
    "a kind of ours": ("heun:Own", OTHER, "latent-diffusion-from-scratch has that kind already"),
    "no dataclass": ("plain:Plain", OTHER, "one_fault:Plain is not a dataclass"),
    "no class": ("version:__name__", OTHER, "one_fault:__name__ is not a dataclass"),
    "another kind": ("mine:Own", OTHER, 'one_fault:Own lacks the field kind: str = "mine"'),
    "no kind": ("nameless:Nameless", OTHER, 'one_fault:Nameless lacks the field kind: str = "nameless"'),
    "no such name": ("gone:Gone", OTHER, "one_fault:Gone cannot be imported"),
    "a module that fails": ("own:Own", "raise RuntimeError('boom')", "one_fault:Own cannot be imported (boom)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_package_at_fault_is_named_in_one_sentence(name: str, installed: Installed) -> None:
    entry, source, expected = FAULTS[name]
    installed.add("one-fault", source, sampler=entry)
    problem = tiny.refused("train_denoiser", "--print-config")
    assert problem.code == 2 and problem.hint == "update or remove it: pip uninstall one-fault"
    assert problem.what.startswith(f'package one-fault, which adds sampler.kind "{entry.partition(":")[0]}": ')
    assert expected in problem.what


def test_a_default_that_json_has_not_is_refused(installed: Installed) -> None:
    """Given by nobody, but written into config.json and every picture."""
    installed.add("endless", SAMPLER.replace("part: float = 0.5", 'part: float = float("inf")'), sampler="twice:Twice")
    words = ("train_denoiser", "--print-config", "--sampler.kind", "twice")
    assert tiny.refused(*words).what.endswith(": sampler.part: expected a finite number, got inf")
    assert tiny.call(*words, "--sampler.part", "0.5") == 0


def test_two_packages_with_one_kind_are_refused_before_either_is_imported(installed: Installed) -> None:
    for package in ("first-own", "second-own"):
        installed.add(package, "raise RuntimeError('imported')", sampler="own:Own")
    done = installed.door("generate", "--help")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2
    assert "first-own" in done.stderr and "second-own" in done.stderr and "has that kind already" in done.stderr
