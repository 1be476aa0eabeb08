"""`generate --compile`: networks that are compiled for many pictures. Free of torch at import."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from training.errors import USAGE, UserError

if TYPE_CHECKING:
    import argparse

    import torch

    from ldm.pipeline import Pipeline

FACT = "kernels"  # beside the versions of what drew a picture


def add_flags(add: Callable[..., Any]) -> None:
    """Add `--compile`."""
    text = "torch.compile the denoiser's network and the decoder, for very many pictures: the first batch takes "
    add("--compile", action="store_true", help=text + "seconds to minutes more; other last bits")


def check(args: argparse.Namespace, device: torch.device) -> None:
    """Raises UserError where `--compile` is asked for and there is no compiler, or where it would end in a failure."""
    if not args.compile:
        return
    if args.restore or args.method:
        what = "--compile: a compiled network has no second derivative, which methods that restore may ask for"
        raise UserError(what, hint="leave --compile out", code=USAGE)
    from training.machine.compiling import check_compiler

    check_compiler(device, drawing=True)


def compile_networks(pipeline: Pipeline) -> None:
    """Compile the denoiser's network and, where there is one, the decoder, in place."""
    from training.machine.compiling import compile_parts

    networks: list[Any] = [pipeline.denoiser.backbone, getattr(pipeline.autoencoder, "decoder", None)]
    compile_parts(filter(None, networks))


def kernels(size: int, full: int) -> tuple[str, AbstractContextManager[Any]]:
    """What a batch of this size is drawn by, in a word for its facts, and what to be inside of while it is.

    `full`: the size that networks are compiled for, 0 for none. Of others there is one, the last, which is drawn as
    the networks are written: it would be compiled for by itself.
    """
    if size == full or not full:
        return "compiled" if full else "plain", nullcontext()
    from torch.compiler import set_stance

    return "plain", set_stance("force_eager")
