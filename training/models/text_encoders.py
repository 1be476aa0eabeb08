"""Text encoders on disk: Hugging Face folders and names, vocabularies built from captions, and the identity of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm.conditioning import Cond
from ldm.text import HuggingFace, TextEncoder
from ldm.text.huggingface import HuggingFaceTextEncoder
from training.errors import CHECKPOINT, DATA, UserError
from training.files import content_hash, read_json, write_bytes, write_json
from training.runs.ingredients import difference

LARGE = 200_000_000  # parameters up to which a frozen encoder is copied into every run
VOCABULARY = "vocabulary.json"


def in_precision(dtype: str) -> dict[str, str]:
    """What transformers is told, to load weights as "float32", say, whatever they are stored as: version 5 would take
    the file's own, version 4 float32, and each encode otherwise. "auto" is the file's own."""
    from transformers import __version__

    return {"dtype" if tuple(map(int, __version__.split(".")[:2])) >= (4, 56) else "torch_dtype": dtype}


def load_huggingface(config: HuggingFace, name: str, dtype: str = "float32") -> TextEncoder:
    """A frozen encoder by hub name or local folder (CLIP text, T5, BERT-like); safetensors only, no remote code.

    Its weights are loaded as `dtype`, whatever precision they are stored in.
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
        model = family.get(kind, AutoModel).from_pretrained(name, use_safetensors=True, **in_precision(dtype))
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
    return {"hash": whole, "weights": weights, "vocabulary": vocabulary, **tokenizer_hash(encoder), **settings}


def tokenizer_hash(encoder: TextEncoder) -> dict[str, str]:
    """`tokenizer`: the hash of all that it does to a caption (lower-casing, splitting, merges ...), if it can tell.

    Beside `identity`'s hash, not in it: what was stored without it stays valid. How long captions may be, to which
    they are cut and padded, is a setting of the encoder and is set in the tokenizer anew at each call.
    """
    assert isinstance(encoder, HuggingFaceTextEncoder)
    if (backend := getattr(encoder.tokenizer, "backend_tokenizer", None)) is None:  # one written in Python
        return {}
    whole = json.loads(backend.to_str())
    does = {key: value for key, value in whole.items() if key not in ("truncation", "padding")}
    return {"tokenizer": hashlib.sha256(json.dumps(does, sort_keys=True).encode()).hexdigest()}


def keep(encoder: TextEncoder, name: str, folder: Path) -> None:
    """Store a frozen encoder in a run's or data set's folder: whole where small, by name and hash where large.

    Raises UserError where another one is stored there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert isinstance(encoder, HuggingFaceTextEncoder)
    identities, record = identity(encoder), folder / "text_encoder" / "identity.json"
    if record.is_file():
        _same(read_json(record), identities, name)
    large = sum(p.numel() for p in encoder.parameters()) > LARGE
    if not large:
        model: Any = encoder.model
        model.save_pretrained(folder / "text_encoder", safe_serialization=True)
        encoder.tokenizer.save_pretrained(folder / "tokenizer")
    # A hub name is worth keeping; a path of this machine is not.
    public_name = Path(name).name if Path(name).exists() else name
    (folder / "text_encoder").mkdir(exist_ok=True)
    dtype = str(next(encoder.parameters()).dtype).removeprefix("torch.")
    write_json(record, {"name": public_name, "copied": not large, "dtype": dtype, **identities})


def load_stored(config: HuggingFace, folder: Path, override: str | None = None) -> TextEncoder:
    """The encoder that `keep` stored, or `override` (name or folder); either way it must be the same one, by hash."""
    stored = read_json(folder / "text_encoder" / "identity.json")
    source = override or (str(folder / "text_encoder") if stored["copied"] else stored["name"])
    encoder = load_as_stored(config, source, stored)
    _same(stored, identity(encoder), source)
    return encoder


def load_as_stored(config: HuggingFace, name: str, record: dict[str, Any]) -> TextEncoder:
    """The encoder `name` in the precision that a `record` of `keep` was made in, if it is the same; else in float32."""
    encoder = load_huggingface(config, name, record.get("dtype", "float32"))
    if "dtype" in record or record.get("hash") in (None, identity(encoder)["hash"]):
        return encoder
    older = load_huggingface(config, name, "auto")  # of before the precision was written down: perhaps the file's own
    return older if identity(older)["hash"] == record["hash"] else encoder


def stored_record(folder: Path | None) -> dict[str, Any]:
    """What `keep` wrote of an encoder in `folder`; empty where there is none."""
    record = folder / "text_encoder" / "identity.json" if folder else None
    return dict(read_json(record)) if record and record.is_file() else {}


class StoredText(TextEncoder):
    """Stands for a frozen encoder whose embeddings are stored, where nothing is drawn: widths without weights."""

    def __init__(self, null: Cond) -> None:
        pooled = None if null.pooled is None else null.pooled.shape[-1]
        super().__init__(context_dim=null.context.shape[-1], pooled_dim=pooled, trainable=False)

    def encode(self, captions: list[str]) -> Cond:
        """Nothing is encoded here."""
        raise RuntimeError("no text encoder is loaded in this process")

    def truncated(self, captions: Iterable[str]) -> int:
        """Nothing is read here."""
        raise RuntimeError("no text encoder is loaded in this process")


def _same(baseline: dict[str, Any], current: dict[str, Any], source: str) -> None:
    names = ["hash", *(["tokenizer"] if "tokenizer" in baseline else [])]  # `tokenizer` came later
    if change := difference(baseline, current, names):
        part = "text encoder" if change.name == "hash" else "the tokenizer of text encoder"
        raise UserError(
            f"{part} {source} is {change.now}, the one asked for is {change.before} ({baseline['name']})",
            hint="give the right one with --text-encoder",
            code=CHECKPOINT,
        )


def keep_vocabulary(vocabulary: str, folder: Path) -> None:
    """Store the vocabulary of a trainable encoder."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "tokenizer" / VOCABULARY, vocabulary.encode())


def holds_vocabulary(folder: Path) -> bool:
    """Whether `keep_vocabulary` stored one there."""
    return (folder / "tokenizer" / VOCABULARY).is_file()


def vocabulary_hash(vocabulary: str) -> str:
    """What names a vocabulary, as `stored_vocabulary` gives it."""
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def stored_vocabulary(folder: Path) -> str:
    """The vocabulary that `keep_vocabulary` stored."""
    try:
        return (folder / "tokenizer" / VOCABULARY).read_text("utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{folder / 'tokenizer' / VOCABULARY}: no such file", hint="is this a denoiser's run?", code=CHECKPOINT
        ) from None
