"""Text encoders on disk: Hugging Face folders and names, vocabularies built from captions, and the identity of both."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ldm.conditioning import Cond
from ldm.text import HuggingFace, TextEncoder
from ldm.text.huggingface import HuggingFaceTextEncoder
from ldm.text.tokenizer import WordTokenizer
from training.errors import CHECKPOINT, UserError
from training.files import write_bytes, write_json
from training.guarding import disk_error, make_folder, read_record, read_whole
from training.models.pretrained import load_model, loading
from training.runs.ingredients import difference
from training.tensors import content_hash

LARGE = 200_000_000  # parameters up to which a frozen encoder is copied into every run
VOCABULARY = "vocabulary.json"
SETTINGS = ("length", "pooling", "layer", "lower", "masked", "mask_rule")  # of `HuggingFace`


def load_huggingface(config: HuggingFace, name: str, dtype: str = "float32") -> TextEncoder:
    """A frozen encoder by hub name or local folder (CLIP text, T5, BERT-like); safetensors only, no remote code.

    Its weights are loaded as `dtype`, whatever precision they are stored in.
    Raises UserError saying what to download where it cannot be had, or why it does not fit.
    """
    hint = "give a folder that holds config.json, model.safetensors and the tokenizer's files"
    with loading("text encoder", name, hint) as how:
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

        t5, clip = T5EncoderModel, CLIPTextModelWithProjection
        families = {"t5": t5, "mt5": t5, "clip_text_model": clip, "clip": clip, "CLIPTextModel": CLIPTextModel}
        model = load_model(name, families, how, dtype)
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(name), **how)
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
    settings = {key: value for key, value in vars(encoder.config).items() if key not in ("kind", "mask_rule")}
    if not encoder.config.masked and encoder.config.mask_rule != 1:  # else as before there was a rule: old hashes hold
        settings["mask_rule"] = encoder.config.mask_rule
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


def keep(encoder: TextEncoder, name: str, folder: Path, *, whole: bool = False) -> None:
    """Store a frozen encoder in a run's or data set's folder: whole where small, by name and hash where large, unless
    it is to be `whole`.

    Raises UserError where another one is stored there.
    """
    make_folder(folder / "text_encoder")
    assert isinstance(encoder, HuggingFaceTextEncoder)
    identities, record = identity(encoder), folder / "text_encoder" / "identity.json"
    if record.is_file():
        _same(stored_identity(folder), identities, name)
    large = not whole and sum(p.numel() for p in encoder.parameters()) > LARGE
    if not large:
        _save(encoder, folder)
    # A hub name is worth keeping; a path of this machine is not.
    public_name = Path(name).name if Path(name).exists() else name
    dtype = str(next(encoder.parameters()).dtype).removeprefix("torch.")
    write_json(record, {"name": public_name, "copied": not large, "dtype": dtype, **identities})


def _save(encoder: HuggingFaceTextEncoder, folder: Path) -> None:
    """As transformers writes it; the weights, which safetensors writes with 0600, get the mode of the other files."""
    model: Any = encoder.model
    try:
        model.save_pretrained(folder / "text_encoder", safe_serialization=True)
        encoder.tokenizer.save_pretrained(folder / "tokenizer")
        for file in (folder / "text_encoder").glob("*.safetensors"):
            file.chmod(stat.S_IMODE((folder / "text_encoder" / "config.json").stat().st_mode))
    except (OSError, SafetensorError) as failure:
        raise disk_error(folder / "text_encoder", failure) from None


def stored_identity(folder: Path) -> dict[str, Any]:
    """What `keep` noted of the encoder beside which it lies."""
    return read_record(folder / "text_encoder" / "identity.json", {"name": str, "copied": bool, "hash": str})


def load_stored(config: HuggingFace, folder: Path, override: str | None = None) -> TextEncoder:
    """The encoder that `keep` stored, or `override` (name or folder); either way it must be the same one, by hash.

    Raises UserError where only its name was stored: what a file names is not fetched or opened unless the user says so.
    """
    stored, source = stored_identity(folder), override or stored_whole(folder)
    encoder = load_as_stored(config, source, stored)
    _same(stored, identity(encoder), source)
    return encoder


def stored_whole(folder: Path) -> str:
    """Where `keep` stored an encoder. Raises UserError where only its name was."""
    stored = stored_identity(folder)
    if not stored["copied"]:
        said = f"{folder} names its text encoder, {stored['name']}, and does not hold it: it is large"
        hint = "give --text-encoder with that name, or with a folder of it, if you trust where these files are from"
        raise UserError(said, hint=hint, code=CHECKPOINT)
    return str(folder / "text_encoder")


def same_encoder(folder: Path, encoder: TextEncoder, source: str) -> None:
    """Raises UserError where `encoder`, loaded from `source`, is another than `keep` stored; its settings may be."""
    stored, now = stored_record(folder), identity(encoder)
    if difference(stored, now, [name for name in ("weights", "vocabulary") if name in stored]):
        _same(stored, now, source)


def load_as_stored(config: HuggingFace, name: str, record: dict[str, Any]) -> TextEncoder:
    """The encoder `name` in the precision that a `record` of `keep` was made in, if it is the same; else in float32."""
    encoder = load_huggingface(config, name, record.get("dtype", "float32"))
    if not record or "dtype" in record or record["hash"] == identity(encoder)["hash"]:
        return encoder
    older = load_huggingface(config, name, "auto")  # of before the precision was written down: perhaps the file's own
    return older if identity(older)["hash"] == record["hash"] else encoder


def stored_record(folder: Path | None) -> dict[str, Any]:
    """What `keep` wrote of an encoder in `folder`; empty where there is none."""
    there = folder is not None and (folder / "text_encoder" / "identity.json").is_file()
    return stored_identity(folder) if folder and there else {}


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


def _other_settings(baseline: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, what was stored, what is set) where one and the same encoder is set otherwise."""
    if any(baseline.get(part) != current[part] for part in ("weights", "vocabulary")):
        return []
    before, now = ({"mask_rule": 1, **told} for told in (baseline, current))  # as before there was that rule
    without = now["masked"] or before.get("masked", True)  # there is nothing to rule then
    keys = [key for key in SETTINGS if key in before and not (key == "mask_rule" and without)]
    return [(key, before[key], now[key]) for key in keys if before[key] != now[key]]


def _same(baseline: dict[str, Any], current: dict[str, Any], source: str) -> None:
    if others := _other_settings(baseline, current):
        told = [f"text.{key} is {json.dumps(now)}, not {json.dumps(before)}" for key, before, now in others]
        raise UserError(
            f"text encoder {source} is the one asked for, but {' and '.join(told)}",
            hint=f"set {' and '.join(f'text.{key} to {json.dumps(before)}' for key, before, _ in others)}",
            code=CHECKPOINT,
        )
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
    make_folder(folder / "tokenizer")
    write_bytes(folder / "tokenizer" / VOCABULARY, vocabulary.encode())


def holds_vocabulary(folder: Path) -> bool:
    """Whether `keep_vocabulary` stored one there."""
    return (folder / "tokenizer" / VOCABULARY).is_file()


def vocabulary_hash(vocabulary: str) -> str:
    """What names a vocabulary, as `stored_vocabulary` gives it."""
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def stored_vocabulary(folder: Path) -> str:
    """The vocabulary that `keep_vocabulary` stored. Raises UserError where it is none."""
    path = folder / "tokenizer" / VOCABULARY
    found = read_record(path, {}, hint="is this a denoiser's run?")
    words = found.get("vocabulary", found.get("classes"))
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{path}: holds no list of words", hint="use another copy of that folder", code=CHECKPOINT)
    if "vocabulary" in found and not (type(found.get("length")) is int and type(found.get("rule", 1)) is int):
        raise UserError(f"{path}: length must be a whole number", hint="use another copy of it", code=CHECKPOINT)
    return read_whole(path).decode("utf-8")


def known_words(folder: Path) -> Callable[[str], bool]:
    """Whether a caption has only words of the vocabulary stored there; where none is, every caption has."""
    stored = stored_vocabulary(folder) if holds_vocabulary(folder) else "{}"
    if "vocabulary" not in json.loads(stored):
        return bool
    tokenizer = WordTokenizer.from_json(stored)
    return lambda caption: not tokenizer.unknown(caption)
