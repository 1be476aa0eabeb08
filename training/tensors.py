"""Tensors on disk: safetensors written, checked before they are read, read, and named by their content."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import CHECKPOINT, UserError
from training.guarding import disk_error, each_once, staged, unreadable, without_waiting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_HEADER = 8 << 20  # bytes: some 80,000 tensors; the format allows more, which only a forged file uses
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip archives of torch.save, and bare pickles


class Pickled(UserError):
    """The file is a pickle, which is refused."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, and fsync it (its folder is the caller's to sync).

    Its mode is that of any new file, as the umask has it: safetensors itself leaves that of its temporary file, 0600.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    partial = staged(path)
    try:
        mode = new_file_mode(partial)
        save_file(contiguous, partial, metadata=dict(metadata or {"format": "pt"}))  # one key: the order varies
        partial.chmod(mode)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as failure:  # safetensors wraps the system's own error
        raise disk_error(path, failure) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def new_file_mode(path: Path) -> int:
    """The mode of a new file, by making one at `path`: a process's umask cannot be asked without being changed."""
    with path.open("wb") as file:
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode)


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file. Raises UserError for anything else, pickles by content included; never unpickles."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        return dict(load_file(path, device=device))
    except (SafetensorError, OSError, ValueError) as failure:
        reason = f"{path}: damaged safetensors file ({failure})"
        raise UserError(reason, hint="use another checkpoint or download it again", code=CHECKPOINT) from None


def stored_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors."""
    from safetensors import safe_open

    check_safetensors(path)
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def stored_hash(path: Path) -> str:
    """The content hash that `save_tensors` was told to write into a file; empty where it was not."""
    return stored_metadata(path).get("hash", "")


def check_safetensors(path: Path) -> None:
    """Raises UserError where `path` is missing, a pickle, or does not begin as a safetensors file must."""
    try:
        with open(path, "rb", opener=without_waiting) as file:
            head = file.read(8) or b""
            size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            fits = 2 <= size <= min(LARGEST_HEADER, os.fstat(file.fileno()).st_size - 8)
            header = file.read(size) if fits else b""
    except OSError as failure:
        raise unreadable(path, failure) from None
    if head.startswith(PICKLES) and not fits:  # a header of 640 bytes begins as a pickle does
        reason = f"{path}: refusing to load a pickle file; only safetensors is read"
        raise Pickled(reason, hint="convert it to safetensors where you trust its source", code=CHECKPOINT)
    try:
        if not fits:
            raise ValueError(f"header of {size:,} bytes")
        json.loads(header, object_pairs_hook=each_once)
    except (ValueError, RecursionError) as failure:
        reason = f"{path}: not a safetensors file ({failure})"
        raise UserError(reason, hint="is the file complete?", code=CHECKPOINT) from None


def check_weights(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], source: object) -> None:
    """Raises UserError (code 4) for weights that are not finite, or no real numbers where `own`, the network's, are.

    Numbers of another kind (bool, int8, complex) would be converted without a word, and NaN drawn with.
    """
    for key, value in tensors.items():
        if key in own and (wrong := _unfit(value, own[key])):
            hint = "the file is damaged, made for another program, or its training had failed; use another checkpoint"
            raise UserError(f"{source}: tensor {key} {wrong}", hint=hint, code=CHECKPOINT)


def _unfit(tensor: Tensor, wanted: Tensor) -> str:
    """Why a tensor cannot stand for `wanted`, of whatever precision; empty where it can."""
    counts = not wanted.is_floating_point() and tensor.is_floating_point() and bool((tensor == tensor.round()).all())
    other_kind = tensor.is_floating_point() != wanted.is_floating_point() and not counts
    if other_kind or tensor.is_complex() or wanted.is_complex():
        kind = "floating-point numbers" if wanted.is_floating_point() else "whole numbers"
        return f"is {str(tensor.dtype).removeprefix('torch.')}, not {kind}"
    if tensor.is_floating_point() and not (finite := tensor.float().isfinite()).all():
        return f"is not finite ({int((~finite).sum()):,} of its {tensor.numel():,} numbers)"
    return ""


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors, floating-point ones rounded to the nearest of `dtype`."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes in order of name: the identity of weights, however stored."""
    import torch

    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
