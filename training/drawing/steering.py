"""What guides a drawing besides its caption: a weaker model, a classifier, and the hashes of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.guidance import Autoguidance, ByClassifier
from ldm.guiding import AgainstNull, Guidance
from ldm.jumps import Jumping
from ldm.students import check_negatives, check_plan
from training.errors import CHECKPOINT, UserError
from training.guarding import read_record
from training.models.assembly import HashedPipeline, load_pipeline
from training.models.cards import TEACHER
from training.models.folders import find
from training.models.judge import Judge
from training.tensors import content_hash

if TYPE_CHECKING:
    import argparse

    from ldm.pipeline import Sampling
    from ldm.text import TextEncoder


def add_weak(pipeline: HashedPipeline, path: str | Path, text_encoder: str | None = None) -> HashedPipeline:
    """The pipeline with the poorer model of another run or checkpoint beside the denoiser, for autoguidance.

    Raises UserError where it was made for other captions or another process, and for a student, which is no poorer
    model of the same: it answers where x goes, or with guidance in it.
    """
    weak = load_pipeline(path, pipeline.device, text_encoder)
    if isinstance(weak.denoiser, Jumping):
        what = f"{path} is a few-step model, and autoguidance compares two denoisers"
        raise UserError(what, hint="give an earlier checkpoint of the run that draws", code=CHECKPOINT)
    widths = [(text.context_dim, text.pooled_dim) for text in (weak.text, pipeline.text)]
    if widths[0] != widths[1] or weak.denoiser.schedule != pipeline.denoiser.schedule:
        raise UserError(
            f"{path} has another schedule or text encoder than the model it is to guide",
            hint="give an earlier checkpoint of the same run, or a smaller model trained with the same settings",
            code=CHECKPOINT,
        )
    hashes = pipeline.hashes | {"weak": weak.hashes["denoiser"]}
    return dataclasses.replace(pipeline, weak=weak.denoiser, hashes=hashes)


def flags_without_use(args: argparse.Namespace, text: TextEncoder, guidance: Guidance, also: bool) -> list[str]:
    """The flags that were given and that nothing of this drawing reads, each with what would read it."""
    against = isinstance(guidance, AgainstNull) and (guidance.scale != 1 or also)
    unused = {
        "--negative-prompt: only guidance away from a null, at another scale than 1, reads it": (
            args.negative_prompt and not against
        ),
        "--weak-model: only --guidance.kind autoguidance reads it": (
            args.weak_model and not isinstance(guidance, Autoguidance)
        ),
        "--classifier: only --guidance.kind classifier reads it": (
            args.classifier and not isinstance(guidance, ByClassifier)
        ),
        "--invert-prompt: only --invert reads it": args.invert_prompt and not (args.invert or args.coupling),
        "--method: only --restore and --mask read it": args.method and not (args.restore or args.mask),
        "--text-encoder: only a frozen one is loaded": args.text_encoder and text.trainable,
    }
    return [why for why, given in unused.items() if given]


def refuse_untaught(pipeline: HashedPipeline, sampling: Sampling, negatives: Sequence[str] = (),
                    also: bool = False) -> None:
    """Raises UserError where a few-step model is asked for steps, guidance or prompts that it was not taught."""
    try:
        check_plan(pipeline.student, sampling, pipeline.denoiser)
        check_negatives(pipeline.student, sampling, pipeline.denoiser, negatives, also)
    except ValueError as refused:
        what, _, hint = str(refused).rpartition(": ")
        raise UserError(what, hint=hint) from None


def student_facts(pipeline: HashedPipeline, model: str | Path) -> dict[str, Any]:
    """What a picture of a few-step model says of how that was taught: its steps, the guidance in it, and the name and
    hashes of its teacher, where it had one; nothing of any other."""
    if not isinstance(pipeline.denoiser, Jumping):
        return {}
    student, path = pipeline.student, find(model, "denoiser").final / TEACHER
    teacher = read_record(path, {"name": str, "hashes": dict}) if path.is_file() else None
    told = {"steps": list(student.steps), "guidance_scale": list(student.scales)}
    return {"student": told | ({"teacher": teacher} if teacher else {})}


def pipeline_hashes(pipeline: HashedPipeline) -> dict[str, str]:
    """The content hashes a picture carries: whole autoencoder, backbone, text encoder and its words, what guides."""
    if not isinstance(pipeline.judge, Judge):
        return pipeline.hashes
    return pipeline.hashes | {"classifier": content_hash(pipeline.judge.model.state_dict())}
