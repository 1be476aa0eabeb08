"""A denoiser's run as a pipeline of diffusers': network, autoencoder, text encoder, tokenizer, scheduler and index.

What is written is opened again and compared with the run before it is called done; else nothing is left of it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.text import TextEncoder
from ldm.text.encoders import LabelEncoder
from ldm.text.huggingface import HuggingFaceTextEncoder
from training.files import write_bytes, write_json
from training.guarding import make_folder
from training.messages import tell
from training.models.assembly import HashedPipeline, load_pipeline
from training.models.denoiser_layouts import LAYOUTS
from training.models.denoiser_limits import CLASSES, Facts, network, obstacles, refuse
from training.models.denoiser_schedulers import scheduler
from training.models.donor_weights import WEIGHTS
from training.models.exchange import VERSION, export_autoencoder
from training.models.folders import Found, find, whole_folder
from training.models.layout import Network
from training.settings.decoding import AutoencoderConfig, DenoiserConfig, to_values
from training.tensors import save_tensors

PROBE = " A Red CIRCLE above É "  # whether a tokenizer lower-cases
LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # tokens that a call pads to unless told otherwise
# Each network's folder, its part of the index, and the pipelines that have it.
HOMES = {"UNet2DConditionModel": "unet", "PixArtTransformer2DModel": "transformer",
         "DiTTransformer2DModel": "transformer"}  # fmt: skip


def export_denoiser(source: str, output: Path, text_encoder: str = "") -> None:
    """Write the run, checkpoint or exported model `source` as a folder that DiffusionPipeline.from_pretrained opens.

    Raises UserError with every reason why diffusers cannot hold it, and where what was written draws otherwise.
    """
    from training.models.denoiser_reopened import compare

    found, config, pipeline = opened(source, text_encoder)
    refuse(config, facts(found, pipeline.text))
    with whole_folder(output) as folder:
        write(folder, found, config, pipeline)
        told = compare(folder, pipeline, config)
    tell(told)


def opened(source: str, text_encoder: str) -> tuple[Found, DenoiserConfig, HashedPipeline]:
    """The model, and its pipeline on the CPU in float32. What its config rules out is refused before it is loaded."""
    found = find(source, "denoiser")
    config = found.config()
    assert isinstance(config, DenoiserConfig)
    known = facts(found)
    if obstacles(config, known._replace(lowers=True)):  # whatever its tokenizer does
        refuse(config, known)
    return found, config, load_pipeline(found.home if found.finished else found.weights, "cpu", text_encoder or None)


def facts(found: Found, text: TextEncoder | None = None) -> Facts:
    """What a model says beyond its config; of its loaded text encoder, if there is one, more."""
    inner = find(found.final / "autoencoder", "autoencoder").config()
    assert isinstance(inner, AutoencoderConfig)
    with torch.device("meta"):
        factor = inner.model.build().factor
    labels = len(text.classes) if isinstance(text, LabelEncoder) else 0
    lowers = False
    if isinstance(text, HuggingFaceTextEncoder):
        lowers = text.tokenizer(PROBE)["input_ids"] == text.tokenizer(PROBE.lower().strip())["input_ids"]
    return Facts(inner.model.kind, factor, labels, lowers)


def write(folder: Path, found: Found, config: DenoiserConfig, pipeline: HashedPipeline) -> None:
    """All parts of a pipeline, and the index that names their classes."""
    name = network(config)
    index: dict[str, Any] = {HOMES[name]: ["diffusers", name], "vae": ["diffusers", "AutoencoderKL"]}
    about, tensors = LAYOUTS[name].write(described(config, pipeline))
    _model(folder / HOMES[name], name, about, tensors)
    export_autoencoder(str(found.final / "autoencoder"), folder / "vae")
    kind, settings = scheduler(config)
    index["scheduler"] = ["diffusers", kind]
    _config(folder / "scheduler" / "scheduler_config.json", kind, settings)
    if isinstance(pipeline.text, HuggingFaceTextEncoder):
        index |= _text(folder, pipeline.text, told=name == "UNet2DConditionModel")
    _config(folder / "model_index.json", pipeline_class(config), index | _rest(name, pipeline))
    card(folder, config, pipeline)


def pipeline_class(config: DenoiserConfig) -> str:
    """The pipeline that draws with a network. Of PixArt's two, which differ in the length of a prompt, the nearer."""
    name = network(config)
    if name != "PixArtTransformer2DModel":
        return {"UNet2DConditionModel": "StableDiffusionPipeline", "DiTTransformer2DModel": "DiTPipeline"}[name]
    return "PixArtAlphaPipeline" if config.text.length <= LENGTHS["PixArtAlphaPipeline"] else "PixArtSigmaPipeline"


def described(config: DenoiserConfig, pipeline: HashedPipeline) -> Network:
    """The network and what it was built for. Labels are filled up to as many as DiTPipeline counts, with the null."""
    backbone, text, labels = pipeline.denoiser.backbone, pipeline.text, None
    assert isinstance(backbone, torch.nn.Module)
    if isinstance(text, LabelEncoder):
        rows = text.embedding.weight.detach()
        labels = torch.cat([rows, rows[:1].expand(CLASSES + 1 - len(rows), -1)])
    return Network(
        backbone=to_values(config)["backbone"],
        tensors={key: value.clone() for key, value in backbone.state_dict().items()},
        channels=pipeline.autoencoder.latent_channels,
        context_dim=text.context_dim,
        pooled_dim=text.pooled_dim,
        size=max(pipeline.latent_shape(pipeline.size)[1:]),
        labels=labels,
    )


def _rest(name: str, pipeline: HashedPipeline) -> dict[str, Any]:
    """What a pipeline's index says beside its parts."""
    if isinstance(pipeline.text, LabelEncoder):
        return {"id2label": {str(row): caption for row, caption in enumerate(pipeline.text.classes)}}
    if name != "UNet2DConditionModel":
        return {}
    nothing = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), [None, None])
    return nothing | {"requires_safety_checker": False}


def _text(folder: Path, encoder: HuggingFaceTextEncoder, *, told: bool) -> dict[str, list[str]]:
    """The frozen encoder and its tokenizer, which cuts prompts to the trained length. `told`: pipelines of U-Nets give
    the encoder its padding mask where its config says so, as the older rule of ours (`mask_rule` 1) does."""
    about: Any = copy.deepcopy(encoder.model.config)
    tensors, name = dict(encoder.model.state_dict()), type(encoder.model).__name__
    if name == "CLIPTextModelWithProjection":  # whose first answer is the pooled text; pipelines read the first
        tensors = {key: value for key, value in tensors.items() if key != "text_projection.weight"}
        name = "CLIPTextModel"
    about.architectures = [name]
    if told and encoder.config.mask_rule == 1:
        about.use_attention_mask = True
    home = folder / "text_encoder"
    make_folder(home)
    about.save_pretrained(home)
    save_tensors(home / "model.safetensors", _once(tensors))
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.model_max_length, tokenizer.padding_side = encoder.config.length, "right"
    tokenizer.save_pretrained(folder / "tokenizer")
    kind = type(tokenizer).__name__
    return {"text_encoder": ["transformers", name],
            # what transformers 5 calls the class of a tokenizer.json alone, 4 does not know
            "tokenizer": ["transformers", {"TokenizersBackend": "PreTrainedTokenizerFast"}.get(kind, kind)]}  # fmt: skip


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under the first of its names: what is tied is one, and transformers ties it again."""
    first: dict[int, str] = {}
    return {key: value for key, value in tensors.items() if first.setdefault(value.data_ptr(), key) == key}


def _config(path: Path, name: str, settings: dict[str, Any]) -> None:
    make_folder(path.parent)
    write_json(path, {"_class_name": name, "_diffusers_version": VERSION} | settings)


def _model(home: Path, name: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A network as diffusers' save_pretrained lays it out."""
    _config(home / "config.json", name, settings)
    save_tensors(home / WEIGHTS, tensors, {"format": "pt"})


def call(config: DenoiserConfig, text: Any) -> dict[str, str]:
    """What a call of the pipeline must be told to draw as the run does, as source text."""
    words = {"num_inference_steps": str(config.sample.steps)}
    if scale := getattr(config.guidance, "scale", None):
        words["guidance_scale"] = f"{scale:g}"
    height, width = config.sample.size
    name = pipeline_class(config)
    if name == "DiTPipeline":
        return {"class_labels": f"pipeline.get_label_ids([{text.classes[0]!r}])"} | words
    if height != width or name in LENGTHS:
        words |= {"height": str(height), "width": str(width)}
    if name in LENGTHS:  # else sizes are changed to the nearest of PixArt's own, and captions cleaned of what is no word
        words |= {"use_resolution_binning": "False", "clean_caption": "False"}
        words |= {"max_sequence_length": str(config.text.length)} if config.text.length != LENGTHS[name] else {}
    return {"prompt": '"a red bicycle"'} | words


def card(folder: Path, config: DenoiserConfig, pipeline: HashedPipeline) -> None:
    """README.md: how the folder is opened and called."""
    words = ", ".join(f"{key}={value}" for key, value in call(config, pipeline.text).items())
    text = f"""# A latent diffusion model, for diffusers

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH OF THIS FOLDER")
pipeline({words}).images[0].save("picture.png")
```

Written by latent-diffusion-from-scratch. Its run drew with the sampler {config.sampler.kind} on the grid
{config.grid.kind} and the guidance {config.guidance.kind}; scheduler/ holds the process that it was trained on.
"""
    write_bytes(folder / "README.md", text.encode())
