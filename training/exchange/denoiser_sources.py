"""Where another program's denoiser is read from: a pipeline's folder of diffusers, one network's, the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from training.errors import CHECKPOINT, UserError
from training.exchange import autoencoders
from training.exchange.denoiser_layouts import LAYOUTS, OLDER
from training.exchange.diffusers_weights import WEIGHTS, folder_weights
from training.exchange.layout import Network, Settings, foreign
from training.exchange.scheduler_import import Process, need_prediction, read_scheduler
from training.guarding import read_record
from training.ledger import Ledger
from training.models.pretrained import tell_download
from training.tensors import load_tensors

NETWORKS = ("unet", "transformer")  # what the denoiser's folder is called in a pipeline
READ = {*NETWORKS, "vae", "vqvae", "scheduler", "text_encoder", "tokenizer"}
# Steps and guidance of a pipeline where the caller says nothing, and the length of its captions.
DEFAULTS = {"StableDiffusionPipeline": (50, 7.5, 77), "PixArtAlphaPipeline": (20, 4.5, 120),
            "PixArtSigmaPipeline": (20, 4.5, 300), "DiTPipeline": (50, 4.0, 1)}  # fmt: skip
LONGEST = 10_000  # tokens; more in a tokenizer's file stands for no limit
ROOT = ("model_index.json", "config.json", WEIGHTS)
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


class Asked(NamedTuple):
    """What the user gives where a source lacks or does not say it."""

    text_encoder: str = ""
    autoencoder: str = ""
    prediction: str | None = None
    heads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Donor:
    """A denoiser that was read. `autoencoder`: its own, or a run; `text`: `[text]`; `encoder`: name or folder of a
    frozen text encoder, and its weights where the source has others; `classes`: the captions of one that takes labels.
    """

    network: Network
    process: Process
    autoencoder: autoencoders.Imported | str
    text: Settings
    encoder: str = ""
    text_tensors: Mapping[str, Tensor] | None = None
    classes: tuple[str, ...] = ()
    steps: int = 50
    guidance: float = 7.5


def download(name: str) -> Path:
    """A repository of the Hugging Face hub: a pipeline's parts, in their full precision."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        hint = "give a pipeline's folder, a .safetensors file or ORG/NAME"
        raise UserError(f"{name}: no such file or folder", hint=hint)
    from huggingface_hub import snapshot_download

    tell_download("denoiser", name)
    inner = [f"{part}/{file}" for part in sorted(READ) for file in FILES]
    try:
        for unwanted in (["*.non_ema.*", "*flax*", "*.fp16.*"], ["*.non_ema.*", "*flax*"]):  # halves, if that is all
            folder = Path(snapshot_download(name, allow_patterns=[*ROOT, *inner], ignore_patterns=unwanted))
            if any(folder.glob("*.safetensors")) or any(any(folder.glob(f"{n}/*.safetensors")) for n in NETWORKS):
                break
        return folder
    except Exception as failure:  # offline, missing, gated: the hub has a class of its own for each
        raise UserError(
            f"{name} could not be downloaded from the Hugging Face hub ({type(failure).__name__})",
            hint="download the whole repository elsewhere, and give its folder",
            code=CHECKPOINT,
        ) from None


def read_folder(folder: Path, asked: Asked, ledger: Ledger, file: Path | None = None) -> Donor:
    """A pipeline's folder, or one of a network alone, whose weights are `file`'s where one is told. Raises UserError
    naming the first part that is missing."""
    index = read_record(folder / "model_index.json", {}) if (folder / "model_index.json").is_file() else {}
    homes = [folder / name for name in (*NETWORKS, "") if (folder / name / "config.json").is_file()]
    if not homes:
        hint = "give the folder of a pipeline that diffusers wrote, with its unet/ or transformer/"
        raise UserError(f"{folder}: no denoiser's config.json in it", hint=hint, code=CHECKPOINT)
    if asked.heads:
        raise UserError(f"--heads is of a single file: {folder} says its own", hint="leave --heads out")
    for name, part in sorted(index.items()):
        if name not in READ and isinstance(part, list) and part[:1] != [None]:
            ledger.add("ignored", "parts of the pipeline that are not read", name)
    network = read_network(homes[0], file)
    pipeline = str(index.get("_class_name", ""))
    steps, guidance, length = DEFAULTS.get(pipeline, (50, 7.5, 0))
    if pipeline not in DEFAULTS:
        ledger.add("guessed", "50 steps and guidance 7.5, since no pipeline that is known states others", pipeline)
    process = _process(folder, network, asked, ledger)
    donor: dict[str, Any] = {"network": network, "process": process, "steps": steps, "guidance": guidance,
             "autoencoder": _autoencoder(folder, asked)}  # fmt: skip
    if network.labels is not None:
        if asked.text_encoder:
            ledger.add("ignored", "the text encoder, since this network is told classes", asked.text_encoder)
        classes = _classes(index, len(network.labels) - 1, ledger)
        text = {"kind": "label", "width": network.labels.shape[1], "max_classes": max(len(classes), 10_000)}
        return Donor(**donor, text=text, classes=classes)
    encoder = asked.text_encoder or _own(folder / "text_encoder")
    return Donor(**donor, encoder=encoder, text=_text(network, Path(encoder), length, ledger))


def read_network(home: Path, file: Path | None = None) -> Network:
    """The denoising network of a folder as `save_pretrained` writes it. Raises UserError for classes and settings that
    have no counterpart here, by name."""
    about = read_record(home / "config.json", {})
    name = about.get("_class_name")
    if name == "Transformer2DModel":
        name = OLDER.get(str(about.get("norm_type")), name)
    if not isinstance(name, str) or name not in LAYOUTS:
        said = f"a {name:.80}" if isinstance(name, str) else "what its config.json describes"
        raise foreign(f"{home}: {said}", f"{', '.join(LAYOUTS)} are read")
    weights = load_tensors(file) if file else folder_weights(home)
    tensors = {key: value.float() for key, value in weights.items()}
    return read_class(name, about, tensors, home)


def read_class(name: str, about: Mapping[str, Any], tensors: dict[str, Tensor], source: Path) -> Network:
    """A class of diffusers' by its name. Raises UserError for settings that it never writes, or none here has."""
    try:
        return LAYOUTS[name].read(about, tensors)
    except UserError as problem:
        raise UserError(f"{source}: {problem.what}", hint=problem.hint, code=problem.code) from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as failure:
        reason = f"{source}: not the settings of {name} ({type(failure).__name__}: {failure})"
        hint = "check that config.json is complete and belongs to these weights"
        raise UserError(reason, hint=hint, code=CHECKPOINT) from None


def _process(folder: Path, network: Network, asked: Asked, ledger: Ledger) -> Process:
    """What scheduler/ says, or what is usual where there is none."""
    config = folder / "scheduler" / "scheduler_config.json"
    if config.is_file():
        try:
            process = read_scheduler(read_record(config, {}), ledger, network.backbone["learned_variance"])
        except UserError as problem:
            raise UserError(f"{config}: {problem.what}", hint=problem.hint, code=problem.code) from None
        return need_prediction(asked.prediction, process, ledger, str(config))
    return usual_process(network, asked.prediction, ledger)


def usual_process(network: Network, prediction: str | None, ledger: Ledger, table: Settings | None = None) -> Process:
    """The process that such networks are published with (or `table`) and its prediction, where nothing states them."""
    if prediction == "velocity":
        return Process({"kind": "flow"}, {"kind": "velocity"}, {"kind": "dpmpp-2m"}, {"kind": "uniform"})
    if table is None:
        table = {"kind": "ddpm-scaled-linear" if network.backbone["kind"] == "unet" else "ddpm-linear"}
        ledger.add("guessed", "the process, which no scheduler states", table["kind"])
    if prediction is None:
        ledger.add("guessed", "that the network predicts eps, which no scheduler states", "--prediction v says v")
    return Process(table, {"kind": prediction or "eps"}, {"kind": "ddim"}, {"kind": "trailing"})


def _autoencoder(folder: Path, asked: Asked) -> autoencoders.Imported | str:
    if asked.autoencoder:
        return asked.autoencoder
    home = next((folder / name for name in ("vae", "vqvae") if (folder / name / "config.json").is_file()), None)
    if home is None:
        raise no_autoencoder(folder)
    return autoencoders.read_folder(home)


def no_autoencoder(source: Path) -> UserError:
    """What to say of a source that is a denoiser alone."""
    hint = "give a run with --autoencoder RUN; convert_autoencoder import makes one of another program's"
    return UserError(f"{source} holds no autoencoder", hint=hint, code=CHECKPOINT)


def _own(home: Path) -> str:
    """The text encoder's folder. Raises UserError where a pipeline has none."""
    if not (home / "config.json").is_file():
        hint = "give the one it was trained with: --text-encoder NAME|DIR"
        raise UserError(f"{home.parent} holds no text encoder (text_encoder/)", hint=hint, code=CHECKPOINT)
    return str(home)


def _text(network: Network, encoder: Path, length: int, ledger: Ledger) -> Settings:
    """`[text]` as pipelines read captions: those of PixArt lower-cased and with their padding masked, those of U-Nets
    as they come, padding attended to; the encoder itself is told of it where its own config says so."""
    pooling = "auto" if network.backbone["pooled"] else "none"
    own = _words(encoder, length)
    if network.backbone["kind"] == "dit":
        if not length:
            ledger.add("guessed", "the length of captions, which no pipeline that is known states", str(own))
        return {"kind": "huggingface", "length": min(length or own, own), "lower": True, "pooling": pooling}
    config = read_record(encoder / "config.json", {}) if (encoder / "config.json").is_file() else {}
    rule = 1 if config.get("use_attention_mask") else 2
    return {"kind": "huggingface", "length": own, "masked": False, "mask_rule": rule, "pooling": pooling}


def _words(encoder: Path, usual: int) -> int:
    """How many tokens a tokenizer's file says it pads to, else what its encoder has places for."""
    for file, key in ((encoder.parent / "tokenizer" / "tokenizer_config.json", "model_max_length"),
                      (encoder / "tokenizer_config.json", "model_max_length"),
                      (encoder / "config.json", "max_position_embeddings")):  # fmt: skip
        said = read_record(file, {}).get(key) if file.is_file() else None
        if isinstance(said, int) and 0 < said < LONGEST:
            return said
    return usual or 77


def _classes(index: Mapping[str, Any], count: int, ledger: Ledger) -> tuple[str, ...]:
    """The captions of classes 0 to `count` - 1: their names in model_index.json, else their numbers."""
    names = index.get("id2label") if isinstance(index.get("id2label"), dict) else {}
    assert isinstance(names, dict)
    if len(names) < count:
        ledger.add("guessed", "the names of classes, by their numbers", f"0 to {count - 1}")
    captions: dict[str, int] = {}
    for number in range(count):
        name = " ".join(str(names.get(str(number), number)).split())
        if not name or name in captions:
            ledger.add("replaced", "a name of several classes, with its number behind", name)
            name = f"{name} ({number})".strip()
        captions[name] = number
    return tuple(captions)
