"""Recipes by what one has: pairs of configs that belong together, and how long each is trained on so many pictures.

A proposal is a pure function of the situation: it is what a training without --config runs, and what docs/recipes.md
lists. Seconds are measured as that page says; for GPUs, where nothing is measured yet, FLOPs are counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.messages import roughly
from training.settings.reading import parse, read

FEW = 2000  # pictures that teach no more than a small network
LEARNT_BY_HEART = 1000  # pictures that a denoiser can repeat one by one, and a critic, too
COPIED = 200  # pictures of which it draws copies
MANY_EPOCHS = 200  # of which a denoiser draws its training pictures rather than new ones
SHARE = 3  # of the pictures, one part at most is a batch
ASSUMED = 60e12  # FLOP/s of one GPU where nothing is measured: published trainings on an A100 reach 39 to 87e12
LONG = 20_000  # steps from which a run is looked at more often than every quarter


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How one stage of a pair is trained, and what a picture costs it, forward and backward."""

    batch: int  # pictures a step
    epochs: int  # asked for, between the least and the most pictures seen in all
    least: int
    most: int
    gflop: float
    seconds: float = 0.0  # on one core of the machine of docs/recipes.md; 0: not for a CPU
    memory: float = 0.0  # GB of the process at its peak, measured at this batch; 0: not measured


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two configs of one name, one of each stage."""

    name: str
    resolution: int
    autoencoder: Budget
    denoiser: Budget

    def budget(self, stage: str) -> Budget:
        """That of a stage."""
        return self.autoencoder if stage == "autoencoder" else self.denoiser


_U_NET: dict[str, Any] = {
    "batch": 32, "epochs": 200, "least": 24_000, "most": 256_000, "gflop": 1.7, "seconds": 0.027, "memory": 1.3,
}  # fmt: skip
_DIT: dict[str, Any] = {"batch": 256, "epochs": 200, "least": 2_000_000}
SMALL = (
    Pair(name="laptop-64", resolution=64, denoiser=Budget(**_U_NET), autoencoder=Budget(
        batch=8, epochs=100, least=11_200, most=80_000, gflop=2.1, seconds=0.043, memory=1.3)),
    Pair(name="laptop-128", resolution=128, denoiser=Budget(**_U_NET), autoencoder=Budget(
        batch=8, epochs=100, least=11_200, most=48_000, gflop=8.7, seconds=0.15, memory=2.0)),
    Pair(name="laptop-256", resolution=256, denoiser=Budget(**_U_NET), autoencoder=Budget(
        batch=8, epochs=100, least=11_200, most=32_000, gflop=34, seconds=0.6, memory=3.5)),
)  # fmt: skip
ONE_GPU = (
    Pair(name="gpu-64", resolution=64, denoiser=Budget(**_DIT, most=51_200_000, gflop=45), autoencoder=Budget(
        batch=64, epochs=100, least=640_000, most=2_560_000, gflop=52)),
    Pair(name="gpu-128", resolution=128, denoiser=Budget(**_DIT, most=51_200_000, gflop=169), autoencoder=Budget(
        batch=64, epochs=100, least=640_000, most=2_560_000, gflop=191)),
    Pair(name="gpu-256", resolution=256, denoiser=Budget(**_DIT, most=51_200_000, gflop=169), autoencoder=Budget(
        batch=32, epochs=100, least=640_000, most=3_200_000, gflop=2585)),
)  # fmt: skip
SEVERAL_GPUS = (
    *ONE_GPU[:2],
    Pair(name="gpus-256", resolution=256, denoiser=Budget(**_DIT, most=102_400_000, gflop=591), autoencoder=Budget(
        batch=128, epochs=100, least=640_000, most=12_800_000, gflop=2585)),
)  # fmt: skip
PAIRS = {pair.name: pair for pair in (*SMALL, *ONE_GPU, *SEVERAL_GPUS)}


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What one has: pictures to train on (None: a stream, or not known), pixels a side, a device, processes."""

    pictures: int | None
    resolution: int
    device: str = "cpu"  # or "cuda", or "mps"
    processes: int = 1
    unit: int = 1  # of which a batch is a multiple: processes times backward passes a step

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU that trains large networks."""
        return self.device == "cuda"


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A config by name, what is set over it, and what comes of that."""

    pair: Pair
    stage: str
    situation: Situation
    steps: int
    batch: int
    overrides: Mapping[str, str]

    @property
    def epochs(self) -> float | None:
        """Passes over the pictures; None where their number is not known."""
        pictures = self.situation.pictures
        return self.steps * self.batch / pictures if pictures else None

    @property
    def seconds(self) -> float | None:
        """As measured on one core, or as estimated for GPUs (ASSUMED); None for a small network on a GPU."""
        budget, seen = self.pair.budget(self.stage), self.steps * self.batch
        if self.situation.device == "cpu":
            return seen * budget.seconds
        return None if budget.seconds else seen * budget.gflop * 1e9 / ASSUMED / self.situation.processes

    @property
    def by_heart(self) -> bool:
        """Whether what is drawn will be near copies of the pictures."""
        return self.stage == "denoiser" and (self.situation.pictures or LEARNT_BY_HEART) < LEARNT_BY_HEART


def propose(
    stage: str,
    situation: Situation,
    given: Mapping[str, str] | None = None,
    model: Mapping[str, Any] | None = None,
) -> Proposal:
    """The config of a situation, with steps, batch size and intervals for its pictures; `given` (`section.key -> text`)
    stands, and all else follows it.

    `model`: the [model] of the autoencoder that latents come from, whose pair is taken where it has one that the device
    can train.
    """
    pair = (_pair_of(model, situation) if model else None) or _pair_for(situation)
    budget, pictures, given = pair.budget(stage), situation.pictures, given or {}
    share = budget.batch if pictures is None else 1 << max(1, pictures // SHARE).bit_length() - 1
    unit = situation.unit
    batch = _number(given, "train.batch_size") or max(unit, min(budget.batch, share) // unit * unit)
    seen = budget.most if pictures is None else min(budget.most, max(budget.least, budget.epochs * pictures))
    every, looks = _interval(seen / batch)
    steps = _number(given, "train.max_steps") or every * looks
    save = _number(given, "train.save_every") or _number(given, "train.sample_every") or min(every, steps)
    look = _number(given, "train.sample_every") or max(save, min(every, steps) // save * save)
    values = {"train.max_steps": steps, "train.batch_size": batch, "train.sample_every": look, "train.save_every": save}
    if stage == "autoencoder":
        values |= _critic(steps, look, pictures, given)
    overrides = {key: str(value) for key, value in values.items() if key not in given}
    return Proposal(pair=pair, stage=stage, situation=situation, steps=steps, batch=batch, overrides=overrides)


def reasons(proposal: Proposal) -> list[str]:
    """What is proposed, why, how long it may take and what may come of it, in lines."""
    situation, pair = proposal.situation, proposal.pair
    machine = {"cpu": "a CPU", "mps": "an Apple GPU", "cuda": "a GPU"}[situation.device]
    machine = f"{situation.processes} GPUs" if situation.cuda and situation.processes > 1 else machine
    pictures = "pictures that nobody has counted" if situation.pictures is None else f"{situation.pictures:,} pictures"
    passes = "" if proposal.epochs is None else f" ({in_epochs(proposal.epochs)})"
    lines = [
        f"no --config was given: {pair.name}, for {pictures} of {situation.resolution} px on {machine}: "
        f"{proposal.steps:,} steps of {proposal.batch}{passes}, {how_long(proposal)}"
    ]
    few = ["a small network, for so few pictures teach no larger one"] if situation.cuda and pair in SMALL else []
    drawn = [f"it will draw {expected(proposal)}"] if proposal.by_heart else []
    return [*lines, *filter(None, ["; ".join([*few, *drawn])])]


def expected(proposal: Proposal) -> str:
    """What a denoiser draws that learnt from so many pictures."""
    pictures = proposal.situation.pictures or 0
    if pictures < COPIED:
        return "copies of its pictures: so few are learnt by heart"
    if pictures < LEARNT_BY_HEART:
        return "near copies of its pictures, and mixtures of them: so few are learnt by heart"
    kind = "simple, soft pictures" if proposal.pair in SMALL else "pictures"
    seen = "" if (proposal.epochs or 1) >= 1 else f"; it sees {proposal.epochs:.0%} of them"
    return f"new {kind} of what there are many of" + seen


def in_epochs(passes: float) -> str:
    """A number of epochs for people: `0.26 epochs`, `4.2 epochs`, `1,010 epochs`."""
    return f"{passes:,.0f} epochs" if passes >= 10 else f"{passes:.2g} epochs"


def how_long(proposal: Proposal) -> str:
    """The time of a proposal in words that say what it rests on."""
    if proposal.seconds is None:
        return "in a time not measured yet"
    if proposal.situation.cuda:
        return f"{roughly(proposal.seconds)} by an estimate of {ASSUMED / 1e12:.0f} TFLOP/s for each GPU"
    return f"about {roughly(proposal.seconds)} on one slow core, as measured"


def _number(given: Mapping[str, str], key: str) -> int:
    """A whole number above 0 that is given; 0 where none is, or what is given will be refused."""
    text = given.get(key, "")
    return int(text) if text.isdecimal() else 0


def _pair_for(situation: Situation) -> Pair:
    few = situation.pictures is not None and situation.pictures < FEW
    family = SMALL if few or not situation.cuda else SEVERAL_GPUS if situation.processes > 1 else ONE_GPU
    return min(family, key=lambda pair: abs(math.log(pair.resolution / situation.resolution)))


def _pair_of(model: Mapping[str, Any], situation: Situation) -> Pair | None:
    """The pair whose autoencoder has this [model], if the device can train its denoiser."""
    for pair in (_pair_for(situation), *PAIRS.values()):
        own = parse(*read("autoencoder", pair.name))["model"]
        same = model.get("kind", "kl") == "kl" and all(model.get(key) == value for key, value in own.items())
        if same and (situation.cuda or pair.denoiser.seconds):
            return pair
    return None


def _interval(steps: float) -> tuple[int, int]:
    """(steps between looks, looks): no more than so many steps in all, the interval round."""
    looks = 20 if steps > LONG else 4
    every = max(1, int(steps / looks))
    unit = 10 ** max(0, len(str(every)) - 2)
    unit = max(1, unit // 2) if every < 20 * unit else unit
    return every // unit * unit, looks


def _critic(steps: int, look: int, pictures: int | None, given: Mapping[str, str]) -> dict[str, int]:
    """The critic's part of the steps: from their half on; none for pictures that it would know one by one."""
    if pictures is not None and pictures < LEARNT_BY_HEART:
        return {"loss.adversarial": 0}
    start = _number(given, "loss.discriminator_start") or steps // 2
    counts = max(look, start, steps * 6 // 10)
    return {"loss.discriminator_start": start, "loss.adversarial_start": counts, "loss.adversarial_ramp": steps // 5}
