"""A denoiser's run as a pipeline of diffusers': network, autoencoder, text encoder, tokenizer, scheduler and index.

What is written is opened again and compared with the run before it is called done; else nothing is left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.adapters.controlled import ControlConfig
from ldm.adapters.low_rank import LowRankConfig
from ldm.guiding import AgainstNull
from ldm.text import TextEncoder
from ldm.text.encoders import LabelEncoder
from ldm.text.huggingface import HuggingFaceTextEncoder
from training.errors import UserError
from training.exchange import single_file_export
from training.exchange.autoencoder_export import write_autoencoder
from training.exchange.autoencoders import VERSION
from training.exchange.denoiser_layouts import LAYOUTS
from training.exchange.denoiser_sources import DEFAULTS
from training.exchange.diffusers_weights import WEIGHTS
from training.exchange.export_limits import NULL_CLASS, PIPELINES, Facts, Obstacle, diffusers_class, obstacles, refuse
from training.exchange.layout import Network
from training.exchange.scheduler_export import scheduler
from training.exchange.single_file_export import reasons
from training.exchange.text_export import is_clip, lower_cases, save_text
from training.files import write_bytes, write_json
from training.guarding import make_folder
from training.messages import tell
from training.models.adapters import refuse_adapter
from training.models.assembly import HashedPipeline, load_pipeline
from training.models.folders import Found, find, whole_folder
from training.settings.decoding import AutoencoderConfig, DenoiserConfig, to_values
from training.tensors import save_tensors

Against = Callable[[DenoiserConfig, Facts], list[Obstacle]]
# Tokens that a call pads to unless told otherwise.
LENGTHS = {name: DEFAULTS[name][2] for name in ("PixArtAlphaPipeline", "PixArtSigmaPipeline")}
# Each network's folder, its part of the index, and the pipelines that have it.
HOMES = {"UNet2DConditionModel": "unet", "PixArtTransformer2DModel": "transformer",
         "DiTTransformer2DModel": "transformer"}  # fmt: skip


def export_denoiser(
    source: str, output: Path, text_encoder: str = "", single_file: str = "", graphs: Sequence[str] = ()
) -> None:
    """Write the run, checkpoint or exported model `source` as a folder that DiffusionPipeline.from_pretrained opens.

    `single_file`: the name of one file of Stable Diffusion's, written in its place; `graphs`: "pt2", "onnx" (see
    `training.exchange.graphs`). Raises UserError with every reason why a model cannot be held, and where what was
    written draws otherwise.
    """
    if single_file and (Path(single_file).name != single_file or not single_file.endswith(".safetensors")):
        hint = "it is written into --output, as is its .yaml"
        raise UserError(f"--single-file {single_file}: expected a name that ends in .safetensors", hint=hint)
    with whole_folder(output) as folder:
        if graphs:
            from training.exchange.graphs import write_graphs

            told = write_graphs(folder, opened(source, text_encoder).pipeline, graphs)
        elif single_file:
            told = _single_file(folder / single_file, opened(source, text_encoder, reasons, "Stable Diffusion's file"))
        else:
            told = _pipeline(folder, opened(source, text_encoder, obstacles, "diffusers"))
    tell(told)


def _pipeline(folder: Path, model: Opened) -> str:
    from training.exchange.export_check import compare

    make_folder(folder)
    write(folder, *model)
    return compare(folder, model.pipeline, model.config)


def _single_file(path: Path, model: Opened) -> str:
    from training.exchange.export_check import compare_file

    make_folder(path.parent)
    single_file_export.write(path, model.config, facts(model.found).model, model.pipeline)
    return compare_file(path, model.pipeline, model.config)


class Opened(NamedTuple):
    """A model on disk, its config, and its pipeline on the CPU in float32."""

    found: Found
    config: DenoiserConfig
    pipeline: HashedPipeline


def opened(source: str, text_encoder: str, against: Against | None = None, where: str = "") -> Opened:
    """A model, loaded. Raises UserError with all that is `against` it; what its config says, before it is loaded."""
    found = find(source, "denoiser")
    config = found.config()
    assert isinstance(config, DenoiserConfig)
    refuse_adapter(source, found, _instead(config))
    known = facts(found)
    if against and against(config, known._replace(lowers=True)):  # whatever its tokenizer does
        refuse(against(config, known), where)
    pipeline = load_pipeline(found.home if found.finished else found.weights, "cpu", text_encoder or None)
    if against:
        refuse(against(config, facts(found, pipeline.text)), where)
    return Opened(found, config, pipeline)


def _instead(config: DenoiserConfig) -> str:
    """What to export in the place of an adapter's run."""
    if isinstance(config.adapter, ControlConfig):
        return "a control is a network of its own beside the denoiser's: export the model that it was learned upon"
    alone = "; --lora kohya writes it alone" if isinstance(config.adapter, LowRankConfig) else ""
    hint = f"make one model of both, export_model BASE --adapter RUN --dtype float32, and export that{alone}"
    return hint


def facts(found: Found, text: TextEncoder | None = None) -> Facts:
    """What a model says beyond its config; of its loaded text encoder, if there is one, more."""
    inner = find(found.final / "autoencoder", "autoencoder").config()
    assert isinstance(inner, AutoencoderConfig)
    if isinstance(text, HuggingFaceTextEncoder):
        return Facts(inner.model, lowers=lower_cases(text), clip=is_clip(text))
    return Facts(inner.model, len(text.classes) if isinstance(text, LabelEncoder) else 0)


def write(folder: Path, found: Found, config: DenoiserConfig, pipeline: HashedPipeline) -> None:
    """All parts of a pipeline, and the index that names their classes."""
    name = diffusers_class(config)
    index: dict[str, Any] = {HOMES[name]: ["diffusers", name], "vae": ["diffusers", "AutoencoderKL"]}
    about, tensors = LAYOUTS[name].write(described(config, pipeline))
    _model(folder / HOMES[name], name, about, tensors)
    write_autoencoder(str(found.final / "autoencoder"), folder / "vae")
    kind, settings = scheduler(config)
    index["scheduler"] = ["diffusers", kind]
    _config(folder / "scheduler" / "scheduler_config.json", kind, settings)
    if isinstance(pipeline.text, HuggingFaceTextEncoder):
        index |= save_text(folder, pipeline.text, told=name == "UNet2DConditionModel")
    _config(folder / "model_index.json", pipeline_class(config), index | _rest(name, pipeline))
    card(folder, config, pipeline)


def pipeline_class(config: DenoiserConfig) -> str:
    """The pipeline that draws with a network. Of PixArt's two, which differ in the length of a prompt, the nearer."""
    name = diffusers_class(config)
    if name != "PixArtTransformer2DModel":
        return PIPELINES[name]
    return "PixArtAlphaPipeline" if config.text.length <= LENGTHS["PixArtAlphaPipeline"] else "PixArtSigmaPipeline"


def described(config: DenoiserConfig, pipeline: HashedPipeline) -> Network:
    """The network and what it was built for. Labels are filled up to as many as DiTPipeline counts, with the null."""
    backbone, text, labels = pipeline.denoiser.backbone, pipeline.text, None
    assert isinstance(backbone, torch.nn.Module)
    if isinstance(text, LabelEncoder):
        rows = text.embedding.weight.detach()
        labels = torch.cat([rows, rows[:1].expand(NULL_CLASS + 1 - len(rows), -1)])
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
    nothing = ("safety_checker", "feature_extractor", "image_encoder")
    return {part: [None, None] for part in nothing} | {"requires_safety_checker": False}


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
    scale = config.guidance.scale if isinstance(config.guidance, AgainstNull) else 1.0  # 1: no guidance
    words["guidance_scale"] = f"{scale:g}"
    height, width = config.sample.size
    name = pipeline_class(config)
    if name == "DiTPipeline":
        return {"class_labels": f"pipeline.get_label_ids([{text.classes[0]!r}])"} | words
    if height != width or name in LENGTHS:
        words |= {"height": str(height), "width": str(width)}
    if name in LENGTHS:  # else sizes become the nearest of PixArt's own, and captions are cleaned of what is no word
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
