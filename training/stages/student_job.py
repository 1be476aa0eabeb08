"""The training of a student: a few-step model that begins with the weights of a trained one, and learns from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.guidance import ClassifierFree, Embedded
from ldm.guiding import Scaled
from ldm.jumps import SCALE, SPAN
from ldm.students import Student, in_steps
from ldm.teacher import Teacher
from ldm.text import HuggingFace
from training.errors import UserError, as_user_error
from training.files import write_json
from training.machine.meeting import agree, is_distributed
from training.models import assembly
from training.models.adapters import config_of_teacher
from training.models.cards import TEACHER
from training.models.folders import find, name_of
from training.models.init_from import fill_network, vocabulary_home
from training.models.lineage import stored_ingredients
from training.runs.ingredients import difference
from training.stages.denoiser_job import DenoiserJob
from training.stages.few_step import FewStepStage
from training.stages.job import parameters
from training.stages.of_base import in_size_of, same_autoencoder, text_encoder_of
from training.tensors import content_hash

if TYPE_CHECKING:
    from accelerate import Accelerator


class StudentJob(DenoiserJob):
    """A teacher, which is loaded, frozen and never written, and the student that begins as its copy."""

    def open_data(self) -> None:
        """Pairs of noise and what the teacher draws of it, where the student learns on those: drawn first, unless they
        are there."""
        if self.config.objective.pairs and not self.args.dry_run:
            self.write_pairs()
        super().open_data()

    def write_pairs(self) -> None:
        """Have the teacher draw them, and train on them in place of --latents."""
        from training.encoding.pairs import write_pairs
        from training.machine import processes

        args, train, count = self.args, self.config.train, self.config.objective.pairs
        device = processes.start(args.device, train.mixed_precision, compiles=train.compile).device
        teacher = assembly.load_pipeline(args.teacher, device, args.text_encoder)
        guided = with_guidance(self.config, config_of_teacher(args.teacher)).student.scales
        if len(guided) == 2:
            what = f"objective.kind {self.config.objective.kind} learns on pairs of one guidance scale"
            raise UserError(what, hint=f"--student.guidance_scale {guided[0]:g}")
        plan = teacher.sampling
        if guided and isinstance(plan.guidance, Scaled) and len(teacher.student.scales) != 1:  # else it has its own
            plan = dataclasses.replace(plan, guidance=dataclasses.replace(plan.guidance, scale=guided[0]))
        place = Path(args.pairs or f"{Path(args.output)}-pairs")
        write_pairs(teacher, Path(args.latents), place, count=count, seed=train.seed, sampling=plan, batch_size=64)
        args.latents = str(place)

    def settle(self) -> None:
        """Also the guidance that the student takes in, and how it is drawn for it."""
        if self.args.init_from or self.args.new_words:
            raise UserError("--init-from and --new-words change what a student begins with, which is its teacher",
                            hint="leave them out")
        self.of_teacher = config_of_teacher(self.args.teacher)
        self.config = in_size_of(self.config, self.of_teacher, self.dataset, "teacher")
        super().settle()
        given, self.config = self.config, with_guidance(self.config, self.of_teacher)
        if any(key.startswith("guidance.") for key in self.args.overrides):
            what = "the guidance of a student is what it takes in while it is taught"
            raise UserError(what, hint="give --student.guidance_scale W, or LOW,HIGH for a range, in place of it")
        if "sample.steps" in self.args.overrides and given.sample.steps != self.config.sample.steps:
            what = f"sample.steps {given.sample.steps}: it is taught to draw in {in_steps(self.config.student.steps)}"
            raise UserError(what, hint="leave it out, or change the steps that it is taught: --objective.steps N")

    def build(self, accelerator: Accelerator, final: Path | None) -> FewStepStage:
        """Teacher and student, which share a frozen text encoder, in a stage that trains the student."""
        args, config = self.args, self.config
        found = find(args.teacher, "denoiser")
        self.refuse_without_image()
        torch.manual_seed(config.train.seed)
        frozen = isinstance(config.text, HuggingFace)
        home = found.final if frozen else vocabulary_home(config.text, None, args.teacher)
        encoder = text_encoder_of(args, self.dataset, found.final, "teacher") if frozen else None
        with as_user_error("change the config"):
            given = config, Path(args.latents), self.dataset, home, encoder, accelerator.device
            self.parts = parts = assembly.assemble(*given, draws=accelerator.is_main_process)
        same_autoencoder(args.teacher, stored_ingredients(found.final), parts.hashes, "teacher")
        fill_network(config, parts, self.dataset, args.teacher, args.text_encoder)
        parts.text.eval().requires_grad_(False)
        teacher = self.load_teacher(found, accelerator.device)
        if is_distributed():  # each may have read a file of its own
            agree({"teacher": self.taught_by["denoiser"]})
        with as_user_error("see the keys of [objective] and [student] with --print-config"):
            norm, data = parts.autoencoder.norm, (self.dataset, self.held_out)
            asked = teacher if config.student.learns_from == "teacher" and config.objective.taught != "no" else None
            scale = getattr(config.guidance, "scale", 1.0)
            stage = FewStepStage(config, parts.backbone, parts.text, norm, *data, parts.pipeline, parts.null,
                                 teacher=asked, guided=scale)
        self.trained = stage
        self.tell_unread_image(accelerator)
        return stage

    def load_teacher(self, found: Any, device: torch.device) -> Teacher:
        """The teacher as it answers its student."""
        parts, theirs = self.parts, self.of_teacher
        backbone = assembly.backbone_for(theirs, parts.autoencoder, parts.text).to(device)
        assembly.fill_learned(backbone, parts.text, found.weights, found.final)
        backbone.eval().requires_grad_(False)
        self.taught_by = {"denoiser": content_hash(backbone.state_dict()),
                          "text_encoder": content_hash(parts.text.state_dict())}
        self.teacher_parts = {"denoiser": backbone, "text_encoder": parts.text}
        denoiser = assembly.draw_with(theirs, parts.autoencoder, backbone, parts.text, {}).denoiser
        with torch.no_grad():
            null = parts.null.to(device) if parts.null is not None else parts.text([""])
        guidance = theirs.guidance if isinstance(theirs.guidance, ClassifierFree) else ClassifierFree(scale=1.0)
        scales = self.config.student.scales
        guidance = dataclasses.replace(guidance, scale=scales[0] if len(scales) == 1 else 1.0)
        if theirs.student.baked is not None:  # its own is in it
            return Teacher(denoiser)
        return Teacher(denoiser, guidance, null, theirs.student.embedded)

    def held(self) -> dict[str, nn.Module]:
        """Also the teacher."""
        return {**super().held(), "teacher": self.teacher_parts["denoiser"]}

    def description(self) -> str:
        """Parameters, the teacher, and the number of latents."""
        count = "a stream of" if self.args.stream else f"{len(self.dataset):,}"
        kind, teacher = self.config.objective.kind, name_of(self.args.teacher)
        return f"{kind}: {parameters(self.trained.network)} parameters taught by {teacher}; {count} latents"

    def facts(self) -> dict[str, Any]:
        """Also the hashes of the teacher."""
        return {**super().facts(), "teacher": self.taught_by}

    def begin(self, final: Path) -> None:
        """Write down which teacher it is."""
        super().begin(final)
        write_json(final / TEACHER, {"name": name_of(self.args.teacher), "hashes": self.taught_by})

    def export(self, run: Path, facts: dict[str, Any]) -> Mapping[str, Tensor]:
        """The tensors of the student. Raises RuntimeError where the teacher is no longer the same."""
        hashes = {name: content_hash(part.state_dict()) for name, part in self.teacher_parts.items()}
        if change := difference(self.taught_by, hashes):
            raise RuntimeError(f"the {change.name} of the teacher was {change.before}, and is {change.now} after it")
        return super().export(run, facts)


def with_guidance(config: Any, teacher: Any) -> Any:
    """The config with the guidance that the student takes in: as it says, or the teacher's own; and drawn for it.

    Raises UserError where the teacher is no denoiser, is guided in a way that no student learns, or has another scale
    in it.
    """
    student, own = config.student, teacher.guidance
    scales, theirs = student.scales, teacher.student.scales
    if config.objective.taught != "no" and student.learns_from == "teacher":
        refuse_teacher(config, teacher)
        if not scales and not theirs and not isinstance(own, ClassifierFree):
            what = f"the teacher draws with guidance {own.kind}, and a student takes in classifier-free guidance alone"
            raise UserError(what, hint="say a scale with --student.guidance_scale W, 1 for none")
        scales = scales or theirs or (own.scale,)
        _refuse_scales(scales, teacher.student)
    if SCALE in config.objective.reads and len(scales) != 2:
        what = f"objective.kind {config.objective.kind} teaches a range of guidance scales"
        raise UserError(what, hint="--student.guidance_scale 1,8")
    guidance: Any = ClassifierFree(scale=1.0)
    if len(scales) == 2:
        guidance = Embedded(scale=min(max(getattr(own, "scale", 1.0), scales[0]), scales[1]))
    steps = config.objective.drawn_in
    sample = config.sample
    if steps and sample.steps not in steps:
        sample = dataclasses.replace(sample, steps=steps[-1])
    student = dataclasses.replace(student, guidance_scale=scales, steps=steps or student.steps)
    return dataclasses.replace(config, student=student, guidance=guidance, sample=sample)


def _refuse_scales(scales: tuple[float, ...], teacher: Student) -> None:
    """Raises UserError where a teacher that has taken guidance in has other scales than its student is to have."""
    theirs = teacher.scales
    if teacher.baked is not None and scales != theirs:
        what = f"guidance at scale {theirs[0]:g} is baked into the teacher, and a second one would count twice"
        raise UserError(what, hint="leave --student.guidance_scale out")
    if not teacher.embedded:
        return
    if not theirs[0] <= scales[0] <= scales[-1] <= theirs[1]:
        what = f"the teacher was taught guidance scales from {theirs[0]:g} to {theirs[1]:g}"
        raise UserError(what, hint=f"--student.guidance_scale {theirs[0]:g},{theirs[1]:g}, or a range within it")
    if len(scales) == 1:
        what = "the teacher is told its guidance scale, and a student that is told none would not begin as it is"
        raise UserError(what, hint=f"--student.guidance_scale {theirs[0]:g},{theirs[1]:g}, or leave it out")


def refuse_teacher(config: Any, teacher: Any) -> None:
    """Raises UserError for a teacher that is no denoiser: a student that answers where x goes teaches those alone whose
    steps are two of its own; and for guidance by a picture, which no student takes in."""
    theirs, kind = teacher.objective, config.objective.kind
    halved = getattr(config.objective, "from_steps", 0) * 2 in teacher.student.steps
    if theirs.reading is not None and theirs.aim in ("clean", "next") and not (
            kind == theirs.kind == "progressive" and halved):
        steps = teacher.student.steps[-1:] if kind == theirs.kind == "progressive" else ()
        what = f"the teacher is a few-step model (objective.kind {theirs.kind}), which is no denoiser to learn from"
        half = steps[0] // 2 if steps else 0
        more = f", or go on with it: --objective.from_steps {half} --objective.steps {half}" if half else ""
        raise UserError(what, hint=f"give the model that taught it with --teacher{more}")
    if SPAN in theirs.reads and SPAN not in config.objective.reads:
        what = f"the teacher is told how far it goes, and a student of objective.kind {kind} is not"
        raise UserError(what, hint="give the model that taught it with --teacher")
    if config.sample.image_scale != 1:
        what = "guidance by the picture (sample.image_scale) is none that a student takes in"
        raise UserError(what, hint="leave it out of the teacher's drawing: --sample.image_scale 1")
