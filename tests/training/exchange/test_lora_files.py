"""LoRA files of other programs: what a file changes of a network; and runs made of files, and files of runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lora import SETTINGS, STYLES, TEXT, dit, learned, shaken, unet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.adapters.low_rank import LoRA
from training.errors import UserError
from training.exchange.lora_export import written
from training.exchange.lora_files import flat, layers, taken, theirs
from training.models.adapters import Chosen
from training.models.assembly import load_pipeline


def test_parts_with_matrices_of_their_own_stay_apart(tmp_path: Path) -> None:
    """As other programs train q, k and v: each W + B A for itself; one that is not there does not change."""
    (backbone, config), name = dit(), "transformer_blocks.1.attn1.to_"
    torch.manual_seed(4)
    ups, downs = ({key: torch.randn(*shape) for key, shape in shapes.items()} for shapes in (
        {"q": (32, 2), "v": (32, 5)}, {"q": (2, 32), "v": (5, 32)}))
    tensors = {f"transformer.{name}{key}.lora_A.weight": downs[key] for key in "qv"}
    save_file(tensors | {f"transformer.{name}{key}.lora_B.weight": ups[key] for key in "qv"}, tmp_path / "file")
    found, left = taken(tmp_path / "file", layers(backbone), vars(config))
    (part,) = found.values()
    wanted = torch.cat([ups["q"] @ downs["q"], torch.zeros(32, 32), ups["v"] @ downs["v"]])
    assert not left and torch.allclose(part["B"] @ part["A"], wanted, atol=1e-5) and len(part["A"]) == 7


def one(tensors: dict[str, Tensor], path: Path, **metadata: str) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    save_file(tensors, path, metadata=metadata)
    return taken(path, layers(unet()), SETTINGS)


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
    told = {"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.lora_alpha": 1, "text_encoder.use_rslora": True}
    found, _ = one(peft, tmp_path / "file", lora_adapter_metadata=json.dumps(told))
    assert torch.equal(found[NAME]["B"], 3 * B)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "use_rslora": True}))
    assert torch.allclose(one(peft, tmp_path / "file")[0][NAME]["B"], 6 / 2**0.5 * B)


@pytest.mark.parametrize("root", [False, True])
def test_the_rank_of_a_layer_is_that_of_its_weights_and_its_alpha_that_of_its_pattern(
    root: bool, tmp_path: Path
) -> None:
    """As PEFT means `rank_pattern`, whose ranks the weights have, and `alpha_pattern`: the end of a name, or from ^."""
    other, deep = NAME.replace("to_q", "to_v"), NAME.replace("attn1.to_q", "attn2.to_q")
    tensors = {f"base_model.model.{name}.lora_{half}.weight": value.clone() for name, up, down in (
        (NAME, B, A), (other, torch.cat([B, B], 1), torch.cat([A, A])), (deep, B, A)
    ) for half, value in (("A", down), ("B", up))}  # fmt: skip
    told = {"r": 2, "lora_alpha": 2, "rank_pattern": {"to_v": 4}, "use_rslora": root}
    config = tmp_path / "adapter_config.json"
    for patterns, alphas in (
        ({}, (2, 2, 2)), ({"to_q": 6}, (6, 2, 6)), ({"attn2.to_q": 5, "to_q": 6}, (6, 2, 5)),
        ({f"^{NAME}": 8, "to_": 7}, (8, 2, 2)), ({"mid_block.to_q": 9}, (2, 2, 2)), ({".*attn1.*": 3}, (3, 3, 2)),
    ):  # fmt: skip
        config.write_text(json.dumps(told | {"alpha_pattern": patterns}))
        found, left = one(tensors, tmp_path / "file")
        assert not left
        for name, alpha, rank in zip((NAME, other, deep), alphas, (2, 4, 2), strict=True):
            wanted = alpha / (rank**0.5 if root else rank) * tensors[f"base_model.model.{name}.lora_B.weight"]
            assert torch.allclose(found[name]["B"], wanted), (name, patterns)


@pytest.mark.parametrize("told", ['{"lora_alpha": "much"}', "[1]", '{"alpha_pattern": {"to_(q": 1}}', "{"])
def test_a_scale_that_cannot_be_read_is_refused(told: str, tmp_path: Path) -> None:
    pair = {f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": B}
    with pytest.raises(UserError, match="what PEFT wrote of its scale is not readable") as refused:
        one(pair, tmp_path / "file", lora_adapter_metadata=told)
    assert refused.value.code == 4


@pytest.mark.parametrize("shape", [(64,), (1, 64, 1, 1)])
def test_magnitudes_are_read_along_rows_and_along_channels(shape: tuple[int, ...], tmp_path: Path) -> None:
    """PEFT's are of either shape, as the layer is linear or a convolution."""
    lengths = torch.arange(64.0)
    pair = {f"unet.{NAME}.lora_A.weight": A, f"unet.{NAME}.lora_B.weight": B}
    found, left = one(pair | {f"unet.{NAME}.lora_magnitude_vector": lengths.view(shape)}, tmp_path / "file")
    assert not left and torch.equal(found[NAME]["m"], lengths)


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
    ({"lora_down.weight": A[:0], "lora_up.weight": B[:, :0]}, "one of its two matrices is missing"),
    ({"lora_down.weight": A, "lora_up.weight": B[:32]}, "of another shape"),
    ({"lora_down.weight": A[:, :32], "lora_up.weight": B}, "of another shape"),
    ({"lora_down.weight": A, "lora_up.weight": B, "dora_scale": torch.ones(1, 64)}, "of columns, not of rows"),
], ids=["half", "no rank", "rows", "columns", "dora"])
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
        ours = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        names = [flat(part) for layer in ours for part in theirs(layer, given)]
        assert len(set(names)) == len(names) >= len(ours)


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
