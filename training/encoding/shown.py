"""What stands beside latents as `extra-image.npy`, for a denoiser to be shown: small pictures, or hints encoded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from autoencoder.base import Autoencoder
from ldm.representation import VISION
from training.errors import DATA, UserError
from training.messages import note


def hint_beside(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the hints beside the pictures are, of which each is copied; how many were made by which rule stays there."""
    return {key: value for key, value in summary["hint"].items() if key != "made"} if summary.get("hint") else None


def planned(
    args: argparse.Namespace, hint: Mapping[str, Any] | None, sizes: Sequence[tuple[int, int]], model: Autoencoder
) -> dict[str, Any] | None:
    """What is made of pictures, by `--low-res` and `--encode-hint`; None where hints are copied, or there are none.
    Raises UserError for what cannot be made of pictures of these sizes."""
    if args.low_res and args.encode_hint:
        what = "--low-res and --encode-hint: each makes extra-image.npy, and there is one"
        raise UserError(what, hint="leave one of them out")
    if args.encode_hint:
        if not hint or hint["channels"] != model.image_channels:
            what = f"--encode-hint: there are no hints of {model.image_channels} channels beside these pictures"
            command = "make_shards pack SOURCE --output DIR --hint picture --hint-files DIR"
            raise UserError(what, hint=f"pack them with pictures beside: {command}", code=DATA)
        return {"kind": "source"}
    if not args.low_res:
        return None
    sides = {side for size in sizes for side in size}
    if args.low_res < model.factor or any(side % args.low_res for side in sides):
        odd = next((size for size in sizes if any(side % args.low_res for side in size)), sizes[0])
        what = f"--low-res {args.low_res}: does not fit pictures of {odd[0]}x{odd[1]}"
        fits = [n for n in range(max(2, model.factor), min(sides) + 1) if not any(side % n for side in sides)]
        raise UserError(what, hint=f"what divides their sides and is no less than the autoencoder's: {fits[:6]}")
    if hint:
        note("--low-res takes the place of the hints beside these pictures, which are left out")
    return {"kind": "low-res", "factor": args.low_res}


def said(plan: Mapping[str, Any]) -> str:
    """What stands beside latents, for people."""
    features = f", {vision['width']} features of a vision model" if (vision := plan[VISION]) else ""
    if image := plan["image"]:
        small = image["kind"] == "low-res"
        return (f", pictures {image['factor']} times smaller" if small else ", hints encoded") + features
    return (f", hints of {plan['hint']['kind']}" if plan["hint"] else "") + features


def trained(image: Mapping[str, Any] | None) -> list[str]:
    """The flags of a training that is shown what `planned` says; none where hints are copied, or there are none."""
    return [word for key, value in (image or {}).items() for word in (f"--image.{key}", str(value))]


def made_small(pixels: Tensor, factor: int) -> Tensor:
    """uint8 (B, C, H, W) -> (B, C, H / factor, W / factor): the mean of each square, to the nearest number, halves to
    the even one; what `ldm.inverse.operators.Box` keeps of a picture."""
    squares = pixels.unfold(2, factor, factor).unfold(3, factor, factor)
    return squares.flatten(-2).double().mean(-1).round().to(pixels.dtype)
