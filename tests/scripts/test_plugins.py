"""A kind that an installed package brings: a config key, a flag, a name in --help, and a sampler that draws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from training.settings import decoding

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


@dataclass(frozen=True)
class Nameless:
    part: float = 0.5


class Plain:
    kind = "plain"
'''


class Installed:
    """Distributions in a folder that is on the path of the processes it starts."""

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

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        environment = {**tiny.ENVIRONMENT, "PYTHONPATH": f"{self.folder}:{tiny.ROOT}"}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    def door(self, name: str, *words: object) -> subprocess.CompletedProcess[str]:
        return self.run(tiny.SCRIPTS / f"{name}.py", *words)


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    folder = tmp_path / "site"
    folder.mkdir()
    return Installed(folder)


def test_an_installed_sampler_is_a_key_a_flag_and_a_name(installed: Installed, denoiser: Path, tmp_path: Path) -> None:
    installed.add("twice-sampler", SAMPLER, sampler="twice:Twice")
    shown = installed.door("generate", "--help")
    listed = " ".join(shown.stdout.split()).partition("--sampler.kind ")[2].partition("--grid.kind")[0]
    assert listed.split(", ")[0] == "dpmpp-2m" and listed.strip().endswith(", twice"), shown.stderr
    words = ("--print-config", "--sampler.kind", "twice", "--sampler.part", "0.25")
    resolved = installed.door("train_denoiser", *words)
    assert json.loads(resolved.stdout)["sampler"] == {"kind": "twice", "part": 0.25}, resolved.stderr
    words = ("--model", denoiser, "--prompt", "a red circle", "--steps", 2, "--device", "cpu", "--sampler", "twice")
    drawn = installed.door("generate", *words, "--output", tmp_path / "drawn")
    assert drawn.returncode == 0 and (tmp_path / "drawn" / "00000.png").is_file(), drawn.stderr
    checked = installed.door("check_samplers", "--samplers", "twice", "--processes", "flow", "--steps", 4)
    assert checked.returncode == 0 and "| twice | flow | karras | 8 |" in checked.stdout, checked.stderr
    known = tiny.refused("generate", *words, "--output", tmp_path / "none")
    assert 'unknown kind "twice"' in known.what  # where the package is not installed


def test_every_family_takes_one(installed: Installed) -> None:
    sections = {
        name: stage
        for stage in decoding.STAGES
        for name, members in decoding.sections(stage).items()
        if decoding.kinds(members)
    }
    assert {"sampler", "schedule", "backbone", "text", "model", "latent", "discriminator"} <= sections.keys()
    installed.add("own-kinds", OTHER, **dict.fromkeys(sections, "own:Own"))
    code = (
        "import json, sys; from training.settings import decoding\n"
        "for name, stage in json.loads(sys.argv[1]).items():\n"
        "    made = decoding.decode(stage, {name: {'kind': 'own', 'part': 0.75}})\n"
        "    assert getattr(made, name).part == 0.75 and type(getattr(made, name)).__module__ == 'own_kinds', name\n"
        "    default = decoding.decode(stage, {})\n"
        "    assert getattr(default, name).kind != 'own', name\n"
    )
    done = installed.run("-c", code, json.dumps(sections))
    assert done.returncode == 0, done.stderr


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
    done = installed.door("train_denoiser", "--print-config")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 2 and not done.stdout, done.stderr
    assert lines[0].startswith(f'error: package one-fault, which adds sampler.kind "{entry.partition(":")[0]}": ')
    assert expected in lines[0] and lines[1] == "hint: update or remove it: pip uninstall one-fault"


def test_two_packages_with_one_kind_are_refused_before_either_is_imported(installed: Installed) -> None:
    for package in ("first-own", "second-own"):
        installed.add(package, "raise RuntimeError('imported')", sampler="own:Own")
    done = installed.door("generate", "--help")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2
    assert "first-own" in done.stderr and "second-own" in done.stderr and "has that kind already" in done.stderr
