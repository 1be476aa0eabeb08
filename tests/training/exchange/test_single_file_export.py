"""One file of Stable Diffusion's, held against diffusers' reader of such files and our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import portable
import pytest
import tiny
import torch
from peers import diffusers
from portable import CLIP, EPS
from safetensors.torch import load_file

from training.errors import UserError
from training.exchange import export_check
from training.exchange.denoiser_export import export_denoiser
from training.models.assembly import load_pipeline

UNET = {"kind": "unet", "channels": [32, 64], "blocks": 2, "attention": [1], "heads": 2}
KL = {"kind": "kl", "channels": [32, 64], "blocks": 1, "attention_at": [2]}
SD = {"backbone": UNET, "text": CLIP | {"length": 77}, **EPS}
SHAPES: dict[str, dict[str, Any]] = {
    "attention below": {},
    "attention above": {"backbone": UNET | {
        "channels": [64, 128], "attention": [0], "linear_projection": True, "head_dim": 64, "depth": 2}},
    "v, three levels": {"prediction": {"kind": "v"}, "backbone": UNET | {
        "channels": [32, 32, 64], "blocks": 1, "attention": [0, 1], "scale_shift": True}},
}  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return portable.encoder("clip", tmp_path_factory.mktemp("clip") / "clip", positions=77)


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_diffusers_reads_the_file(name: str, clip: Path, tmp_path: Path) -> None:
    """U-Net and autoencoder of the file answer as ours; its latents are times 0.18215, as such programs take them."""
    plain = KL | {"attention_at": []}  # of which diffusers' reader of files knows no other
    source = portable.run(tmp_path / "run", clip, plain, **SD | SHAPES[name])
    flags = ["--single-file", "model.safetensors"]
    assert tiny.call("convert_denoiser", "export", source, "--output", tmp_path / "out", *flags) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors", "model.yaml"]
    export_denoiser(str(source), tmp_path / "folder")
    pipeline, path = load_pipeline(source, "cpu"), tmp_path / "out" / "model.safetensors"
    given = {"config": str(tmp_path / "folder"), "local_files_only": True}
    with export_check.quiet(diffusers):
        unet = diffusers.UNet2DConditionModel.from_single_file(str(path), subfolder="unet", **given)
        vae = diffusers.AutoencoderKL.from_single_file(str(path), subfolder="vae", **given)
    x, levels, picture = export_check.probe(pipeline)
    cond = pipeline.text(export_check.captions(pipeline))
    wanted = pipeline.denoiser.backbone(x, levels, cond)
    torch.testing.assert_close(unet(x, levels, cond.context).sample, wanted, rtol=0, atol=1e-5)
    latents = pipeline.autoencoder.norm.mean_latents(pipeline.autoencoder.encode(picture))
    torch.testing.assert_close(vae.encode(picture).latent_dist.mean * 0.18215, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(x / 0.18215).sample, pipeline.autoencoder.decode(x), rtol=0, atol=1e-4)


def test_its_tensors_have_the_published_names(clip: Path, tmp_path: Path) -> None:
    """A sample of Stable Diffusion 1's, and no tensor outside its three parts."""
    source = portable.run(tmp_path / "run", clip, KL, **SD)
    export_denoiser(str(source), tmp_path / "out", single_file="sd.safetensors")
    tensors = load_file(tmp_path / "out" / "sd.safetensors")
    unet, vae, text = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
    assert all(key.startswith((unet, vae, text)) for key in tensors)
    for key in (f"{unet}input_blocks.0.0.weight", f"{unet}input_blocks.3.0.op.weight", f"{unet}time_embed.2.bias",
                f"{unet}middle_block.1.transformer_blocks.0.attn2.to_k.weight", f"{unet}output_blocks.2.2.conv.weight",
                f"{unet}input_blocks.4.0.skip_connection.weight", f"{unet}output_blocks.0.0.in_layers.2.weight",
                f"{unet}output_blocks.5.0.out_layers.3.weight", f"{unet}out.2.weight",
                f"{vae}encoder.down.1.attn.0.q.weight", f"{vae}encoder.mid.attn_1.proj_out.weight",
                f"{vae}decoder.up.1.upsample.conv.weight", f"{vae}encoder.down.0.downsample.conv.weight",
                f"{vae}decoder.norm_out.weight", f"{vae}quant_conv.weight", f"{text}final_layer_norm.weight",
                f"{text}embeddings.position_embedding.weight"):  # fmt: skip
        assert key in tensors, key
    assert tensors[f"{vae}encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)


def test_the_yaml_says_what_the_file_is(clip: Path, tmp_path: Path) -> None:
    source = portable.run(tmp_path / "run", clip, KL, **SD | SHAPES["v, three levels"])
    export_denoiser(str(source), tmp_path / "out", single_file="sd.safetensors")
    params = json.loads((tmp_path / "out" / "sd.yaml").read_text())["model"]["params"]
    assert (params["parameterization"], params["linear_start"], params["linear_end"]) == ("v", 0.00085, 0.012)
    unet, first = (params[part]["params"] for part in ("unet_config", "first_stage_config"))
    assert (unet["model_channels"], unet["channel_mult"], unet["num_res_blocks"]) == (32, [1, 1, 2], 1)
    assert (unet["attention_resolutions"], unet["num_heads"], unet["context_dim"]) == ([1, 2], 2, 16)
    assert unet["use_scale_shift_norm"] and not unet["use_linear_in_transformer"]
    assert (first["ddconfig"]["ch_mult"], first["ddconfig"]["attn_resolutions"]) == ([1, 2], [8])


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "groups": ({"backbone": UNET | {"groups": 8}}, ["backbone.groups"]),
    "widths": ({"backbone": UNET | {"channels": [64, 96]}}, ["backbone.channels"]),
    "heads": ({"backbone": UNET | {"head_dim": 32, "linear_projection": True}}, ["backbone.head_dim"]),
    "length": ({"text": CLIP}, ["text.length"]),
    "zero": ({"schedule": {"kind": "ddpm-scaled-linear", "zero_terminal_snr": True}, "prediction": {"kind": "v"}},
             ["schedule.kind"]),
    "x0": ({"prediction": {"kind": "x0"}}, ["prediction.kind"]),
    "variance": ({"backbone": UNET | {"learned_variance": True}}, ["backbone.learned_variance"]),
    "pixart": ({"backbone": portable.PIXART, "text": portable.T5}, ["backbone.kind"]),
    "older mask": ({"text": CLIP | {"length": 77, "mask_rule": 1}}, ["text.mask_rule"]),
    "all": ({"backbone": UNET | {"groups": 8, "position": True}, "schedule": {"kind": "flow"},
             "prediction": {"kind": "velocity"}},
            ["backbone.position", "backbone.groups", "schedule.kind"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_such_programs_do_not_build_is_named(name: str, clip: Path, tmp_path: Path) -> None:
    sections, keys = REFUSED[name]
    source = portable.run(tmp_path / "run", clip, KL, **SD | sections)
    with pytest.raises(UserError, match="Stable Diffusion's file cannot hold this model") as refused:
        export_denoiser(str(source), tmp_path / "out", single_file="sd.safetensors")
    assert [line.split(" = ")[0].strip() for line in refused.value.what.splitlines()[1:]] == keys
    assert not (tmp_path / "out").exists()


def test_another_text_encoder_and_autoencoder_are_named(tmp_path: Path) -> None:
    bert = portable.encoder("bert", tmp_path / "bert", positions=77)
    source = portable.run(tmp_path / "run", bert, portable.KL | {"mid_attention": False}, **SD)
    with pytest.raises(UserError) as refused:
        export_denoiser(str(source), tmp_path / "out", single_file="sd.safetensors")
    for key in ("model.groups (autoencoder) = 4", "model.mid_attention (autoencoder) = false"):
        assert key in refused.value.what
    source = portable.run(tmp_path / "second", bert, KL, **SD)
    with pytest.raises(UserError, match="its text encoder is CLIP's"):
        export_denoiser(str(source), tmp_path / "out", single_file="sd.safetensors")


@pytest.mark.parametrize("name", ["sd.ckpt", "models/sd.safetensors"])
def test_a_name_that_is_none(name: str, tmp_path: Path) -> None:
    problem = tiny.refused("convert_denoiser", "export", tmp_path, "--output", tmp_path / "out", "--single-file", name)
    assert "--single-file" in problem.what
