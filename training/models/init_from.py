"""A denoiser's training that begins with the weights of another run (`--init-from`), and with its words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.text import HuggingFace, Label
from ldm.text.encoders import LabelEncoder
from ldm.text.huggingface import HuggingFaceTextEncoder
from training.data.latents import Latents
from training.errors import CHECKPOINT, DATA, USAGE, UserError
from training.messages import note
from training.models import text_encoders
from training.models.adapters import refuse_adapter
from training.models.assembly import Parts, Weights, fill_learned
from training.models.captions_read import few_of
from training.models.folders import find
from training.models.lineage import same_ingredients
from training.models.vocabulary import added, captions
from training.settings import decoding
from training.tensors import content_hash

if TYPE_CHECKING:
    import argparse


def refuse_new_words(args: argparse.Namespace, config: Any) -> None:
    """Raises UserError where `--new-words` has nothing to add to."""
    if args.new_words and not (args.init_from or args.base):
        raise UserError(
            "--new-words adds to the words of a trained run, and none is named",
            hint="name it with --init-from RUN or --base RUN, or leave --new-words out: a new vocabulary has "
            "all of the captions' words",
            code=USAGE,
        )
    if args.new_words and isinstance(config, HuggingFace):
        raise UserError(
            "--new-words: a frozen text encoder learns no words",
            hint="leave --new-words out: it reads every word by its own pieces",
            code=USAGE,
        )
    if args.new_words and args.base and isinstance(config, Label):
        what = "--new-words: labels are whole captions, of which an adapter learns no new ones"
        hint = "leave it out, or train the whole model with --init-from RUN --new-words"
        raise UserError(what, hint=hint, code=USAGE)


def vocabulary_home(config: Any, run_final: Path | None, donor: str | None) -> Path | None:
    """The final/ whose vocabulary a text encoder that learns is to have: a run's own, else that of `--init-from`.

    The rows of its weights are words in the order of that vocabulary; with another they would be other words'.
    Raises UserError where the donor's text encoder is of another kind.
    """
    if donor is None or isinstance(config, HuggingFace) or (run_final and text_encoders.holds_vocabulary(run_final)):
        return run_final
    folder = find(donor, "denoiser")
    donor_config: Any = folder.config()
    if (kind := donor_config.text.kind) != config.kind:
        raise UserError(
            f"the text encoder of {donor} is of the kind {kind}, this config's is {config.kind}",
            hint=f"give --config {folder.home / 'config.json'}, or leave --init-from out",
            code=CHECKPOINT,
        )
    return folder.final


def _refuse_told(config: Any, theirs: Any, path: str) -> None:
    """Raises UserError for the run of a few-step model that reads numbers which this one does not."""
    if theirs.conditioning.size and not config.conditioning.size:
        what = f"{path} is told how each picture was cut, and this one is not"
        raise UserError(what, hint="give --conditioning.size true", code=CHECKPOINT)
    ours = {*config.objective.reads, *config.student.reads}
    if told := sorted({*theirs.objective.reads, *theirs.student.reads} - ours):
        what = f"{path} is a few-step model that is told its {' and '.join(told)}, and this one is told none"
        raise UserError(what, hint="begin with the model that taught it", code=CHECKPOINT)


def fill_network(
    config: decoding.DenoiserConfig, parts: Parts, dataset: Latents, path: str, text_encoder: str | None = None
) -> int:
    """`--init-from`: the weights of another run of the same shape, nothing else; zeros for what an image condition adds
    to it. Returns how many channels that is.

    Nothing that is not taken over is loaded. Rows of words that were added stay as they were initialised. Raises
    UserError where the vocabulary of a text encoder that learns does not begin with that run's, or it cannot take the
    captions, and where one given as `text_encoder` is not the frozen one of that run.
    """
    folder, text = find(path, "denoiser"), parts.text
    refuse_adapter(path, folder, "give a whole model")
    _refuse_told(config, folder.config(), path)
    if text_encoder and isinstance(text, HuggingFaceTextEncoder):
        text_encoders.same_encoder(folder.final, text, text_encoder)
    words = text_encoders.stored_vocabulary(folder.final) if text_encoders.holds_vocabulary(folder.final) else ""
    new = added(words or "{}", parts.text_source) if text.trainable else []
    if new is None:
        theirs = text_encoders.vocabulary_hash(words) if words else "none"
        raise UserError(
            f"{path} was trained with the vocabulary {theirs[:12]}, this run has {parts.hashes['vocabulary'][:12]}",
            hint="leave --init-from out to go on with this run, or begin another with it: --output",
            code=CHECKPOINT,
        )
    if isinstance(text, LabelEncoder) and (more := next((c for c in captions(dataset) if c not in text.rows), "")):
        raise UserError(
            f"caption {more[:80]!r} is not one of the {len(text.classes)} labels of {path}",
            hint="labels are added with --init-from RUN --new-words, which trains the whole model",
            code=DATA,
        )
    taken, before = config.text.build(words) if new else text, dict[str, Weights]()

    def widened(theirs: Weights) -> Weights:
        kept = parts.backbone.state_dict()  # its hash is of the precision in which it is loaded
        before["denoiser"] = {name: tensor.to(kept[name].dtype) for name, tensor in theirs.items() if name in kept}
        return parts.backbone.extended(theirs)

    fill_learned(parts.backbone, taken, folder.weights, folder.final, widened)
    if folder.finished:  # what was written at its end says what it was
        learned = before | ({"text_encoder": taken.state_dict()} if text.trainable else {})
        same_ingredients(folder.final, {name: content_hash(tensors) for name, tensors in learned.items()})
    if new:
        own = text.state_dict()
        for name, tensor in taken.state_dict().items():
            own[name][: len(tensor)] = tensor
        said = f"{len(new)} words or labels added to the vocabulary of {path}: {few_of(new)}"
        note(f"{said}; it is {parts.hashes['vocabulary'][:12]} now")
    layer, channels = f"{parts.backbone.input_layer}.weight", parts.shape[0]
    wide, narrow = len(parts.backbone.get_parameter(layer)[0]), len(before["denoiser"][layer][0])
    return channels * (wide - narrow) // narrow
