"""Autoencoders taken from and given to other programs, held against diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from training import config as configs
from training.runs import export, load_autoencoder

diffusers = pytest.importorskip("diffusers")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention at a level": {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
                             "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")},
    "as stable diffusion 3": {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.3,
                              "scaling_factor": 1.5, "latent_channels": 5, "layers_per_block": 2},
    "per channel": {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 4.0],
                    "mid_block_add_attention": False},
}  # fmt: skip


def theirs(**changes: Any) -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, **blocks}
    return diffusers.AutoencoderKL(**shape | changes).eval()


def convert(verb: str, source: object, output: Path) -> Path:
    assert tiny.call("convert_autoencoder", verb, source, "--output", output) == 0
    return output


def images() -> Tensor:
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("name", KLS)
def test_a_kl_folder_is_read(name: str, tmp_path: Path) -> None:
    """Moments, and the picture of normalised latents, to 1e-5; from the pipeline's folder too."""
    peer = theirs(**KLS[name])
    peer.save_pretrained(tmp_path / "vae")
    ours = load_autoencoder(convert("import", tmp_path / "vae", tmp_path / "ours"))
    posterior = peer.encode(images()).latent_dist
    torch.testing.assert_close(ours.encode(images()), posterior.parameters, **CLOSE)
    width, about = peer.config.latent_channels, KLS[name]
    shift = torch.tensor(about.get("latents_mean", [about.get("shift_factor", 0.0)] * width))[:, None, None]
    scale = torch.tensor(about.get("latents_std", [1 / about.get("scaling_factor", 0.18215)] * width))[:, None, None]
    latents = (posterior.mean - shift) / scale
    torch.testing.assert_close(ours.norm.mean_latents(ours.encode(images())), latents, **CLOSE)
    torch.testing.assert_close(ours.decode(latents), peer.decode(posterior.mean).sample, **CLOSE)
    again = load_autoencoder(convert("import", tmp_path, tmp_path / "again"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in ours.state_dict().items())


@torch.no_grad()
def test_a_vq_folder_is_read_and_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    peer = diffusers.VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, vq_embed_dim=2,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=32, scaling_factor=0.5,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(peer.quantize.embedding.weight, std=0.3)
    peer.save_pretrained(tmp_path / "theirs")
    ours = load_autoencoder(convert("import", tmp_path / "theirs", tmp_path / "ours"))
    back, outcome = diffusers.VQModel.from_pretrained(
        convert("export", tmp_path / "ours", tmp_path / "back"), output_loading_info=True
    )
    assert not any(outcome.values())
    assert back.config.scaling_factor == 0.5
    z = peer.encode(images()).latents
    torch.testing.assert_close(ours.encode(images()), z, **CLOSE)
    for model in (peer, back.eval()):
        torch.testing.assert_close(ours.decode(z * 0.5), model.decode(z).sample, **CLOSE)


def stored(home: Path, model: dict[str, Any]) -> tuple[Path, Autoencoder]:
    """A model folder of ours with seeded weights and a normaliser that does something."""
    config = configs.decode("autoencoder", {"model": model})
    torch.manual_seed(0)
    network = config.model.build()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    count = network.norm.shift.numel()
    network.norm.set_(torch.linspace(-1, 2, count), torch.linspace(0.5, 3, count))
    export(home, configs.to_values(config), network.state_dict(), "")
    return home, network.eval()


@torch.no_grad()
def test_a_kl_run_is_written_with_its_normaliser_folded_in(tmp_path: Path) -> None:
    """diffusers loads every key and nothing else; its latents are ours, normalised, and so is its posterior."""
    home, ours = stored(tmp_path / "ours", {"kind": "kl", "channels": [8, 16], "groups": 4, "attention_at": [2]})
    written = convert("export", home, tmp_path / "theirs")
    peer, outcome = diffusers.AutoencoderKL.from_pretrained(written, output_loading_info=True)
    assert not any(outcome.values())
    assert peer.config.scaling_factor == 1
    posterior, moments = peer.eval().encode(images()).latent_dist, ours.encode(images())
    latents = ours.norm.mean_latents(moments)
    torch.testing.assert_close(posterior.mean, latents, **CLOSE)
    spread = moments.chunk(2, dim=1)[1] - 2 * ours.norm.scale.log()
    torch.testing.assert_close(posterior.parameters.chunk(2, dim=1)[1], spread, **CLOSE)
    torch.testing.assert_close(peer.decode(latents).sample, ours.decode(latents), **CLOSE)
    back = load_autoencoder(convert("import", written, tmp_path / "back"))
    torch.testing.assert_close(back.decode(latents), ours.decode(latents), **CLOSE)


LDM_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "group_norm": "norm", "to_out.0": "proj_out"}


def in_ldm_names(tensors: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The other way round from what is tested, spelled out by hand."""
    swaps = [
        ("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."),
        ("mid_block.attentions.0.", "mid.attn_1."), ("conv_norm_out.", "norm_out."),
        ("conv_shortcut.", "nin_shortcut."),
    ]  # fmt: skip
    for i in range(levels):
        for half, at in (("down", i), ("up", levels - 1 - i)):
            swaps += [(f"{half}_blocks.{i}.resnets.", f"{half}.{at}.block."),
                      (f"{half}_blocks.{i}.attentions.", f"{half}.{at}.attn."),
                      (f"{half}_blocks.{i}.{half}samplers.0.", f"{half}.{at}.{half}sample.")]  # fmt: skip
    found = {}
    for key, value in tensors.items():
        for ours, ldm in swaps:
            key = key.replace(ours, ldm)
        if ".attn" in key:
            for ours, ldm in LDM_ATTENTION.items():
                key = key.replace(f".{ours}.", f".{ldm}.")
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[key] = value.contiguous()
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_single_file_of_ldms_is_read(kind: str, prefix: str, tmp_path: Path) -> None:
    """Named by hand as LDM does, with what else such files hold; diffusers' own converter gives the same."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from safetensors.torch import save_file

    # diffusers' converter leaves a level's attention by its old name: there only ours is asked
    own = {"codes": 16, "encoder_channels": 4, "attention_at": [4]} if kind == "vq" else {}
    model = {"kind": kind, "channels": [32, 32, 64], "blocks": 2, "latent_channels": 4}
    _, ours = stored(tmp_path / "ours", model | own)
    plain = {key: value for key, value in ours.state_dict().items() if not key.startswith("norm.")}
    if kind == "vq":
        plain = {key: value for key, value in plain.items() if "quantize." not in key or "embedding" in key}
    ldm = in_ldm_names(plain, 3)
    if kind == "kl":
        converted = convert_ldm_vae_checkpoint(dict(ldm), {"down_block_types": [""] * 3, "up_block_types": [""] * 3})
        assert converted.keys() == plain.keys()
        assert all(torch.equal(converted[key], value) for key, value in plain.items())
    others = {"scale_factor": torch.tensor(0.25), f"{prefix}loss.logvar": torch.zeros(1), "model.x": torch.ones(2)}
    save_file({f"{prefix}{key}": value for key, value in ldm.items()} | others, tmp_path / "a.safetensors")
    read = load_autoencoder(convert("import", tmp_path / "a.safetensors", tmp_path / "read")).state_dict()
    assert all(torch.equal(read[key], value) for key, value in plain.items())
    assert (read["norm.scale"] == 4).all() and (read["norm.shift"] == 0).all()


@torch.no_grad()
def test_a_tiny_and_a_deep_compression_folder_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds, scales = ("ResBlock", "ResBlock", "EfficientViTBlock"), ((), (), (5,))
    tiny_one = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "scaling_factor": 0.5,
                "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1), "latent_channels": 2}  # fmt: skip
    deep = {"encoder_block_types": kinds, "decoder_block_types": kinds, "encoder_block_out_channels": (8, 16, 32),
            "decoder_block_out_channels": (8, 16, 32), "encoder_layers_per_block": (0, 1, 2), "latent_channels": 4,
            "decoder_layers_per_block": (1, 1, 1), "encoder_qkv_multiscales": scales, "scaling_factor": 0.5,
            "decoder_qkv_multiscales": scales}  # fmt: skip
    for number, peer in enumerate((diffusers.AutoencoderTiny(**tiny_one), diffusers.AutoencoderDC(**deep))):
        peer.eval().save_pretrained(tmp_path / f"{number}")
        ours = load_autoencoder(convert("import", tmp_path / f"{number}", tmp_path / f"{number}-ours"))
        z = peer.encode(images())[0]
        torch.testing.assert_close(ours.encode(images()), z, **CLOSE)
        torch.testing.assert_close(ours.decode(z * 0.5), peer.decode(z).sample, **CLOSE)
    other = diffusers.AutoencoderDC(**deep | {"upsample_block_type": "interpolate"})
    other.save_pretrained(tmp_path / "other")
    said = str(tiny.refused("convert_autoencoder", "import", tmp_path / "other", "--output", tmp_path / "no"))
    assert "upsample_block_type = 'interpolate' has no counterpart" in said


def test_attention_of_old_files_is_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs().save_pretrained(tmp_path / "new")
    file = "diffusion_pytorch_model.safetensors"
    old = load_file(tmp_path / "new" / file)
    for ours, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        old = {key.replace(f".{ours}.", f".{before}."): value for key, value in old.items()}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    save_file(old, tmp_path / "old" / file)
    new, old = (load_autoencoder(convert("import", tmp_path / age, tmp_path / f"{age}-read")) for age in ("new", "old"))
    assert all(torch.equal(value, old.state_dict()[key]) for key, value in new.state_dict().items())


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    def refused(source: object) -> str:
        problem = tiny.refused("convert_autoencoder", "import", source, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(problem)

    theirs().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert "a pickle, which is not read" in refused(tmp_path / "pickled")
    (tmp_path / "renamed.safetensors").write_bytes(next((tmp_path / "pickled").glob("*.bin")).read_bytes())
    assert "pickle" in refused(tmp_path / "renamed.safetensors")
    theirs().save_pretrained(tmp_path / "odd")
    about = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(about | {"_class_name": "AutoencoderKLMagvit"}))
    assert "AutoencoderKLMagvit has no counterpart" in refused(tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text(json.dumps(about | {"block_out_channels": [8, 24]}))
    assert "does not fit its config" in refused(tmp_path / "odd")
    assert "no config.json" in refused(tmp_path)
    assert "no such file or folder" in refused("nothing")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    full = tiny.refused("convert_autoencoder", "import", "nothing", "--output", tmp_path / "out")
    assert "already exists" in str(full)
    home, _ = stored(tmp_path / "cosine", {"kind": "vq", "channels": [8], "groups": 4, "codes": 8, "normalize": True})
    assert "no class for a vq" in str(tiny.refused("convert_autoencoder", "export", home, "--output", tmp_path / "no"))
