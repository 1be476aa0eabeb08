"""LoRA and DoRA of ours as files of other programs, by the names that `lora_files` reads.

What is written is read again and compared with the adapter before it is called done; else nothing is left of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.adapters.low_rank import DoRA, LowRankConfig
from training.errors import CHECKPOINT, UserError
from training.exchange.autoencoders import check_unused
from training.exchange.export_check import REPORT
from training.exchange.lora_files import Part, taken, theirs
from training.guarding import disk_error, staged
from training.messages import note, tell
from training.models.captions_read import few_of
from training.models.folders import find, weights
from training.tensors import save_tensors

Style = Literal["diffusers", "kohya"]
CLOSE = 1e-6  # the largest difference of a layer's change, by its largest number


def export_lora(run: str, style: Style, output: Path) -> None:
    """Write the LoRA or DoRA of an adapter's run as one file. Raises UserError for a run of something else, and where
    what was written changes a layer otherwise.

    For diffusers the scale alpha / r is multiplied into B; kohya's names come with alpha. A fused projection becomes
    its parts: each has the same A and its rows of B.
    """
    check_unused(output)
    folder = find(run, "denoiser")
    config: Any = folder.config()
    if not isinstance(config.adapter, LowRankConfig):
        what = f"{run} holds no LoRA or DoRA but adapter.kind {config.adapter.kind}"
        raise UserError(what, hint="give the run of one: train_denoiser --base RUN --config lora", code=CHECKPOINT)
    own, about = weights(folder.weights, "denoiser"), (vars(config.backbone), config.adapter.scale)
    tensors, left = written(own, *about, style)
    if not tensors:
        what = f"{run} changes nothing but a text encoder that learns, which only we have"
        hint = "make one model of both: export_model BASE --adapter RUN --dtype float32"
        raise UserError(what, hint=hint, code=CHECKPOINT)
    if left:
        note(f"left out {len(left)} layers or words of the text encoder, which only we have: {few_of(left)}")
    tell_limits(config, style)
    partial = staged(output)
    try:
        save_tensors(partial, tensors)
        told = compare(partial, own, *about)
        partial.replace(output)
    except OSError as failure:
        raise disk_error(output, failure) from None
    finally:
        partial.unlink(missing_ok=True)
    tell(told)


def written(
    tensors: Mapping[str, Tensor], backbone: Mapping[str, Any], scale: float, style: Style
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file, of those of an adapter upon `[backbone]`; and what of it has no name there."""
    found, left = dict[str, Tensor](), []
    for layer, part in _layers(tensors).items():
        if not layer.startswith("backbone."):
            left.append(layer)
            continue
        names = theirs(layer.removeprefix("backbone."), backbone)
        if layer == "backbone.patch_embedding":  # a convolution there
            part["A"] = part["A"].view(len(part["A"]), -1, backbone["patch"], backbone["patch"])
            part["B"] = part["B"][..., None, None]
        split = [part.get(key, part["B"]).chunk(len(names)) for key in ("B", "m")]
        for name, up, stretch in zip(names, *split, strict=True):
            given = {"A": part["A"], "B": up, **({"m": stretch} if "m" in part else {})}
            found |= _named(name, given, scale, style, backbone["kind"])
    return {name: tensor.clone() for name, tensor in found.items()}, left


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """The tensors of an adapter by layer; those of words come as layers, too."""
    found: dict[str, Part] = {}
    for name, tensor in tensors.items():
        layer, _, kind = re.sub(r"^(adapter\.)?(parts\.\w+\.)?", "", name).rpartition(".")
        found.setdefault(layer or kind, {})[kind] = tensor
    return found


def _named(name: str, part: Part, scale: float, style: Style, kind: str) -> dict[str, Tensor]:
    """One layer. Lengths of rows are as each program multiplies a weight by them: PEFT has those of a convolution along
    the channels of a picture."""
    ones = [1] * (part["A"].ndim - 2)
    if style == "diffusers":
        prefix = f"{'unet' if kind == 'unet' else 'transformer'}.{name}"
        shape = [1, -1, *ones] if ones else [-1]
        more = {f"{prefix}.lora_magnitude_vector": part["m"].view(shape)} if "m" in part else {}
        return {f"{prefix}.lora_A.weight": part["A"], f"{prefix}.lora_B.weight": scale * part["B"], **more}
    prefix = f"lora_unet_{name.replace('.', '_')}"
    more = {f"{prefix}.dora_scale": part["m"].view(-1, 1, *ones)} if "m" in part else {}
    alpha = torch.tensor(scale * len(part["A"]))
    return {f"{prefix}.lora_down.weight": part["A"], f"{prefix}.lora_up.weight": part["B"],
            f"{prefix}.alpha": alpha, **more}  # fmt: skip


def tell_limits(config: Any, style: Style) -> None:
    """Say what diffusers cannot do with a file of such names."""
    if isinstance(config.adapter, DoRA) and style == "kohya":
        note("diffusers leaves out the lengths of DoRA by kohya's names, and draws otherwise: for it, --lora diffusers")
    if config.backbone.kind != "unet":
        peft = "PEFT does (docs/adapters.md); or " if style == "diffusers" else ""
        note(f"diffusers loads no LoRA into its DiT and PixArt networks: {peft}make one model of both, "
             "export_model BASE --adapter RUN --dtype float32, and export that")  # fmt: skip


def compare(path: Path, tensors: Mapping[str, Tensor], backbone: Mapping[str, Any], scale: float) -> str:
    """One line of how near the file is to an adapter of these tensors, by our own reader. Raises UserError where the
    change of a layer is not within `CLOSE`."""
    parts = _layers(tensors).items()
    own = {layer.removeprefix("backbone."): part for layer, part in parts if layer.startswith("backbone.")}
    shapes = {name: torch.zeros(()).expand(len(part["B"]), *part["A"].shape[1:]) for name, part in own.items()}
    found, left = taken(path, shapes, backbone)
    same = not left and found.keys() == own.keys()
    errors = [error for name in own for error in _errors(own[name], found[name], scale)] if same else [torch.nan]
    worst = float(torch.tensor(errors).max())
    if not worst <= CLOSE:
        what = f"what was written changes layers otherwise than the adapter (largest difference: {worst:.1g})"
        other = (path.parent / "adapter_config.json").is_file()
        hint = "take the adapter_config.json beside it elsewhere: it is read as this file's" if other else REPORT
        raise UserError(what, hint=hint, code=CHECKPOINT)
    return f"read again by our own import: {len(own)} layers, largest difference of a change {worst:.1g}"


def _errors(own: Part, found: Part, scale: float) -> Iterator[float]:
    """The largest difference of B A, and of the lengths of DoRA, by the largest number."""
    changes = [part["B"].double().flatten(1) @ part["A"].double().flatten(1) for part in (own, found)]
    for ours, theirs_ in ((scale * changes[0], changes[1]), *(((own["m"], found["m"]),) if "m" in own else ())):
        largest = ours.abs().max()
        yield float((ours - theirs_).abs().max() / (largest if largest else 1))
