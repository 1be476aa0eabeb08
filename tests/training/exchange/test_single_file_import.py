"""Single files of Stable Diffusion: LDM's names, shapes read off the tensors, the rest told or guessed aloud."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import donors
import peers
import pytest
import tiny
import torch
from donors import STEPS, convert, diffusers, noise, ours, theirs
from peers import in_ldm_names
from safetensors.torch import save_file
from torch import Tensor

from training.models.assembly import load_pipeline
from training.settings.decoding import load as load_config
from training.tensors import load_tensors

RESNET = {"norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.",
          "norm2.": "out_layers.0.", "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection."}  # fmt: skip
FIRST = {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
         "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
         "mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
         "mid_block.resnets.1.": "middle_block.2."}  # fmt: skip
SD1: dict[str, Any] = {
    "block_out_channels": (32, 64, 64), "layers_per_block": 2, "norm_num_groups": 32, "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SD2: dict[str, Any] = {
    "block_out_channels": (64, 128), "layers_per_block": 1, "norm_num_groups": 32, "attention_head_dim": (1, 2),
    "use_linear_projection": True, "transformer_layers_per_block": 2,
}  # fmt: skip


def unet_in_ldm_names(network: Any) -> dict[str, Tensor]:
    """The other way round from what is tested, by counting: three input blocks a level of two, say."""
    blocks, levels = network.config.layers_per_block, len(network.config.block_out_channels)
    attention = ["CrossAttn" in kind for kind in network.config.up_block_types]

    def renamed(key: str) -> str:
        for old, new in FIRST.items():
            key = re.sub(rf"^{re.escape(old)}", new, key)
        if part := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.", key):
            number = 1 + int(part[1]) * (blocks + 1) + (blocks if part[2] == "downsamplers" else int(part[3]))
            inner = {"resnets": "0.", "attentions": "1.", "downsamplers": "0."}[part[2]]
            rest = key[part.end() :].replace("conv.", "op.", part[2] == "downsamplers")
            key = f"input_blocks.{number}.{inner}{rest}"
        if part := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.", key):
            level = int(part[1])
            number = level * (blocks + 1) + (blocks if part[2] == "upsamplers" else int(part[3]))
            inner = {"resnets": "0.", "attentions": "1.", "upsamplers": "2." if attention[level] else "1."}[part[2]]
            key = f"output_blocks.{number}.{inner}" + key[part.end() :]
        if re.match(r"(input|output)_blocks\.\d+\.0\.|middle_block\.[02]\.", key):
            for old, new in RESNET.items():
                key = re.sub(rf"(?<=\.){re.escape(old)}(?=weight|bias)", new, key)
        return key

    assert levels == len(attention)
    return {renamed(key): value for key, value in network.state_dict().items()}


def single(pipeline: Any, path: Path, encoder: dict[str, Tensor] | None = None, **more: Tensor) -> Path:
    """A pipeline as one file of LDM's."""
    tensors = {f"model.diffusion_model.{key}": value for key, value in unet_in_ldm_names(pipeline.unet).items()}
    vae = in_ldm_names(pipeline.vae.state_dict(), 2)
    tensors |= {f"first_stage_model.{key}": value for key, value in vae.items()}
    if encoder is None:
        clip = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in pipeline.text_encoder.state_dict().items()}
        encoder = {f"cond_stage_model.transformer.{key}": value for key, value in clip.items()}
        encoder["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors |= encoder | more
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    return path


def vae() -> Any:
    """An autoencoder of 32 groups, as all of LDM's have."""
    return peers.kl(block_out_channels=(32, 64), norm_num_groups=32)


def given(home: Path, **changes: Any) -> Path:
    """A text encoder with other weights than the file's, and the tokenizer that no file holds."""
    other = donors.clip(**changes)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.save_pretrained(home)
    donors.tokenizer().save_pretrained(home)
    return home


def table(beta_min: float = 0.00085, beta_max: float = 0.012, root: float = 0.5) -> Tensor:
    betas = torch.linspace(beta_min**root, beta_max**root, 1000, dtype=torch.float64) ** (1 / root)
    return (1 - betas).cumprod(0).float()


def test_names_are_those_of_ldm() -> None:
    """The names that these tests give are LDM's: diffusers' own reader takes them."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    for settings in (SD1, SD2):
        network = donors.network("UNet2DConditionModel", donors.UNET | settings)
        ldm = {f"model.diffusion_model.{key}": value for key, value in unet_in_ldm_names(network).items()}
        read = convert_ldm_unet_checkpoint(ldm, dict(network.config))
        assert read.keys() == network.state_dict().keys()
        assert all(torch.equal(value, read[key]) for key, value in network.state_dict().items())


def test_stable_diffusion_1_draws_what_it_drew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All three networks are the file's; of the encoder that was given only the tokenizer is used."""
    scheduler = diffusers.DDIMScheduler(**donors.TABLE, clip_sample=False, timestep_spacing="trailing")
    pipeline = donors.stable_diffusion(scheduler, vae=vae(), **SD1)
    file = single(pipeline, tmp_path / "sd.safetensors", alphas_cumprod=table(), scale_factor=torch.tensor(0.18215))
    run = load_pipeline(convert(file, tmp_path / "ours", "--text-encoder", given(tmp_path / "clip")), "cpu")
    said = capsys.readouterr().err
    assert "guessed 1: 8 attention heads, as in Stable Diffusion 1 (--heads N says it)" in said
    assert "guessed 1: that the network predicts eps" in said and "ignored" not in said and said.count("guessed") == 2
    start = noise(run)
    got, drawn = ours(run, size=(16, 16))
    latents, pictures = theirs(pipeline, start)
    assert run.size == (128, 128) and STEPS == 8
    torch.testing.assert_close(drawn, pictures, atol=1e-3, rtol=0)
    torch.testing.assert_close(got / latents.std(), latents / latents.std(), atol=1e-3, rtol=0)


def openclip(encoder: Any) -> dict[str, Tensor]:
    """The weights of an encoder of two layers under OpenCLIP's names, with a third layer that is not read."""
    tensors = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    prefix, result = "cond_stage_model.model.", dict[str, Tensor]()
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for layer in (0, 1, 2):
        there, here = f"encoder.layers.{min(layer, 1)}.", f"{prefix}transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            joined = [tensors[f"{there}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            result[f"{here}attn.in_proj_{kind}"] = torch.cat(joined) + (layer == 2)
            result |= {f"{here}{new}.{kind}": tensors[f"{there}{old}.{kind}"] for old, new in parts.items()}
    ends = {"token_embedding.weight": "embeddings.token_embedding.weight", "ln_final.weight": "final_layer_norm.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
            "ln_final.bias": "final_layer_norm.bias"}  # fmt: skip
    result |= {prefix + new: tensors[old] for new, old in ends.items()}
    return result | {f"{prefix}text_projection": torch.eye(16), f"{prefix}logit_scale": torch.tensor(1.0)}


def test_stable_diffusion_2_with_openclip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """64 channels a head, v as it is said, and the last but one layer of OpenCLIP."""
    rule = {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    pipeline = donors.stable_diffusion(diffusers.DDIMScheduler(**donors.TABLE | rule), vae=vae(), **SD2)
    average = {f"model_ema.x{i}": torch.zeros(1) for i in range(3)}
    file = single(pipeline, tmp_path / "sd.safetensors", openclip(pipeline.text_encoder), **average)
    words = ["--text-encoder", given(tmp_path / "clip"), "--prediction", "v"]
    run = load_pipeline(convert(file, tmp_path / "ours", *words), "cpu")
    said = capsys.readouterr().err
    assert "64 channels an attention head" in said and "predicts" not in said and "ignored 3: tensors" in said
    got, _ = ours(run, size=(16, 16))
    latents, _ = theirs(pipeline, noise(run))
    torch.testing.assert_close(got / latents.std(), latents / latents.std(), atol=1e-3, rtol=0)


def test_a_file_of_the_unet_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it lacks is given: an autoencoder's run, and the encoder's own weights count then; its table is its own."""
    pipeline = donors.stable_diffusion(vae=vae(), **SD1)
    path, stored = tmp_path / "unet.safetensors", peers.stored(tmp_path / "ae", {"kind": "kl", "channels": [8, 16],
                                                                                 "groups": 4, "blocks": 1})  # fmt: skip
    tensors = {f"model.diffusion_model.{k}": v.contiguous() for k, v in unet_in_ldm_names(pipeline.unet).items()}
    save_file(tensors | {"alphas_cumprod": table(0.0001, 0.02, 1.0)}, path)
    words = ["--text-encoder", given(tmp_path / "clip"), "--autoencoder", stored[0], "--heads", 4]
    output = convert(path, tmp_path / "ours", *words)
    assert "replaced 1: the text encoder, which the file lacks" in capsys.readouterr().err
    config: Any = load_config("denoiser", str(output / "config.json"))
    assert config.schedule.kind == "ddpm-linear" and config.backbone.heads == 4
    assert [config.schedule.beta_min, config.schedule.beta_max] == pytest.approx([0.0001, 0.02], rel=1e-3)
    taken = load_tensors(output / "model.safetensors")
    assert all(torch.equal(value, taken[key]) for key, value in pipeline.unet.state_dict().items())
    problem = tiny.refused("convert_denoiser", "import", path, "--output", tmp_path / "no", *words[:2])
    assert "holds no autoencoder" in problem.what and "--autoencoder RUN" in problem.hint


def refusals(home: Path, file: Path) -> list[tuple[Path, list[object], str, str]]:
    """(file, further words, what is said, what its hint has)."""
    whole = load_tensors(file)

    def changed(name: str, **change: Tensor | None) -> Path:
        kept = {key: value for key, value in (whole | change).items() if value is not None}
        save_file(kept, home / name)
        return home / name

    unet, clip = "model.diffusion_model.", ["--text-encoder", home / "clip"]
    half = home / "half.safetensors"
    half.write_bytes(file.read_bytes()[:-1000])
    pickle = home / "model.ckpt"
    torch.save({"state_dict": {}}, pickle)
    short = given(home / "short", num_hidden_layers=1)
    xl = changed("xl", **{f"{unet}label_emb.0.0.weight": torch.zeros(8, 8)})
    odd = changed("odd", **{f"{unet}control.0.weight": torch.zeros(1)})
    lacking = changed("lacking", **{f"{unet}output_blocks.3.0.in_layers.0.bias": None})
    cut = changed("cut", **{f"{unet}out.2.weight": None})
    paint = changed("paint", **{f"{unet}input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)})
    curve = changed("curve", alphas_cumprod=torch.linspace(0.99, 0.01, 1000))
    vae = {key: value for key, value in whole.items() if key.startswith("first_stage")}
    save_file(vae, home / "vae.safetensors")
    return [
        (file, [], "holds no tokenizer", "--text-encoder NAME|DIR"),
        (file, ["--text-encoder", short], "is not of the shape of", "--text-encoder NAME|DIR"),
        (file, [*clip, "--heads", 0], "--heads: must be at least 1", ""),
        (file, [*clip, "--heads", 5], "cut level 0 (32 channels) into heads by 5", ""),
        (half, clip, "damaged", "download it again"), (pickle, clip, "refusing to load a pickle", "safetensors"),
        (xl, clip, "as in Stable Diffusion XL", "Stable Diffusion 1 and 2"),
        (odd, clip, "control.0.weight has no place", ""),
        (lacking, clip, "up_blocks.1.resnets.0.norm1.bias is missing", "complete"),
        (cut, clip, "not a whole U-Net", "complete"), (paint, clip, "9 channels in and 4 out", "inpainting"),
        (curve, clip, "table alphas_cumprod", "linear"),
        (home / "vae.safetensors", clip, "holds no denoiser", "model.diffusion_model"),
    ]  # fmt: skip


def test_refusals(tmp_path: Path) -> None:
    """Each a sentence with a next step, and nothing is left behind."""
    given(tmp_path / "clip")
    file = single(donors.stable_diffusion(vae=vae(), **SD1), tmp_path / "sd.safetensors")
    for source, words, what, hint in refusals(tmp_path, file):
        problem = tiny.refused("convert_denoiser", "import", source, "--output", tmp_path / "out", *words)
        assert what in problem.what and hint in problem.hint, (source, problem)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*")), source
