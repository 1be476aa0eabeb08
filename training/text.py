"""Text encoders on disk: Hugging Face folders and names, vocabularies built from captions, and the identity of both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ldm.text import HuggingFace, TextEncoder
from ldm.text.encoders import HuggingFaceTextEncoder
from training.errors import CHECKPOINT, DATA, UserError
from training.files import content_hash, read_json, write_bytes, write_json

LARGE = 200_000_000  # parameters up to which a frozen encoder is copied into every run
VOCABULARY = "vocabulary.json"


def load_huggingface(config: HuggingFace, name: str) -> TextEncoder:
    """A frozen encoder by hub name or local folder (CLIP text, T5, BERT-like); safetensors only, no remote code.

    Raises UserError saying what to download where it cannot be had, or why it does not fit.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        family = {
            "t5": T5EncoderModel,
            "mt5": T5EncoderModel,
            "clip_text_model": CLIPTextModelWithProjection,
            "clip": CLIPTextModelWithProjection,
        }
        model = family.get(kind, AutoModel).from_pretrained(name, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(name))
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as failure:
        reason = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
        raise UserError(
            f"text encoder '{name}' cannot be loaded ({reason[:200]})",
            code=DATA,
            hint="give a folder that holds config.json, model.safetensors and the tokenizer's files",
        ) from None
    try:
        return config.build(model, tokenizer)
    except ValueError as failure:
        raise UserError(f"text encoder '{name}': {failure}", hint="change the [text] section of the config") from None


def _tokenizer_folder(name: str) -> str:
    """Runs and diffusers' pipelines keep the tokenizer in a folder beside the encoder's."""
    beside = Path(name).parent / "tokenizer"
    own = any((Path(name) / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"))
    return str(beside) if beside.is_dir() and not own else name


def identity(encoder: TextEncoder) -> dict[str, Any]:
    """What names a frozen text encoder: the hash of weights, vocabulary and settings, and each setting readable."""
    assert isinstance(encoder, HuggingFaceTextEncoder)
    settings = {key: value for key, value in vars(encoder.config).items() if key != "kind"}
    words = encoder.tokenizer.get_vocab()
    vocabulary = hashlib.sha256(json.dumps(sorted(words.items())).encode()).hexdigest()
    weights = content_hash(encoder.model.state_dict())
    whole = hashlib.sha256(json.dumps([weights, vocabulary, settings], sort_keys=True).encode()).hexdigest()
    return {"hash": whole, "weights": weights, "vocabulary": vocabulary, **settings}


def keep(encoder: TextEncoder, name: str, folder: Path) -> None:
    """Store a frozen encoder in a run's or data set's folder: whole where small, by name and hash where large."""
    folder.mkdir(parents=True, exist_ok=True)
    assert isinstance(encoder, HuggingFaceTextEncoder)
    large = sum(p.numel() for p in encoder.parameters()) > LARGE
    if not large:
        model: Any = encoder.model
        model.save_pretrained(folder / "text_encoder", safe_serialization=True)
        encoder.tokenizer.save_pretrained(folder / "tokenizer")
    # A hub name is worth keeping; a path of this machine is not.
    named = Path(name).name if Path(name).exists() else name
    (folder / "text_encoder").mkdir(exist_ok=True)
    write_json(folder / "text_encoder" / "identity.json", {"name": named, "copied": not large, **identity(encoder)})


def load_kept(config: HuggingFace, folder: Path, override: str | None = None) -> TextEncoder:
    """The encoder that `keep` stored, or `override` (name or folder); either way it must be the same one, by hash."""
    stored = read_json(folder / "text_encoder" / "identity.json")
    source = override or (str(folder / "text_encoder") if stored["copied"] else stored["name"])
    encoder = load_huggingface(config, source)
    if (found := identity(encoder)["hash"]) != stored["hash"]:
        raise UserError(
            f"text encoder {source} is {found[:12]}, the one asked for is {stored['hash'][:12]} ({stored['name']})",
            hint="give the right one with --text-encoder",
            code=CHECKPOINT,
        )
    return encoder


def keep_vocabulary(vocabulary: str, folder: Path) -> None:
    """Store the vocabulary of a trainable encoder."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "tokenizer" / VOCABULARY, vocabulary.encode())


def stored_vocabulary(folder: Path) -> str:
    """The vocabulary that `keep_vocabulary` stored."""
    try:
        return (folder / "tokenizer" / VOCABULARY).read_text("utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{folder / 'tokenizer' / VOCABULARY}: no such file", hint="is this a denoiser's run?", code=CHECKPOINT
        ) from None
