"""Small pipelines of diffusers' with seeded weights, none of them zero, and the door that takes them in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peers
import tiny
import torch
from torch import Tensor, nn

from ldm.noise import Noise
from training.models.assembly import HashedPipeline

diffusers = peers.diffusers
WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "red", "blue", "green", "circle", "square", "triangle", "the", "left"]
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
UNET: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 16,
    "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "sample_size": 8,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
PIXART: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "cross_attention_dim": 32,
    "sample_size": 8, "caption_channels": 16, "use_additional_conditions": False, "interpolation_scale": 1,
}  # fmt: skip
DIT: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
                       "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 5, "norm_eps": 1e-6}  # fmt: skip
PROMPTS = ["a red circle", "the blue square left"]
STEPS, SCALE = 8, 3.0
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def network(name: str, settings: dict[str, Any]) -> Any:
    """A network of diffusers' whose every weight counts: none is zero, and none at its initial size."""
    torch.manual_seed(0)
    made = getattr(diffusers, name)(**settings).eval()
    for key, parameter in made.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if key.endswith("weight") and parameter.ndim == 1 else 0.0, std=0.1)
    if name.startswith("DiT"):  # one embedder, as all that were published have
        first = made.transformer_blocks[0].norm1.emb.state_dict()
        for block in made.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return made


def tokenizer(length: int = 77) -> Any:
    """A tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **marks)


def clip(**changes: Any) -> Any:
    """CLIP's text half as Stable Diffusion stores it: without a projection."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": len(WORDS)}
    torch.manual_seed(1)
    return CLIPTextModel(CLIPTextConfig(**{**CLIP, **ids, "max_position_embeddings": 77, **changes})).eval()


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(1)
    return T5EncoderModel(
        T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()


def stable_diffusion(scheduler: Any = None, encoder: Any = None, vae: Any = None, **unet: Any) -> Any:
    """A StableDiffusionPipeline."""
    rule = scheduler or diffusers.DDIMScheduler(**TABLE, clip_sample=False, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        vae=vae or peers.kl(), text_encoder=encoder or clip(), tokenizer=tokenizer(), scheduler=rule,
        unet=network("UNet2DConditionModel", UNET | unet), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def pixart(scheduler: Any = None, kind: str = "PixArtSigmaPipeline", **transformer: Any) -> Any:
    """A PixArt pipeline."""
    rule = scheduler or diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return getattr(diffusers, kind)(
        vae=peers.kl(), text_encoder=t5(), tokenizer=tokenizer(300), scheduler=rule,
        transformer=network("PixArtTransformer2DModel", PIXART | transformer),
    )  # fmt: skip


def convert(source: object, output: Path, *words: object, verb: str = "import") -> Path:
    """scripts/convert_denoiser.py; returns `output`."""
    assert tiny.call("convert_denoiser", verb, source, "--output", output, *words) == 0
    return output


def noise(pipeline: HashedPipeline, size: tuple[int, int] = (16, 16)) -> Tensor:
    """What ours begins with for seeds 0 and 1."""
    return Noise.from_seeds([0, 1]).normal(pipeline.latent_shape(size), "prior")


@torch.no_grad()
def ours(pipeline: HashedPipeline, scale: float = SCALE, prompts: list[str] = PROMPTS,
         size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Two latents and their pictures (2, 3, H, W) in [0, 1]."""
    guidance = dataclasses.replace(pipeline.sampling.guidance, scale=scale)
    plan = dataclasses.replace(pipeline.sampling, steps=STEPS, guidance=guidance)
    shape = pipeline.latent_shape(size or pipeline.size)
    latents = pipeline.latents(pipeline.guided(prompts, plan=plan), Noise.from_seeds([0, 1]), shape, plan)
    return latents, (pipeline.decode(latents) / 2 + 0.5).clamp(0, 1)


def theirs(pipeline: Any, start: Tensor, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """The same of diffusers' pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    told: dict[str, Any] = {"use_resolution_binning": False} if "PixArt" in type(pipeline).__name__ else {}
    told |= {"num_inference_steps": STEPS, "guidance_scale": scale, "latents": start, "height": 16, "width": 16}
    latents = pipeline(PROMPTS, output_type="latent", **told).images
    with torch.no_grad():
        pictures = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return latents, pipeline.image_processor.postprocess(pictures, output_type="pt")


def frozen_encoder(folder: Path, seed: int) -> Path:
    """A tiny T5 encoder, as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=8, **shape)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "red": 2, "circle": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder
