"""LoRA files of other programs, both ways: what a file changes of a network, here and by diffusers' own readers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.adapters.low_rank import DoRA, LoRA, LowRankConfig
from ldm.backbones import DiT, UNet
from ldm.conditioning import Cond
from training.errors import UserError
from training.exchange import unet_layout
from training.exchange.layout import Network
from training.exchange.lora_files import flat, taken, theirs, written
from training.models.adapters import Chosen
from training.models.assembly import load_pipeline

diffusers = pytest.importorskip("diffusers")
SETTINGS: dict[str, Any] = {"kind": "unet", "channels": [32, 64], "attention": [0, 1], "blocks": 1, "groups": 8,
                            "heads": 4, "depth": 1}  # fmt: skip
WIDE = ("*.to_q", "*.to_out.0", "*.proj_in", "*.ff.net.*", "conv_in", "*.time_emb_proj", "*.conv1")
STYLES = ("diffusers", "kohya")
TEXT: Any = nn.Identity()  # no layer of a text encoder is changed here


def unet(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in (SETTINGS | settings).items()}
    return shaken(UNet(**given).build(channels=4, context_dim=16))


def dit(**settings: Any) -> tuple[nn.Module, DiT]:
    torch.manual_seed(0)
    config = DiT(width=32, depth=2, heads=2, base_size=8, **settings)
    return shaken(config.build(channels=4, context_dim=16, pooled_dim=16)), config


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module.requires_grad_(False).eval()


def learned(config: LowRankConfig, backbone: Any) -> Any:
    """An adapter that has learned something; not attached."""
    adapter = config.build(backbone, TEXT)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return adapter


def answer(backbone: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, context, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, 16), (16,)))
    with torch.no_grad():
        told: Tensor = backbone(x, torch.tensor([10.0, 700.0]), Cond(context, torch.ones(2, 5).bool(), pooled))
    return told


def weights_by_hand(found: dict[str, dict[str, Tensor]], backbone: nn.Module) -> None:
    """Put W + B A, or m V / ||V||, in the place of each weight."""
    for name, part in found.items():
        weight = backbone.get_submodule(name).get_parameter("weight")
        v = weight.flatten(1) + part["B"] @ part["A"].flatten(1)
        if "m" in part:
            v = part["m"][:, None] * v / v.norm(dim=1, keepdim=True)
        weight.data = v.view_as(weight)


def changed(config: LowRankConfig, style: Any, path: Path, backbone: Any, other: Any, settings: Any) -> float:
    """The largest difference between an adapter at work, and its file read and laid upon the same base by hand."""
    adapter = learned(config, backbone)
    tensors, left = written(adapter.state_dict(), settings, config.scale, style)
    assert not left
    save_file(tensors, path)
    found, left = taken(path, other, settings)
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
    assert len(taken(path, other, vars(config))[0]["blocks.0.attention.qkv"]["A"]) == 3  # the same A is kept once


def test_parts_with_matrices_of_their_own_stay_apart(tmp_path: Path) -> None:
    """As other programs train q, k and v: each W + B A for itself; one that is not there does not change."""
    (backbone, config), name = dit(), "transformer_blocks.1.attn1.to_"
    torch.manual_seed(4)
    ups, downs = ({key: torch.randn(*shape) for key, shape in shapes.items()} for shapes in (
        {"q": (32, 2), "v": (32, 5)}, {"q": (2, 32), "v": (5, 32)}))
    tensors = {f"transformer.{name}{key}.lora_A.weight": downs[key] for key in "qv"}
    save_file(tensors | {f"transformer.{name}{key}.lora_B.weight": ups[key] for key in "qv"}, tmp_path / "file")
    found, left = taken(tmp_path / "file", backbone, vars(config))
    (part,) = found.values()
    wanted = torch.cat([ups["q"] @ downs["q"], torch.zeros(32, 32), ups["v"] @ downs["v"]])
    assert not left and torch.allclose(part["B"] @ part["A"], wanted, atol=1e-5) and len(part["A"]) == 7


@pytest.mark.parametrize("style", STYLES)
def test_diffusers_reads_the_same_change(style: Any, tmp_path: Path) -> None:
    """By its own converters of names, into its own U-Net: W + (alpha / r) B A there is our answer."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers as from_kohya
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft as to_peft

    backbone, config = unet(), LoRA(rank=3, alpha=7.5, targets=("*.to_?", "*.to_out.0", "*.proj_in", "*.ff.net.*"))
    whole = SETTINGS | {"head_dim": 0, "linear_projection": False, "pooled": False, "scale_shift": False,
                        "position": False, "learned_variance": False}  # fmt: skip
    network = Network(backbone=whole, tensors=backbone.state_dict(), channels=4, context_dim=16)
    about, tensors = unet_layout.write(network)
    other = diffusers.UNet2DConditionModel(**about).eval()
    other.load_state_dict(tensors)
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
    generator = torch.Generator().manual_seed(2)
    x, context = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, 16)))
    with torch.no_grad():
        told = other(x, torch.tensor([10.0, 700.0]), context).sample
    assert (told - answer(backbone)).abs().max() < 1e-4


def one(tensors: dict[str, Tensor], path: Path, **metadata: str) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    save_file(tensors, path, metadata=metadata)
    return taken(path, unet(), SETTINGS)


NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{NAME.replace('.', '_')}"
A, B = torch.arange(128.0).view(2, 64) / 100, torch.arange(128.0).view(64, 2) / 50


def test_alpha_is_what_the_file_says(tmp_path: Path) -> None:
    """kohya's default is alpha 1, which divides the change by the rank; where nothing is said, alpha is the rank."""
    pair = {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}
    for alpha, scale in ((1.0, 0.5), (2.0, 1.0), (8.0, 4.0)):
        found, left = one({**pair, f"{KOHYA}.alpha": torch.tensor(alpha)}, tmp_path / "file")
        assert not left and torch.equal(found[NAME]["B"], scale * B) and torch.equal(found[NAME]["A"], A)
    assert torch.equal(one(pair, tmp_path / "file")[0][NAME]["B"], B)
    peft = {f"base_model.model.unet.{NAME}.lora_A.weight": A, f"base_model.model.unet.{NAME}.lora_B.weight": B}
    told = {"unet.r": 2, "unet.lora_alpha": 6}
    found, _ = one(peft, tmp_path / "file", lora_adapter_metadata=json.dumps(told))
    assert torch.equal(found[NAME]["B"], 3 * B)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "use_rslora": True}))
    assert torch.equal(one(peft, tmp_path / "file")[0][NAME]["B"], 3 * B)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"alpha_pattern": {"to_q": 4}}))
    with pytest.raises(UserError, match="another alpha for some layers"):
        one(peft, tmp_path / "file")


@pytest.mark.parametrize(("down", "up"), [
    (f"unet.{NAME}.lora_A.weight", f"unet.{NAME}.lora_B.weight"),
    (f"unet.{NAME}.lora.down.weight", f"unet.{NAME}.lora.up.weight"),
    (f"unet.{NAME.replace('to_q', 'processor.to_q_lora')}.down.weight",
     f"unet.{NAME.replace('to_q', 'processor.to_q_lora')}.up.weight"),
    (f"{NAME}.lora_A.default.weight", f"{NAME}.lora_B.default.weight"),
    (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"),
], ids=["peft", "diffusers", "processors", "bare", "kohya"])
def test_names_that_are_read(down: str, up: str, tmp_path: Path) -> None:
    place = "to_out" if "processor" in down else "to_out_0" if "lora_unet" in down else "to_out.0"
    out = [name.replace("to_q", place) for name in (down, up)]
    found, left = one({down: A, up: B, out[0]: A.clone(), out[1]: B.clone()}, tmp_path / "file")
    assert not left and set(found) == {NAME, NAME.replace("to_q", "to_out.0")}
    assert torch.equal(found[NAME]["A"], A) and torch.equal(found[NAME]["B"], B)


def test_what_the_base_has_not_is_named(tmp_path: Path) -> None:
    pair = {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}
    names = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "lora_unet_x.hada_w1_a"
    other = {name: A.clone() for name in names}
    found, left = one(pair | other, tmp_path / "file")
    assert list(found) == [NAME]
    assert left == ["lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_x.hada_w1_a"]


@pytest.mark.parametrize(("tensors", "reason"), [
    ({"lora_down.weight": A}, "one of its two matrices is missing"),
    ({"lora_down.weight": A, "lora_up.weight": B[:32]}, "of another shape"),
    ({"lora_down.weight": A[:, :32], "lora_up.weight": B}, "of another shape"),
    ({"lora_down.weight": A, "lora_up.weight": B, "dora_scale": torch.ones(1, 64)}, "of columns, not of rows"),
], ids=["half", "rows", "columns", "dora"])
def test_what_does_not_fit_is_refused(tensors: dict[str, Tensor], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        one({f"{KOHYA}.{key}": value.clone() for key, value in tensors.items()}, tmp_path / "file")
    assert refused.value.code == 4 and NAME in refused.value.what


def test_magnitudes_of_some_layers_alone_are_refused(tmp_path: Path) -> None:
    other = KOHYA.replace("to_q", "to_v")
    pairs = {f"{name}.lora_{way}.weight": value.clone()
             for name in (KOHYA, other) for way, value in (("down", A), ("up", B))}  # fmt: skip
    with pytest.raises(UserError, match="64 magnitudes are wanted, as other layers have them"):
        one(pairs | {f"{other}.dora_scale": torch.ones(64, 1)}, tmp_path / "file")


def test_no_two_layers_have_one_name() -> None:
    backbone, config = dit(conditioning="adaln-single")
    for module, given in ((unet(), SETTINGS), (backbone, vars(config))):
        layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        names = [flat(part) for layer in layers for part in theirs(layer, given)]
        assert len(set(names)) == len(names) >= len(layers)


def test_a_file_becomes_a_run_and_a_run_a_file(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the door, upon a DiT: what is drawn with the run is what the file says, and it comes out as it went in."""
    backbone: Any = load_pipeline(denoiser, "cpu").denoiser.backbone
    config = LoRA(rank=2, alpha=5.0, targets=("*.attention.qkv", "*.mlp.out"))
    adapter = learned(config, shaken(backbone))  # the base does not count: the file has A and B alone
    tensors, _ = written(adapter.state_dict(), vars(backbone.config), config.scale, "kohya")
    file, run = tmp_path / "in.safetensors", tmp_path / "run"
    save_file(tensors | {"lora_te_x.lora_down.weight": A.clone()}, file)
    assert tiny.call("convert_denoiser", "import", file, "--base", denoiser, "--output", run) == 0
    said = capsys.readouterr().err
    assert "left out 1 layers or tensors" in said and "'lora_te_x'" in said
    drawn = load_pipeline(denoiser, "cpu", adapters=[Chosen(run)]).denoiser.backbone
    alone = load_pipeline(denoiser, "cpu").denoiser.backbone
    adapter.attach(alone, TEXT)
    for name, _ in adapter.deltas():
        layer = name.removeprefix("backbone.")
        ours, wanted = drawn.get_submodule(layer).weight, alone.get_submodule(layer).weight
        assert torch.allclose(ours, wanted, atol=1e-5) and ours.std() > 0
    for style in STYLES:
        out, again = tmp_path / f"{style}.safetensors", tmp_path / f"again-{style}"
        assert tiny.call("convert_denoiser", "export", run, "--lora", style, "--output", out) == 0
        assert tiny.call("convert_denoiser", "import", out, "--base", denoiser, "--output", again) == 0
        before, after = (load_file(folder / "final" / "model.safetensors") for folder in (run, again))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert "already exists" in tiny.refused("convert_denoiser", "export", run, "--lora", "kohya", "--output", out).what
    problem = tiny.refused("convert_denoiser", "export", denoiser, "--lora", "kohya", "--output", tmp_path / "no")
    assert problem.code == 4 and "holds no LoRA or DoRA but adapter.kind none" in problem.what
    other = shutil.copytree(denoiser, tmp_path / "other")
    tiny.shake(other / "final")
    with pytest.raises(UserError, match="was learned upon run, whose denoiser is"):
        load_pipeline(other, "cpu", adapters=[Chosen(run)])


def test_flags_of_the_other_way_are_refused(denoiser: Path, tmp_path: Path) -> None:
    save_file({"x.lora_down.weight": A}, file := tmp_path / "file.safetensors")
    out = ("--output", tmp_path / "out")
    for words, what in (
        (("export", denoiser, "--base", denoiser, *out), "--base belongs to import"),
        (("import", file, "--lora", "kohya", *out), "--lora belongs to export"),
        (("import", file, "--base", denoiser, "--heads", "2", *out), "--heads is of whole networks"),
        (("export", denoiser, "--lora", "kohya", "--pt2", *out), "--pt2 is of whole networks, --lora of a LoRA file"),
        (("import", file, "--base", denoiser, *out), "has no layer of"),
    ):
        assert what in tiny.refused("convert_denoiser", *words).what
    assert not (tmp_path / "out").exists()
