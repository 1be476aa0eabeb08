"""`--init-from`: a run that begins with the weights of another, and with its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.backbones.image import extended
from ldm.text import HuggingFace
from ldm.text.encoders import LabelEncoder
from ldm.text.huggingface import HuggingFaceTextEncoder
from training.data.latents import Latents
from training.errors import CHECKPOINT, DATA, UserError
from training.models import text_encoders
from training.models.adapters import refuse_adapter
from training.models.assembly import Parts, Weights, fill_learned
from training.models.folders import find
from training.models.lineage import same_ingredients
from training.models.vocabulary import captions
from training.tensors import content_hash


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


def fill_network(parts: Parts, dataset: Latents, path: str, text_encoder: str | None = None) -> int:
    """`--init-from`: the weights of another run of the same shape, nothing else; zeros for what an image condition adds
    to it. Returns how many channels that is.

    Nothing that is not taken over is loaded. Raises UserError where a text encoder that learns has not that run's
    vocabulary, or cannot take the captions, and where one given as `text_encoder` is not the frozen one of that run.
    """
    folder, text = find(path, "denoiser"), parts.text
    refuse_adapter(path, folder, "give a whole model")
    if text_encoder and isinstance(text, HuggingFaceTextEncoder):
        text_encoders.same_encoder(folder.final, text, text_encoder)
    words = text_encoders.stored_vocabulary(folder.final) if text_encoders.holds_vocabulary(folder.final) else ""
    theirs = text_encoders.vocabulary_hash(words) if words else "none"
    if text.trainable and theirs != parts.hashes["vocabulary"]:
        raise UserError(
            f"{path} was trained with the vocabulary {theirs[:12]}, this run has {parts.hashes['vocabulary'][:12]}",
            hint="leave --init-from out to go on with this run, or begin another with it: --output",
            code=CHECKPOINT,
        )
    if isinstance(text, LabelEncoder) and (new := next((c for c in captions(dataset) if c not in text.rows), "")):
        raise UserError(
            f"caption {new[:80]!r} is not one of the {len(text.classes)} labels of {path}",
            hint="labels cannot be added to: leave --init-from out",
            code=DATA,
        )
    taken: dict[str, Weights] = {}

    def widened(theirs: Weights) -> Weights:
        taken["denoiser"] = theirs
        return extended(theirs, parts.backbone)

    fill_learned(parts.backbone, text, folder.weights, folder.final, widened)
    if text.trainable:
        taken["text_encoder"] = text.state_dict()
    if folder.finished:  # what was written at its end says what it was
        same_ingredients(folder.final, {name: content_hash(part) for name, part in taken.items()})
    layer, channels = f"{parts.backbone.input_layer}.weight", parts.shape[0]
    wide, own = len(parts.backbone.get_parameter(layer)[0]), len(taken["denoiser"][layer][0])
    return channels * (wide - own) // own
