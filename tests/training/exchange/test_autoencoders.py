"""Autoencoders taken from other programs, held against diffusers' own classes."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import peers
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from peers import CLOSE, FILE, convert, images, in_ldm_names, stored
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoencoder.images import to_unit
from training.data.images import Images
from training.models.autoencoders import load_autoencoder
from training.shards.reading import ShardSet

KLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention at a level": {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
                             "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")},
    "as stable diffusion 3": {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.3,
                              "scaling_factor": 1.5, "latent_channels": 5, "layers_per_block": 2},
    "per channel": {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 4.0],
                    "mid_block_add_attention": False},
    "per channel and whole": {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 4.0],
                              "scaling_factor": 0.5},
    "a mean alone, which pipelines pass over": {"latents_mean": [0.1, -0.2, 0.3, 0.4]},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", KLS)
def test_a_kl_folder_is_read(name: str, tmp_path: Path) -> None:
    """Moments, latents as pipelines scale them, and their picture, to 1e-5; from the pipeline's folder too."""
    peer = peers.kl(**KLS[name])
    peer.save_pretrained(tmp_path / "vae")
    ours = load_autoencoder(convert("import", tmp_path / "vae", tmp_path / "ours"))
    posterior = peer.encode(images()).latent_dist
    torch.testing.assert_close(ours.encode(images()), posterior.parameters, **CLOSE)
    about, latents = peer.config, ours.norm.mean_latents(ours.encode(images()))
    if about.latents_mean and about.latents_std:
        mean, std = (torch.tensor(row).view(1, -1, 1, 1) for row in (about.latents_mean, about.latents_std))
        z = latents * std / about.scaling_factor + mean
    else:
        z = latents / about.scaling_factor + (about.shift_factor or 0.0)
    torch.testing.assert_close(z, posterior.mean, **CLOSE)
    torch.testing.assert_close(ours.decode(latents), peer.decode(z).sample, **CLOSE)
    again = load_autoencoder(convert("import", tmp_path, tmp_path / "again"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in ours.state_dict().items())


@torch.no_grad()
def test_a_vq_folder_is_read(tmp_path: Path) -> None:
    peer = peers.vq()
    peer.save_pretrained(tmp_path / "theirs")
    ours = load_autoencoder(convert("import", tmp_path / "theirs", tmp_path / "ours"))
    z = peer.encode(images()).latents
    torch.testing.assert_close(ours.encode(images()), z, **CLOSE)
    torch.testing.assert_close(ours.decode(z * 0.5), peer.decode(z).sample, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_single_file_of_ldms_is_read(kind: str, prefix: str, tmp_path: Path) -> None:
    """Named by hand as LDM does, with what else such files hold; diffusers' own converter gives the same."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

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


DEEP: dict[str, dict[str, Any]] = {
    "as the default here": {},
    "as sana": {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"},
    "as in ImageNet's": {"encoder_layers_per_block": (0, 2, 1), "decoder_layers_per_block": (0, 2, 1),
                         "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
                         "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
                         "encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ()),
                         "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
                         "decoder_act_fns": ("relu", "relu", "silu")},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", *DEEP])
def test_a_tiny_and_a_deep_compression_folder_are_read(name: str, tmp_path: Path) -> None:
    peer = peers.small() if name == "tiny" else peers.deep(**DEEP[name])
    peer.save_pretrained(tmp_path / "theirs")
    ours = load_autoencoder(convert("import", tmp_path / "theirs", tmp_path / "ours"))
    z = peer.encode(images())[0]
    torch.testing.assert_close(ours.encode(images()), z, **CLOSE)
    torch.testing.assert_close(ours.decode(z * 0.5), peer.decode(z).sample, **CLOSE)


def test_attention_of_old_files_is_read(tmp_path: Path) -> None:
    peers.kl().save_pretrained(tmp_path / "new")
    old = load_file(tmp_path / "new" / FILE)
    for ours, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        old = {key.replace(f".{ours}.", f".{before}."): value for key, value in old.items()}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    save_file(old, tmp_path / "old" / FILE)
    new, old = (load_autoencoder(convert("import", tmp_path / age, tmp_path / f"{age}-read")) for age in ("new", "old"))
    assert all(torch.equal(value, old.state_dict()[key]) for key, value in new.state_dict().items())


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    def refused(source: object) -> str:
        problem = tiny.refused("convert_autoencoder", "import", source, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(problem)

    peers.kl().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert "a pickle, which is not read" in refused(tmp_path / "pickled")
    (tmp_path / "renamed.safetensors").write_bytes(next((tmp_path / "pickled").glob("*.bin")).read_bytes())
    assert "pickle" in refused(tmp_path / "renamed.safetensors")
    peers.kl().save_pretrained(tmp_path / "odd")
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each class, by its kind here."""
    home = tmp_path_factory.mktemp("saved")
    for kind, build in {"kl": peers.kl, "vq": peers.vq, "tiny": peers.small, "dc": peers.deep}.items():
        build().save_pretrained(home / kind)
    return home


def changed(folder: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A copy with other settings; those that are None left out."""
    shutil.copytree(folder, target)
    about = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({key: value for key, value in about.items() if value is not None}))
    return target


TWO_SCALES = {f"{half}_qkv_multiscales": [[], [5], [3]] for half in ("encoder", "decoder")}


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("kl", {"act_fn": "relu"}, "act_fn = 'relu' has no counterpart"),
        ("kl", {"down_block_types": ["DownEncoderBlock2D", "Odd"]}, "Odd has no counterpart"),
        ("kl", {"scaling_factor": 0}, "not the settings of AutoencoderKL (ZeroDivisionError"),
        ("kl", {"scaling_factor": -1.0}, "the scale positive"),
        ("kl", {"block_out_channels": None}, "not the settings of AutoencoderKL (KeyError: 'block_out_channels')"),
        ("vq", {"act_fn": "relu"}, "act_fn = 'relu' has no counterpart"),
        ("vq", {"lookup_from_codebook": True}, "lookup_from_codebook = True has no counterpart"),
        ("vq", {"norm_type": "spatial"}, "norm_type = 'spatial' has no counterpart"),
        ("tiny", {"act_fn": "silu"}, "act_fn = 'silu' has no counterpart"),
        ("tiny", {"upsample_fn": "bilinear"}, "upsample_fn = 'bilinear' has no counterpart"),
        ("tiny", {"shift_factor": 0.1}, "shift_factor = 0.1 has no counterpart"),
        ("tiny", {"latent_magnitude": 2}, "latent_magnitude = 2 has no counterpart"),
        ("tiny", {"decoder_block_out_channels": [8, 16]}, "a network of widths [8, 16] has no counterpart"),
        ("dc", {"encoder_out_shortcut": False}, "encoder_out_shortcut = False has no counterpart"),
        ("dc", {"decoder_in_shortcut": False}, "decoder_in_shortcut = False has no counterpart"),
        ("dc", {"decoder_conv_act_fn": "silu"}, "decoder_conv_act_fn = 'silu' has no counterpart"),
        ("dc", {"attention_head_dim": 16}, "attention_head_dim = 16 has no counterpart"),
        ("dc", {"decoder_act_fns": ["gelu", "silu", "silu"]}, "decoder_act_fns 'gelu' has no counterpart"),
        ("dc", {"decoder_norm_types": "batch_norm", "decoder_act_fns": "relu"}, "'relu' and attention has no"),
        ("dc", {"upsample_block_type": "interpolate"}, "with upsample_block_type = 'interpolate' has no counterpart"),
        ("dc", {"decoder_qkv_multiscales": [[], [5], []]}, "decoder_qkv_multiscales = [[], [5], []] has no"),
        ("dc", TWO_SCALES, "encoder_qkv_multiscales = [[], [5], [3]] has no counterpart"),
    ],
)
def test_settings_of_other_networks_are_refused(
    kind: str, changes: dict[str, Any], said: str, saved: Path, tmp_path: Path
) -> None:
    """Most have no parameters: what ignored them would load, and draw something else."""
    folder = changed(saved / kind, tmp_path / "odd", changes)
    problem = tiny.refused("convert_autoencoder", "import", folder, "--output", tmp_path / "out")
    assert said in str(problem) and problem.code == 4 and not (tmp_path / "out").exists()


def test_a_name_of_the_hub_is_read(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def downloaded(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/something"
        asked.append(allow_patterns)
        return str(saved / "kl")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", downloaded)
        named = load_autoencoder(convert("import", "someone/something", tmp_path / "named")).state_dict()
    read = load_autoencoder(convert("import", saved / "kl", tmp_path / "read")).state_dict()
    assert all(torch.equal(value, read[key]) for key, value in named.items())
    (patterns,) = asked
    for path in ("config.json", FILE, "vae/config.json", f"vae/{FILE}", f"vqvae/{FILE}"):
        assert any(fnmatch(path, pattern) for pattern in patterns), path
    for path in (f"unet/{FILE}", "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.bin"):
        assert not any(fnmatch(path, pattern) for pattern in patterns), path
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    problem = tiny.refused("convert_autoencoder", "import", "someone/something", "--output", tmp_path / "out")
    assert "someone/something could not be downloaded from the Hugging Face hub" in str(problem) and problem.code == 4
    assert "give their folder" in problem.hint


@torch.no_grad()
def test_a_scale_that_is_not_stated_is_told_given_or_measured(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, ours = stored(tmp_path / "ours", {"kind": "kl", "channels": [32, 32], "blocks": 1, "latent_channels": 2})
    plain = {key: value for key, value in ours.state_dict().items() if not key.startswith("norm.")}
    file = tmp_path / "a.safetensors"
    save_file(in_ldm_names(plain, 2), file)

    def norm(name: str, *words: object) -> tuple[Tensor, Tensor, str]:
        capsys.readouterr()
        read = load_autoencoder(convert("import", file, tmp_path / name, *words)).norm
        return read.shift, read.scale, capsys.readouterr().err

    shift, scale, said = norm("assumed")
    assert not shift.any() and (scale == torch.tensor(1 / 0.18215)).all()
    assert said.count("note:") == 1 and "0.18215 is assumed" in said and "--data" in said
    shift, scale, said = norm("given", "--scale-factor", 0.25)
    assert not shift.any() and (scale == 4).all() and "note:" not in said
    shift, scale, said = norm("measured", "--data", shapes)
    dataset = Images(ShardSet(shapes))
    batches = dataset.chunks(range(len(dataset)), 16)
    mean, logvar = torch.cat([ours.encode(to_unit(batch.data)) for batch in batches]).double().chunk(2, 1)
    torch.testing.assert_close(shift.flatten().double(), mean.mean((0, 2, 3)), **CLOSE)
    variance = mean.var((0, 2, 3), correction=0) + logvar.clamp(-30, 20).exp().mean((0, 2, 3))
    torch.testing.assert_close(scale.flatten().double(), variance.sqrt(), atol=1e-5, rtol=1e-4)
    assert "note:" not in said and f"{len(dataset)} pictures" in said


def test_a_folder_that_states_no_scale_says_so(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, assumed in {"kl": 0.18215, "vq": 0.18215, "tiny": 1.0, "dc": 1.0}.items():
        folder = changed(saved / kind, tmp_path / kind, {"scaling_factor": None})
        scale = load_autoencoder(convert("import", folder, tmp_path / f"{kind}-read")).norm.scale
        assert f"scaling_factor {assumed:g} is assumed" in capsys.readouterr().err
        assert (scale == torch.tensor(1 / assumed)).all()


def test_flags_that_contradict_are_refused(saved: Path, shapes: Path, tmp_path: Path) -> None:
    def refused(verb: str, *words: object) -> str:
        problem = tiny.refused("convert_autoencoder", verb, saved / "kl", "--output", tmp_path / "out", *words)
        assert problem.code == 2 and not (tmp_path / "out").exists()
        return str(problem)

    assert "measures what --scale-factor states" in refused("import", "--data", shapes, "--scale-factor", 1)
    for number in (0, -1, "inf", "nan"):
        assert "--scale-factor: must be above 0" in refused("import", "--scale-factor", number)
    assert "belong to import" in refused("export", "--data", shapes)
    assert "belong to import" in refused("export", "--scale-factor", 1)


def forms(whole: Path, home: Path) -> dict[str, Path]:
    """The same autoencoder in the ways that people have it: what is given to `import`, by name."""
    vae = AutoencoderKL.from_pretrained(whole)
    vae.save_pretrained(home / "sharded", max_shard_size="10KB")
    shutil.copytree(home / "sharded", home / "variant-sharded")
    for path in sorted((home / "variant-sharded").glob("diffusion*")):
        name = path.name.replace("index.json", "index.fp16.json").replace("model-0", "model.fp16-0")
        path.rename(path.with_name(name))
    index = home / "variant-sharded" / f"{FILE}.index.fp16.json"
    index.write_text(index.read_text().replace("model-0", "model.fp16-0"))
    for name, file in {"variant": "diffusion_pytorch_model.fp16.safetensors", "bare": "my_vae.safetensors"}.items():
        (home / name).mkdir()
        shutil.copyfile(whole / "config.json", home / name / "config.json")
        shutil.copyfile(whole / FILE, home / name / file)
    shard = next((home / "sharded").glob("*-of-*"))
    files = {"file": home / "bare" / "my_vae.safetensors", "index": home / "sharded" / f"{FILE}.index.json"}
    return {**{p.name: p for p in home.iterdir()}, **files, "shard": shard}


def test_files_as_people_have_them(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Variants, shards, bare files beside their config.json, and each of the files by name: the same weights."""
    wanted = load_autoencoder(convert("import", saved / "kl", tmp_path / "wanted")).state_dict()
    given = forms(saved / "kl", tmp_path / "forms")
    assert len(given) == 7 and len(list((tmp_path / "forms" / "sharded").glob("*-of-*"))) > 2
    for name, source in given.items():
        found = load_autoencoder(convert("import", source, tmp_path / f"read-{name}")).state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(wanted[key], found[key]) for key in found), name
    assert "fp16.safetensors is read" in capsys.readouterr().err


def test_half_precision_is_read_as_float32(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "kl", tmp_path / "half")
    tensors = {key: value.half() for key, value in load_file(saved / "kl" / FILE).items()}
    (tmp_path / "half" / FILE).unlink()
    save_file(tensors, tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    found = load_autoencoder(convert("import", tmp_path / "half", tmp_path / "out")).state_dict()
    assert {value.dtype for value in found.values()} == {torch.float32}
    key = "encoder.conv_in.weight"
    assert torch.equal(found[key], tensors[key].float())


def test_what_of_files_is_missing_is_told(saved: Path, tmp_path: Path) -> None:
    """One sentence each, whose hint works: what is safetensors already is not to be saved as safetensors."""
    given = forms(saved / "kl", tmp_path / "forms")

    def refused(source: Path) -> tuple[str, str]:
        problem = tiny.refused("convert_autoencoder", "import", source, "--output", tmp_path / "out")
        assert problem.code == 4 and not (tmp_path / "out").exists() and "safe_serialization" not in problem.hint
        return problem.what, problem.hint

    (tmp_path / "forms" / "bare" / "config.json").rename(tmp_path / "config.json")
    what, hint = refused(given["file"])
    assert "no config.json beside it" in what and "config.json" in hint
    (tmp_path / "config.json").rename(tmp_path / "forms" / "bare" / "config.json")  # the hint, followed
    convert("import", given["file"], tmp_path / "followed")
    shutil.copyfile(given["file"], tmp_path / "forms" / "bare" / "other.safetensors")
    what, hint = refused(given["bare"])
    assert "my_vae.safetensors and other.safetensors" in what
    assert hint == "leave one of them in the folder, and move other.safetensors elsewhere"
    (tmp_path / "forms" / "bare" / "other.safetensors").unlink()
    convert("import", given["bare"], tmp_path / "chosen")
    given["shard"].rename(tmp_path / "gone")
    assert given["shard"].name in refused(given["sharded"])[0]
    (tmp_path / "gone").rename(given["shard"])
    index = given["index"]
    whole = json.loads(index.read_text())
    for places in ({"a": "../x.safetensors"}, {"a": 3}, {"a": str(given["file"])}, [], None):
        index.write_text(json.dumps(whole | {"weight_map": places}))
        assert index.name in refused(given["sharded"])[0]
    index.write_text(json.dumps(whole | {"weight_map": whole["weight_map"] | {"more": given["shard"].name}}))
    assert "more is not in" in refused(given["sharded"])[0]
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "holds no autoencoder" in refused(tmp_path / "other.safetensors")[0]
    save_file({"encoder.down.0.block.0.conv1.weight": torch.zeros(1)}, tmp_path / "part.safetensors")
    assert "not a whole autoencoder of LDM's" in refused(tmp_path / "part.safetensors")[0]
