"""torch.compile: whether it works here, and how it is asked for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from training.errors import UserError

GRAPHS = 256  # of one kind of part: it works for so many sizes of pictures, and then goes on as it is written


def compile_parts(parts: Iterable[nn.Module]) -> None:
    """Compile each part in place, at its first call and again for every new size of batch or picture.

    With sizes left open one graph would do for all, but a U-Net takes many times as long to be traced with them.
    """
    from torch._dynamo import config

    config.recompile_limit = GRAPHS  # from 8, which all parts of one class share
    for part in parts:
        part.compile(dynamic=False)


def check_compiler(device: torch.device, *, drawing: bool = False) -> None:
    """Raise UserError where torch.compile would fail at the first step, by what it needs: nothing is compiled here.

    `drawing`: it is asked for by the flag of a drawing, not by a training's key.
    """
    from torch._dynamo.eval_frame import check_if_dynamo_supported
    from torch._inductor import cpp_builder
    from torch.utils import _triton

    try:
        check_if_dynamo_supported()
        if device.type == "cpu":
            cpp_builder.get_cpp_compiler()
        elif not _triton.has_triton():
            raise RuntimeError("no working Triton for this GPU")
    except RuntimeError as failure:
        reason = str(failure).strip().partition("\n")[0][:200] or type(failure).__name__
        hint = f"{'leave --compile out' if drawing else 'use --train.compile false'}, or install the compiler it names"
        raise UserError(f"torch.compile does not work here ({reason})", hint=hint) from None
