"""Steps of few-step models on eight encoded shapes, of every member of the family: their stages, jobs and loops."""

from __future__ import annotations

import dataclasses
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion import Denoised
from ldm.jumps import plainly
from ldm.noise import Noise
from ldm.objectives import ALONE, FEW_STEP, Beside, Companion, Draw, Losses
from ldm.objectives.base import ObjectiveConfig, Trained
from ldm.objectives.few_step import FewStep, FewStepConfig
from training.data.latents import Latents
from training.data.samples import Batch
from training.loop.loop import Loop
from training.models.adapters import config_of_base
from training.settings import decoding, plugins
from training.settings.upon import STUDENT, load_upon
from training.shards.reading import ShardSet
from training.stages.denoiser_job import DenoiserJob
from training.stages.few_step import FewStepStage
from training.stages.student_job import StudentJob

STEPS = 6
# What a member is told besides its name, where its own settings do not do for so few steps.
SETTINGS: dict[str, dict[str, str]] = {
    "dmd": {"objective.fake_steps": "1"},
    "progressive": {"objective.from_steps": "4"},
}
SHAPE = {"backbone.width": "16", "backbone.depth": "1", "text.width": "16", "text.depth": "1"}
DATA = {**SHAPE, "train.ema": "0.9", "train.validation_size": "8"}


class Turns(FewStep):
    """Every other step is that of the companion "fake", which learns to denoise. In its own, the network learns to land
    where that one and the running average "behind" do: each of both kinds of companions is asked for."""

    def further(self, x0: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        return {"shift": noise.uniform((), "shift")}

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        x_t, t, s = self.diffusion.perturb(x0, draw.eps, draw.t), draw.t, torch.zeros_like(draw.t)
        if beside.step % 2:
            loss = self.error(self.jump(beside.networks["fake"], x_t, t, s, cond)[0], Denoised(x0, draw.eps), t)
            return Losses(loss, loss, {"fake": loss})
        with torch.no_grad():
            one, two = (self.jump(beside.networks[name], x_t, t, s, cond)[0] for name in ("fake", "behind"))
            share = draw.more["shift"].to(x_t).view(-1, 1, 1, 1)
            goal = Denoised(torch.lerp(one.x0, two.x0, share), torch.lerp(one.eps, two.eps, share))
        loss = self.error(self.jump(backbone, x_t, t, s, cond)[0], goal, t)
        return Losses(loss, loss, {"student": loss})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnsConfig(FewStepConfig):
    """Config of `Turns`, which is of no module of the family; `installed` has it found as another package's."""

    kind: str = "turns"
    taught = "either"
    reading = staticmethod(plainly)
    aim = "none"
    made = Turns

    def companions(self) -> Mapping[str, Companion]:
        return {"behind": Companion(lambda step, steps: 0.75), "fake": Companion(rate=2.0)}


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[None]:
    """`Turns` as a kind that the doors know, by an entry point."""
    about = tmp_path / "site" / "turns-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: turns\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[latent_diffusion.objective]\nturns = student_steps:TurnsConfig\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(about.parent)
        for found in (plugins._installed, decoding.sections):
            found.cache_clear()
        yield
    for found in (plugins._installed, decoding.sections):
        found.cache_clear()


class Case(NamedTuple):
    """A kind of objective, and what it learns from: a teacher, or data."""

    kind: str
    source: str


KINDS: dict[str, type[ObjectiveConfig]] = {**{config.kind: config for config in FEW_STEP}, "turns": TurnsConfig}
SOURCES = {"yes": ("teacher",), "no": ("data",), "either": ("teacher", "data")}
CASES = [Case(kind, source) for kind, config in KINDS.items() for source in SOURCES[config.taught]]
TAUGHT = [case for case in CASES if case.source == "teacher"]
each_case = pytest.mark.parametrize("case", CASES, ids="-".join)
each_taught = pytest.mark.parametrize("case", TAUGHT, ids="-".join)


class Pairs(Latents):
    """Latents with a noise of its own beside each, by its number: in the form, not the sense, of pairs."""

    def __getitems__(self, slots: Any) -> Batch:
        return self._paired(super().__getitems__(slots))

    def chunks(self, *words: Any) -> Iterator[Batch]:
        return (self._paired(batch) for batch in super().chunks(*words))

    def _paired(self, batch: Batch) -> Batch:
        channels, *sides = batch.data.shape[1:]
        noise = Noise(batch.slots).normal((channels // 2, *sides), "pair")
        return batch._replace(extras={**batch.extras, "eps": noise})


def config_of(case: Case, teacher: Path, home: Path, **changes: str) -> decoding.DenoiserConfig:
    """As the doors resolve it; changes as `section__key="text"`."""
    overrides = {**SETTINGS.get(case.kind, {}), "train.batch_size": "8", "train.max_steps": str(STEPS)}
    overrides |= {key.replace("__", "."): text for key, text in changes.items()}
    known = case.kind if case.kind != "turns" else "progressive"
    clean = next(kind for kind in FEW_STEP if kind.kind == known)().aim == "clean"
    sampler = f'[sampler]\nkind = "{"consistency" if clean else "jump"}"\n'
    if case.source == "teacher":
        file = home / f"student-{os.getpid()}.toml"  # of processes that share a home, each reads what it wrote itself
        file.write_text(f'[objective]\nkind = "{known}"\n[train]\nema = 0.9\n{sampler}')
        config = load_upon(STUDENT, config_of_base(str(teacher)), str(file), overrides)
    else:
        known = case.kind if case.kind != "turns" else "denoising"
        own = {"sampler.kind": "consistency", "guidance.scale": "1"} if clean else {}
        loaded = decoding.load("denoiser", "smoke", {**DATA, "objective.kind": known, **own, **overrides})
        assert isinstance(loaded, decoding.DenoiserConfig)
        config = loaded
    return dataclasses.replace(config, objective=TurnsConfig()) if case.kind == "turns" else config


def job_of(case: Case, config: decoding.DenoiserConfig, latents: Path, teacher: Path,
           init_from: str | None = None) -> DenoiserJob:
    """The job, its data open."""
    given = {"latents": latents, "text_encoder": None, "init_from": init_from, "new_words": False, "stream": False}
    args = Namespace(**given, overrides={}, teacher=str(teacher))
    job = (StudentJob if case.source == "teacher" else DenoiserJob)(args, config)
    opened = Pairs if getattr(config.objective, "pairs", 0) else Latents
    job.dataset, job.held_out = (opened(ShardSet(latents, split)) for split in ("train", "val"))
    job.settle()
    return job


class Made(NamedTuple):
    """A stage with the job that made it and the loop that trains it."""

    stage: FewStepStage
    loop: Loop
    job: DenoiserJob


def final(job: DenoiserJob) -> Path:
    """The exported model that taught a student."""
    return Path(job.args.teacher) / "final"


def build(case: Case, latents: Path, teacher: Path, home: Path, accelerator: Accelerator, micro: int = 8,
          init_from: str | None = None, **changes: str) -> Made:
    """A training of `case` in `home`/run, of micro-batches of so many."""
    home.mkdir(parents=True, exist_ok=True)
    job = job_of(case, config_of(case, teacher, home, **changes), latents, teacher, init_from)
    stage, train = job.build(accelerator, None), job.config.train
    assert isinstance(stage, FewStepStage)
    passes = 8 // (micro * accelerator.num_processes)
    loop = Loop(stage, train, job.config.optimizer, accelerator, home / "run", passes, micro)
    return Made(stage, loop, job)


Make = Callable[..., Made]


@pytest.fixture(scope="session")
def teacher(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished denoiser that heeds its input: a few steps of training leave the last layer near 0."""
    run: Path = shutil.copytree(denoiser, tmp_path_factory.mktemp("teacher") / "teacher")
    tiny.shake(run / "final")
    return run


@pytest.fixture
def make(latents: Path, teacher: Path, tmp_path: Path) -> Iterator[Make]:
    """`build` in this process; all its stages have the latest's precision."""

    def built(case: Case, precision: str = "no", micro: int = 8, home: str = "one", **changes: Any) -> Made:
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        return build(case, latents, teacher, tmp_path / home, accelerator, micro, **changes)

    yield built
    AcceleratorState._reset_state()


def different(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """The names of what is not bit for bit the same."""
    assert ours.keys() == theirs.keys()
    return [key for key, value in ours.items() if not torch.equal(value, theirs[key])]


def weights(network: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of its parameters."""
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def shake(loop: Loop, by: float = 0.05) -> None:
    """Add noise to all networks, to each its own: companions are copies, of which some objectives learn nothing."""
    noise = torch.Generator().manual_seed(0)
    for network in loop.stage.networks.values():
        for p in network.parameters():
            p.data += by * torch.randn(p.shape, generator=noise)
