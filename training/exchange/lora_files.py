"""LoRA files of other programs, read: safetensors by the names of diffusers and PEFT, or of kohya's scripts.

A layer W (out, in) has A (r, in) and B (out, r) there, and its change is (alpha / r) B A. kohya's files say alpha,
which is often 1: then the change is B A / r. diffusers' say none, and mean alpha = r; PEFT's say it beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.adapters.low_rank import DoRA, Layer, LoRA, LowRank, MagnitudeDelta
from training.errors import CHECKPOINT, UserError
from training.exchange.autoencoders import check_unused
from training.exchange.transformer_layouts import DIT_KEYS, PIXART_KEYS, their_names
from training.guarding import read_record
from training.messages import note
from training.models.adapters import OF_BASE, config_of_base, keep_base
from training.models.assembly import load_pipeline
from training.models.captions_read import few_of
from training.models.folders import export, whole_folder
from training.models.lineage import store_ingredients
from training.settings import decoding
from training.tensors import content_hash, load_tensors, stored_metadata

Part = dict[str, Tensor]  # A, B and, where a file has them, alpha and m, of one layer as another program names it
WHOLE = r"^(base_model\.model\.)?(unet\.|transformer\.|lora_unet_|lora_transformer_)?"
RIGHT = "give the model that it was trained for with --base"
ENDINGS = (
    (r"\.lora_A(\.default)?\.weight", "A"), (r"\.lora_B(\.default)?\.weight", "B"),
    (r"[._]lora\.down\.weight", "A"), (r"[._]lora\.up\.weight", "B"), (r"\.lora_down\.weight", "A"),
    (r"\.lora_up\.weight", "B"), (r"\.alpha", "alpha"), (r"\.lora_magnitude_vector(\.weight|\.default\.weight)?", "m"),
    (r"\.dora_scale", "dora_scale"),
)  # fmt: skip


def theirs(layer: str, backbone: Mapping[str, Any]) -> list[str]:
    """What a layer of ours is called in diffusers; a fused projection has a name for each of its parts."""
    if backbone["kind"] == "unet":
        return [layer]
    keys = PIXART_KEYS if backbone["conditioning"] == "adaln-single" else DIT_KEYS
    return [name.removesuffix(".weight") for name in their_names(f"{layer}.weight", keys)]


def flat(name: str) -> str:
    """A layer's name in any of these programs, in one spelling: theirs differ in prefixes, and in `_` for `.`."""
    plain = re.sub(WHOLE, "", name).replace(".processor.", ".").replace(".", "_")
    return plain if not plain.endswith("_to_out") else f"{plain}_0"  # diffusers' attention processors, before PEFT


def import_lora(source: str, base: str, output: Path, text_encoder: str | None = None) -> str:
    """Make the run of an adapter upon `base` of a LoRA file. Returns its content hash.

    Layers of other ranks than the largest are filled up with zeros; parts of a projection that is fused here become one
    block-diagonal B, unless all have the same A. What the base has not is left out, counted and named. Raises UserError
    for a file without a layer of the base, and for one that does not fit.
    """
    check_unused(output)
    config, pipeline = config_of_base(base), load_pipeline(base, "cpu", text_encoder)
    backbone: Any = pipeline.denoiser.backbone
    found, left = taken(Path(source), layers(backbone), vars(config.backbone))
    if left:
        note(f"left out {len(left)} layers or tensors of {source} that {base} has no place for: {few_of(left)}")
    if not found:
        raise UserError(f"{source} has no layer of {base}", hint=RIGHT, code=CHECKPOINT)
    kind, rank = DoRA if "m" in next(iter(found.values())) else LoRA, max(len(part["A"]) for part in found.values())
    changed = replace(config, adapter=kind(rank=rank, targets=tuple(found)))
    tensors = _filled(changed.adapter.build(backbone, pipeline.text), found).state_dict()
    about = {"origin": "Taken from another program's file; not trained here."}
    with whole_folder(output) as folder:
        identity = export(folder / "final", decoding.to_values(changed), tensors, about)
        store_ingredients(folder / "final", {"adapter": content_hash(tensors)})
        hashes = {name: pipeline.hashes[name] for name in OF_BASE if name in pipeline.hashes}
        keep_base(folder / "final", base, hashes)
    return identity


def layers(backbone: nn.Module) -> dict[str, Tensor]:
    """The weights of a backbone that a LoRA can change, by the names of their layers."""
    return {name: layer.weight.detach() for name, layer in backbone.named_modules() if isinstance(layer, Layer)}


def taken(path: Path, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[dict[str, Part], list[str]]:
    """A, B and, of DoRA, m of those of the `weights` of `[backbone]` that a file changes, in float32, alpha / r
    multiplied into B; and what the file has besides. Raises UserError where they do not fit."""
    parts, left = _parts(load_tensors(path), _scales(path))
    fused: dict[str, list[Part]] = {}
    for name in weights:
        own = [parts.pop(flat(part), {}) for part in theirs(name, settings)]
        if any(own):
            fused[name] = own
    dora = any({"m", "dora_scale"} & part.keys() for own in fused.values() for part in own)
    found = {}
    for name, own in fused.items():
        try:
            found[name] = _fuse(weights[name], own, dora)
        except ValueError as why:
            raise UserError(f"{path}: {name}: {why}", hint=RIGHT, code=CHECKPOINT) from None
    return found, sorted([*left, *parts])


def _parts(tensors: Mapping[str, Tensor], scales: Scales) -> tuple[dict[str, Part], list[str]]:
    """The tensors of a file by layer, in one spelling, as float32, with the scale of a layer that says no alpha; and
    the names of those that are none of a LoRA's."""
    found: dict[str, Part] = {}
    left = []
    for name, tensor in tensors.items():
        for ending, kind in ENDINGS:
            match = re.fullmatch(f"(.+?){ending}", name)
            if match and (kind not in "AB" or (tensor.ndim > 1 and len(tensor))):
                part = found.setdefault(flat(match[1]), {})
                part[kind] = tensor.float()
                if kind == "A":
                    part["scale"] = torch.tensor(scales.of(re.sub(WHOLE, "", match[1]), len(tensor)))
                break
        else:
            left.append(name)
    return found, left


class Scales(NamedTuple):
    """What PEFT wrote beside a file, or diffusers into it, of the scale of its layers: `alpha` of all but those that
    `patterns` name, and whether `root` of the rank divides it (rsLoRA)."""

    alpha: float | None
    patterns: Mapping[re.Pattern[str], float]
    root: bool

    def of(self, layer: str, rank: int) -> float:
        """That of one layer, whose rank its weights tell: what PEFT wrote of ranks are the same ones."""
        named = (alpha for pattern, alpha in self.patterns.items() if pattern.match(layer))
        alpha = next(named, rank if self.alpha is None else self.alpha)
        return alpha / (rank**0.5 if self.root else rank)


def _scales(path: Path) -> Scales:
    """Raises UserError where what PEFT wrote is not what it writes."""
    beside = path.parent / "adapter_config.json"
    inside = stored_metadata(path).get("lora_adapter_metadata", "{}")
    try:
        told = read_record(beside, {}) if beside.is_file() else json.loads(inside)
        told = {re.sub(WHOLE, "", key): value for key, value in told.items()}  # a text encoder's keep their prefix
        alpha, named = told.get("lora_alpha"), told.get("alpha_pattern") or {}
        patterns = {re.compile(rf"(.*\.)?({key})$"): float(value) for key, value in named.items()}
        return Scales(None if alpha is None else float(alpha), patterns, bool(told.get("use_rslora")))
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError, re.error) as failure:
        what = f"{path}: what PEFT wrote of its scale is not readable ({type(failure).__name__}: {failure})"
        raise UserError(what, hint="save it again, or take another copy", code=CHECKPOINT) from None


def _fuse(weight: Tensor, parts: list[Part], dora: bool) -> Part:
    """A, B and m of one layer of ours; a part that the file has not is not changed. Raises ValueError for a misfit."""
    downs, ups, stretches = list[Tensor](), list[Tensor](), list[Tensor]()
    for part, own in zip(parts, weight.chunk(len(parts)), strict=True):
        if part and not {"A", "B"} <= part.keys():
            raise ValueError("one of its two matrices is missing")
        down, up = part.get("A", own[:0]), part.get("B", own.new_zeros(len(own), 0))
        if down[:1].numel() != own[: len(down[:1])].numel() or up.flatten(1).shape != (len(own), len(down)):
            raise ValueError(f"{tuple(down.shape)} and {tuple(up.shape)} are of another shape")
        scale = float(part["alpha"]) / len(down) if "alpha" in part else float(part.get("scale", 1))
        downs.append(down.reshape(len(down), *own.shape[1:]))
        ups.append(scale * up.flatten(1))
        stretches += [_magnitude(part, own)] if dora else []
    one = all(torch.equal(down, downs[0]) for down in downs)
    up = torch.cat(ups) if one else torch.block_diag(*ups)  # type: ignore[no-untyped-call]
    fused = {"A": downs[0] if one else torch.cat(downs), "B": up}
    return {**fused, "m": torch.cat(stretches)} if stretches else fused


def _magnitude(part: Part, own: Tensor) -> Tensor:
    """The norms that DoRA gives the rows of a weight. LyCORIS also has those of columns, which are another thing."""
    if not part:
        norms: Tensor = torch.linalg.vector_norm(own.flatten(1), dim=1)
        return norms
    if "dora_scale" in part and len(part["dora_scale"]) != len(own):
        raise ValueError("dora_scale is of columns, not of rows")
    m = part.get("m", part.get("dora_scale"))
    if m is None or m.numel() != len(own):
        raise ValueError(f"{len(own)} magnitudes are wanted, as other layers have them")
    return m.flatten()


def _filled(adapter: LowRank, found: Mapping[str, Part]) -> LowRank:
    with torch.no_grad():
        for name, delta in adapter.deltas():
            part = found[name.removeprefix("backbone.")]
            delta.A.zero_()[: len(part["A"])] = part["A"]
            delta.B.zero_().flatten(1)[:, : len(part["A"])] = part["B"]
            if isinstance(delta, MagnitudeDelta):
                delta.m.copy_(part["m"])
    return adapter
