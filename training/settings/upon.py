"""The config of what is learned upon another model: its own few sections over the config of that one. An adapter has
a base, which it leaves as it is; a student a teacher, as whose copy it begins."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.messages import note
from training.settings import decoding, reading

TRAINING = ("optimizer", "train")  # what the other was trained with says nothing of what is learned upon it
MODEL = ("backbone", "text", "image", "schedule", "prediction", "format")  # what it is


@dataclass(frozen=True)
class Upon:
    """A kind of such training: its folder of configs/, its flag, what it learns, the sections that begin anew and those
    that are the other model's."""

    folder: str
    flag: str
    what: str
    anew: tuple[str, ...]
    fixed: tuple[str, ...]
    hint: str

    def missing_config(self) -> UserError:
        """What to say where the flag comes without a config."""
        what = f"{self.flag} needs the config of {self.what}: nothing is proposed for one"
        return UserError(what, hint=f"give one with --config: {', '.join(reading.names(self.folder))}, or a file")


ADAPTER = Upon("adapter", "--base", "an adapter", (*TRAINING, "representation"), (*MODEL, "objective", "student"),
               hint="leave these keys out; --init-from trains a whole model of another config")
LEARNED = ("objective", "representation", "student", "pairing", "weighting", "prior")  # in another way by a student
STUDENT = Upon("student", "--teacher", "a student", (*TRAINING, *LEARNED), (*MODEL, "adapter"),
               hint="leave these keys out; train_denoiser trains a model of another shape")


def upon_another(args: argparse.Namespace, stage: str) -> Upon | None:
    """Which of them a training is, by its flags."""
    if stage == "denoiser" and getattr(args, "teacher", None):
        return STUDENT
    return ADAPTER if getattr(args, "base", None) else None


def load_upon(upon: Upon, base: decoding.DenoiserConfig, source: str,
              overrides: Mapping[str, str]) -> decoding.DenoiserConfig:
    """Config NAME or FILE over that of the other model, with `section.key -> text` overrides over both.

    Raises UserError where nothing of the kind is in it, or where it would change what that model is.
    """
    text, where = reading.read(upon.folder, source)
    own, values = reading.parse(text, where), decoding.to_values(base)
    own.pop("format", None)  # which is that of the model: a run keeps the version it began with
    if base.weighting.kind == "learned" and "weighting" not in upon.anew:
        note("the base's learned weighting is not part of its model: the adapter is trained with weighting uniform")
        values["weighting"] = {"kind": "uniform"}
    merged = {**values, **{name: {} for name in upon.anew}}
    for name, section in own.items():
        before = merged.get(name, {})
        other = isinstance(section, dict) and section.get("kind", before.get("kind")) != before.get("kind")
        merged[name] = section if other or not isinstance(section, dict) else {**before, **section}
    lines = {key: f"{where}:{line}" for key, line in reading.lines(text)}
    laid = decoding.lay_over("denoiser", merged, overrides, where)
    config = decoding.decode("denoiser", laid, lines | dict.fromkeys(overrides, decoding.ASKED), upon.folder)
    assert isinstance(config, decoding.DenoiserConfig)
    _check_kind(upon, config, where)
    before, after = decoding.to_values(base), decoding.to_values(config)
    changed = [line for line in decoding.diff(before, after) if line.partition(".")[0] in upon.fixed]
    if upon is STUDENT:
        changed = [line for line in changed if not line.startswith("backbone.gradient_checkpointing")]
    if changed:
        is_as = "leaves its base as it is" if upon is ADAPTER else "begins as its teacher is"
        what = f"{upon.what} {is_as}, but the config would change\n       " + "\n       ".join(changed)
        raise UserError(what, hint=upon.hint)
    return config


def _check_kind(upon: Upon, config: decoding.DenoiserConfig, where: str) -> None:
    known = ", ".join(reading.names(upon.folder))
    refuse_compared(config, upon.what)
    if upon is STUDENT:
        if config.objective.reading is None:
            what = f"{where} has no [objective] that teaches a student"
            raise UserError(what, hint=f"--teacher takes the configs {known}, or a file with such an [objective]")
        _check_student(config)
        return
    if config.adapter.kind == "none":
        hint = f"--base takes the configs {known}, or a file with an [adapter]"
        raise UserError(f"{where} has no [adapter]", hint=hint)
    if config.weighting.kind == "learned":
        what = "weighting.kind learned is learned beside a whole model, and the training of an adapter learns none"
        raise UserError(what, hint="give --weighting.kind uniform")
    if config.objective.reading is not None:
        kind = config.objective.kind
        what = f"the base is a few-step model (objective.kind {kind}), and an adapter learns to denoise"
        raise UserError(what, hint="learn it upon the teacher, and distill both: export_model makes one model of them")


def _check_student(config: decoding.DenoiserConfig) -> None:
    """Raises UserError for settings that contradict what a student learns from."""
    kind, taught, student = config.objective.kind, config.objective.taught, config.student
    if config.prior.weight:
        what = "prior.weight: prior pictures are drawn by the base of an adapter, and a student learns from its teacher"
        raise UserError(what, hint="leave it out")
    if config.pairing.kind != "independent":
        what = f"pairing.kind {config.pairing.kind}: a few-step model is taught with independent noise"
        raise UserError(what, hint="leave it out")
    if student.learns_from == "data" and taught == "yes":
        what = f"student.learns_from data: objective.kind {kind} learns from a teacher alone"
        raise UserError(what, hint="leave it out")
    if student.scales and (student.learns_from == "data" or taught == "no"):
        what = "student.guidance_scale takes in the guidance of a teacher, and this student learns from data"
        raise UserError(what, hint="leave it out")


def refuse_compared(config: Any, what: str = "a few-step model") -> None:
    """Raises UserError where features are compared in what does not learn as a whole denoiser does."""
    if (kind := config.representation.kind) != "none":
        said = f"representation.kind {kind} is of the training of a whole denoiser, and this is that of {what}"
        raise UserError(said, hint="leave it out")


def learned_upon(config: Any) -> bool:
    """Whether a config is that of an adapter upon another run, whose weights no other run can begin with."""
    return getattr(getattr(config, "adapter", None), "kind", "none") != "none"


def refuse_without_base(config: Any) -> None:
    """Raises UserError for a config with an adapter and no base for it, and one that asks for a teacher."""
    if learned_upon(config):
        what = f"adapter.kind {config.adapter.kind} is learned upon a trained model"
        raise UserError(what, hint="name it with --base RUN")
    if getattr(getattr(config, "objective", None), "taught", "no") == "yes":
        what = f"objective.kind {config.objective.kind} is learned from a trained model"
        raise UserError(what, hint="teach a student: distill_denoiser --teacher RUN")
    student = getattr(config, "student", None)
    if student and config.objective.reading is not None:
        refuse_compared(config)
    if student and (student.scales or (student.steps and config.objective.reading is None)):
        key = "guidance_scale" if student.scales else "steps"
        what = f"student.{key} says how a few-step model was taught by a trained one, and none is named"
        raise UserError(what, hint="leave it out, or teach a student: distill_denoiser --teacher RUN")


def refuse_name_without_base(source: str) -> None:
    """Raises UserError for the name of an adapter's or a student's config where there is no model for it."""
    if Path(source).exists() or source in reading.names("denoiser"):
        return
    if source in reading.names(ADAPTER.folder):
        raise UserError(f"--config {source} is learned upon a trained model", hint="name it with --base RUN")
    if source in reading.names(STUDENT.folder):
        what = f"--config {source} is learned from a trained model"
        raise UserError(what, hint="teach a student: distill_denoiser --teacher RUN")
