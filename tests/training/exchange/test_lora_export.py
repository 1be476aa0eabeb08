"""LoRA files of ours: what they change, read again, and by diffusers and PEFT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import portable
import pytest
import tiny
import torch
from lora import SETTINGS, STYLES, TEXT, WIDE, answer, dit, learned, unet, weights_by_hand
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.adapters.low_rank import DoRA, LoRA, LowRankConfig
from training.exchange import lora_export, unet_layout
from training.exchange.denoiser_layouts import LAYOUTS
from training.exchange.diffusers_weights import WEIGHTS
from training.exchange.layout import Network
from training.exchange.lora_export import written
from training.exchange.lora_files import layers, taken
from training.guarding import read_json
from training.models.adapters import keep_base
from training.models.assembly import load_pipeline
from training.models.folders import export
from training.settings import decoding

diffusers = pytest.importorskip("diffusers")


def changed(config: LowRankConfig, style: Any, path: Path, backbone: Any, other: Any, settings: Any) -> float:
    """The largest difference between an adapter at work, and its file read and laid upon the same base by hand."""
    adapter = learned(config, backbone)
    tensors, left = written(adapter.state_dict(), settings, config.scale, style)
    assert not left
    save_file(tensors, path)
    found, left = taken(path, layers(other), settings)
    assert not left and set(found) == {name.removeprefix("backbone.") for name, _ in adapter.deltas()}
    before = answer(other)
    weights_by_hand(found, other)
    adapter.attach(backbone, TEXT)
    assert (answer(backbone) - before).abs().max() > 0.1
    return float((answer(backbone) - answer(other)).abs().max())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_what_is_written_is_read_as_the_same_change(kind: Any, style: str, tmp_path: Path) -> None:
    config = kind(rank=3, alpha=7.5, targets=WIDE)
    assert changed(config, style, tmp_path / "lora.safetensors", unet(), unet(), SETTINGS) < 1e-4


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("conditioning", ["adaln-single", "adaln-zero"])
def test_fused_projections_come_apart_and_together(conditioning: Any, style: str, tmp_path: Path) -> None:
    for kind in (LoRA, DoRA):
        (backbone, config), (other, _) = (dit(conditioning=conditioning) for _ in range(2))
        adapter = kind(rank=3, alpha=7.5, targets=("*.attention.*", "*.cross.*", "*.mlp.*", "patch_embedding"))
        path = tmp_path / f"{kind.__name__}.safetensors"
        assert changed(adapter, style, path, backbone, other, vars(config)) < 1e-4
    found, _ = taken(path, layers(other), vars(config))
    assert len(found["blocks.0.attention.qkv"]["A"]) == 3  # the same A is kept once


def in_diffusers(backbone: Any) -> Any:
    """diffusers' U-Net of the same weights."""
    whole = SETTINGS | {"head_dim": 0, "linear_projection": False, "pooled": False, "scale_shift": False,
                        "position": False, "learned_variance": False}  # fmt: skip
    network = Network(backbone=whole, tensors=backbone.state_dict(), channels=4, context_dim=16)
    about, tensors = unet_layout.write(network)
    other = diffusers.UNet2DConditionModel(**about).eval()
    other.load_state_dict(tensors)
    return other


def theirs(other: Any, **more: Any) -> Tensor:
    """What diffusers' network answers where `lora.answer` has ours."""
    generator = torch.Generator().manual_seed(2)
    x, context = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, 16)))
    with torch.no_grad():
        told: Tensor = other(x, timestep=torch.tensor([10.0, 700.0]), encoder_hidden_states=context, **more).sample
    return told


@pytest.mark.parametrize("style", STYLES)
def test_diffusers_reads_the_same_change(style: Any, tmp_path: Path) -> None:
    """By its own converters of names, into its own U-Net: W + (alpha / r) B A there is our answer."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers as from_kohya
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft as to_peft

    backbone, config = unet(), LoRA(rank=3, alpha=7.5, targets=("*.to_?", "*.to_out.0", "*.proj_in", "*.ff.net.*"))
    other = in_diffusers(backbone)
    adapter = learned(config, backbone)
    file, _ = written(adapter.state_dict(), SETTINGS, config.scale, style)
    alphas: dict[str, float] = {}
    if style == "kohya":
        file, alphas = from_kohya(dict(file))
    peft = {key.removeprefix("unet.").replace(".processor", ""): value for key, value in to_peft(file).items()}
    for key in [key for key in peft if "lora_A" in key]:
        name = key.removesuffix(".lora_A.weight")
        down, up = peft.pop(key), peft.pop(f"{name}.lora_B.weight")
        scale = 1.0
        if alphas:
            assert set(alphas.values()) == {7.5}
            scale = 7.5 / len(down)
        weight = other.get_submodule(name).weight
        weight.data += scale * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    assert not peft
    adapter.attach(backbone, TEXT)
    assert (theirs(other) - answer(backbone)).abs().max() < 1e-4


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_diffusers_loads_it_by_peft(kind: Any, style: Any, tmp_path: Path) -> None:
    """Linear layers and convolutions; of DoRA by kohya's names it leaves out the lengths."""
    pytest.importorskip("peft")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    backbone, config = unet(), kind(rank=3, alpha=7.5, targets=WIDE)
    other, adapter = in_diffusers(backbone), learned(config, backbone)
    save_file(written(adapter.state_dict(), SETTINGS, config.scale, style)[0], path := tmp_path / "lora.safetensors")
    state, alphas, told = Loader.lora_state_dict(str(path), unet_config=other.config, return_lora_metadata=True)
    Loader.load_lora_into_unet(state, alphas, other, metadata=told)
    adapter.attach(backbone, TEXT)
    apart = (theirs(other) - answer(backbone)).abs().max()
    assert apart > 0.1 if (kind, style) == (DoRA, "kohya") else apart < 1e-4


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_peft_loads_it_into_networks_that_diffusers_loads_none_into(kind: Any, tmp_path: Path) -> None:
    """As docs/adapters.md has it, word for word."""
    own = {"mlp": "gelu-tanh", "conditioning": "adaln-single", "cross_norm": False, "pooled": False}
    backbone, about = dit(**own)
    network = Network(backbone=vars(about), tensors=backbone.state_dict(), channels=4, context_dim=16, size=8)
    settings, tensors = LAYOUTS["PixArtTransformer2DModel"].write(network)
    other = diffusers.PixArtTransformer2DModel(**settings).eval()
    other.load_state_dict(tensors)
    for name in ("PixArtTransformer2DModel", "DiTTransformer2DModel"):
        assert not hasattr(getattr(diffusers, name), "load_lora_adapter")  # else tell_limits is wrong
    pytest.importorskip("peft")
    config = kind(rank=3, alpha=7.5, targets=("*.attention.*", "*.cross.*", "*.mlp.*", "patch_embedding"))
    adapter = learned(config, backbone)
    file, _ = written(adapter.state_dict(), vars(about), config.scale, "diffusers")
    save_file(file, tmp_path / "lora.safetensors")
    docs = (tiny.ROOT / "docs" / "adapters.md").read_text("utf-8").split("```python\n")
    (code,) = [part.split("```")[0] for part in docs if "inject_adapter_in_model" in part]
    code = code.replace('"lora.safetensors"', repr(str(tmp_path / "lora.safetensors")))
    exec(code, {"pipeline": type("Pipeline", (), {"transformer": other})})
    adapter.attach(backbone, TEXT)
    size = {"resolution": None, "aspect_ratio": None}
    told = theirs(other, encoder_attention_mask=torch.ones(2, 5), added_cond_kwargs=size)
    assert (told - answer(backbone)).abs().max() < 1e-4


def test_lengths_are_of_the_shape_that_each_program_multiplies_by() -> None:
    config = DoRA(rank=2, targets=("conv_in", "*.to_q"))
    parts = learned(config, unet()).state_dict()
    for style, end, conv, linear in (
        ("diffusers", "lora_magnitude_vector", (1, 32, 1, 1), (32,)), ("kohya", "dora_scale", (32, 1, 1, 1), (32, 1)),
    ):  # fmt: skip
        file, _ = written(parts, SETTINGS, config.scale, style)  # type: ignore[arg-type]
        shapes = {name: tuple(value.shape) for name, value in file.items() if name.endswith(end)}
        assert {shape for name, shape in shapes.items() if "conv_in" in name} == {conv}
        assert linear in {shape for name, shape in shapes.items() if "conv_in" not in name}


def run_of(home: Path, config: Any, backbone: Any, settings: dict[str, Any]) -> Path:
    """The finished run of an adapter that has learned something; of its base nothing is needed."""
    values = {"backbone": settings, "adapter": vars(config), "format": {"version": 3}}
    whole = decoding.to_values(decoding.decode_stored("denoiser", values))
    export(home / "final", whole, learned(config, backbone).state_dict(), {})
    return home


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_what_is_written_is_read_again_and_compared(
    kind: Any, style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path / "run", kind(rank=3, alpha=7.5, rank_stabilised=True, targets=WIDE), unet(), SETTINGS)
    out = tmp_path / "lora.safetensors"
    command = ("convert_denoiser", "export", run, "--lora", style, "--output", out)
    assert tiny.call(*command) == 0
    said = capsys.readouterr().err
    (worst,) = re.findall(r"read again by our own import: 66 layers, largest difference of a change (\S+)\n", said)
    assert 0 <= float(worst) < 1e-6
    assert ("note: diffusers leaves out the lengths" in said) == (kind is DoRA and style == "kohya")
    assert "loads no LoRA" not in said
    out.unlink()
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 1}')  # a kohya file says its own alpha
    if style == "diffusers":
        problem = tiny.refused(*command)
        assert "changes layers otherwise" in problem.what and "take the adapter_config.json beside" in problem.hint
        (tmp_path / "adapter_config.json").unlink()  # the hint, followed
    assert tiny.call(*command) == 0
    out.unlink()
    named = lora_export._named
    for wrong in (
        lambda name, part, *rest: named(name, {**part, "B": 1.001 * part["B"]}, *rest),
        lambda name, part, *rest: named(name, {**part, "m": 1.001 * part["m"]}, *rest),
        lambda name, *rest: {} if name == "conv_in" else named(name, *rest),
        lambda name, part, *rest: named(name, {**part, "A": torch.nan * part["A"]}, *rest),
    )[:: 2 if kind is LoRA else 1]:  # LoRA has no lengths
        monkeypatch.setattr(lora_export, "_named", wrong)
        problem = tiny.refused(*command)
        assert "changes layers otherwise than the adapter (largest difference: " in problem.what and problem.code == 4
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "adapter_config.json"}


def test_an_adapter_that_has_learned_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, backbone = LoRA(rank=2), unet()
    run = run_of(tmp_path / "run", config, backbone, SETTINGS)
    whole = decoding.to_values(decoding.decode_stored("denoiser", read_json(run / "final" / "config.json")))
    export(run / "final", whole, config.build(backbone, TEXT).state_dict(), {})
    assert tiny.call("convert_denoiser", "export", run, "--lora", "kohya", "--output", tmp_path / "out") == 0
    assert "largest difference of a change 0\n" in capsys.readouterr().err


@pytest.mark.parametrize("style", STYLES)
def test_what_diffusers_cannot_load_is_told(style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone, about = dit(conditioning="adaln-single")
    run = run_of(tmp_path / "run", LoRA(rank=3), backbone, vars(about))
    assert tiny.call("convert_denoiser", "export", run, "--lora", style, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "note: diffusers loads no LoRA into its DiT and PixArt networks" in said
    assert ("PEFT does" in said) == (style == "diffusers") and "export_model BASE --adapter RUN" in said


def test_an_adapter_of_the_text_encoder_alone_is_refused(tmp_path: Path) -> None:
    values = {"backbone": SETTINGS, "adapter": vars(LoRA(targets=(), text=("*",))), "format": {"version": 3}}
    whole = decoding.to_values(decoding.decode_stored("denoiser", values))
    export(tmp_path / "run" / "final", whole, {"text.layers.0.out.A": torch.ones(1, 4)}, {})
    out = tmp_path / "out"
    problem = tiny.refused("convert_denoiser", "export", tmp_path / "run", "--lora", "kohya", "--output", out)
    assert "changes nothing but a text encoder" in problem.what and problem.code == 4 and not out.exists()


def test_one_model_of_both_is_exported(tmp_path: Path) -> None:
    """What the refusal of an adapter's run proposes, and the note of a DiT's file; compared by diffusers."""
    own = {"backbone": portable.PIXART, "text": portable.T5, **portable.EPS}
    portable.run(base := tmp_path / "base", portable.encoder("t5", tmp_path / "t5"), **own)
    backbone: Any = load_pipeline(base / "final", "cpu").denoiser.backbone
    config = LoRA(rank=2, alpha=5.0)
    tensors, _ = written(learned(config, backbone).state_dict(), portable.PIXART | {"patch": 2}, config.scale, "kohya")
    save_file(tensors, tmp_path / "lora.safetensors")
    run, model, out = (tmp_path / name for name in ("run", "model", "out"))
    assert tiny.call("convert_denoiser", "import", tmp_path / "lora.safetensors", "--base", base, "--output", run) == 0
    problem = tiny.refused("convert_denoiser", "export", run, "--output", out)
    assert "is an adapter upon base" in problem.what
    assert "export_model BASE --adapter RUN --dtype float32, and export that" in problem.hint
    assert "--lora kohya writes it alone" in problem.hint and not out.exists()
    assert tiny.call("export_model", base, "--adapter", run, "--dtype", "float32", "--output", model) == 0
    assert tiny.call("convert_denoiser", "export", model, "--output", out) == 0
    plain, both = (load_file(folder / "transformer" / WEIGHTS) for folder in (export_of(base, tmp_path), out))
    changed = {name for name in plain if not torch.equal(plain[name], both[name])}
    assert changed == {f"transformer_blocks.{n}.attn{k}.to_{end}.weight" for n in (0, 1) for k in (1, 2)
                       for end in ("q", "k", "v", "out.0")}  # fmt: skip


def export_of(base: Path, home: Path) -> Path:
    assert tiny.call("convert_denoiser", "export", base, "--output", home / "plain") == 0
    return home / "plain"


def test_a_control_is_not_proposed_to_become_one_with_its_base(tmp_path: Path) -> None:
    adapter = {"kind": "controlnet", "hint_channels": 1, "factor": 4}
    whole = decoding.to_values(decoding.decode_stored("denoiser", {"adapter": adapter, "format": {"version": 3}}))
    export(tmp_path / "run" / "final", whole, {"x": torch.ones(1)}, {})
    keep_base(tmp_path / "run" / "final", "demo", {})
    problem = tiny.refused("convert_denoiser", "export", tmp_path / "run", "--output", tmp_path / "out")
    assert "export the model that it was learned upon" in problem.hint and "export_model" not in problem.hint
