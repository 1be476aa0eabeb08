"""Starts from a picture: drawn again from some noise on, a hole of it filled, a canvas grown around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from training.drawing.filling import posterior_of
from training.drawing.given import Given, Size, beside, given, reader
from training.drawing.shown import Instructed
from training.drawing.start import Group, Start, alike, source_of, tell_size
from training.errors import DATA, UserError
from training.ledger import Ledger
from training.settings import decoding

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from ldm.inverse.posterior import Posterior
    from ldm.pipeline import Pipeline, Sampling
    from training.drawing.requests import Request

WALK: dict[str, tuple[str, type]] = {
    "strength": ("strength", float), "start_time": ("start_time", float), "windows": ("windows", int),
}  # fmt: skip
HOLE: dict[str, tuple[str, type]] = {"feather": ("feather", int), "fill": ("fill", str)}


def _walk(args: argparse.Namespace, strength: float) -> dict[str, Any]:
    """How far the walk goes. Raises UserError outside [0, 1], and where both flags are given."""
    for flag in ("strength", "start_time"):
        if (value := getattr(args, flag)) is not None and not 0 <= value <= 1:
            what = f"--{flag.replace('_', '-')}: must lie in [0, 1] (got {value:g})"
            raise UserError(what, hint="0 gives the picture back as the autoencoder has it, 1 begins from noise alone")
    if args.strength is not None and args.start_time is not None:
        raise UserError("--strength and --start-time both say where the walk begins", hint="leave one of them out")
    chosen = strength if args.strength is None and args.start_time is None else args.strength
    return {"strength": chosen, "start_time": args.start_time, "windows": args.windows}


@dataclass(frozen=True)
class ImageToImage(Start):
    """Each picture noised and drawn again."""

    kind: ClassVar[str] = "image-to-image"
    fact: ClassVar[str] = "image"
    inputs: ClassVar[dict[str, str]] = {"sha256": "image"}
    settings: ClassVar[dict[str, tuple[str, type]]] = WALK
    sources: Sequence[Given]
    walk: dict[str, Any]

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """Add `--image`, `--strength`, `--start-time` and `--windows`."""
        add = group.add_argument
        text = "draw this picture again, or each of a folder, with the caption beside it where no prompt is given"
        add("--image", metavar="FILE|DIR", help=text)
        text = "share of the sampler's steps that are walked: 0 the picture itself, 1 noise alone (default: 0.8)"
        add("--strength", metavar="S", type=float, help=text)
        add("--start-time", metavar="T", type=float, help="begin at this noise level t of the schedule instead")
        text = "draw what is larger than the trained size in windows of that size, N latents apart; 0 = whole"
        add("--windows", metavar="N", type=int, default=0, help=text)

    @classmethod
    def from_flags(cls, args: argparse.Namespace, ledger: Ledger) -> ImageToImage | None:
        """The pictures of `--image`, where it is given."""
        if not args.image or args.restore or args.style:
            return None
        return cls(given("--image", args.image, ledger), _walk(args, 0.8))

    def settled(self, pipeline: Pipeline, args: argparse.Namespace) -> Start:
        """With a model that is shown the picture a whole walk, where nothing else is said."""
        return Instructed(self.sources, _walk(args, 1.0)) if pipeline.image.kind in Instructed.shows else self

    def facts(self, request: Request) -> dict[str, Any]:
        """The picture, and how far it was noised."""
        source = source_of(request)
        return {"sha256": source.sha256, "name": source.name, **self.walk}

    def tasks(self, pipeline: Pipeline, sampling: Sampling, size: Size | None,
              ledger: Ledger) -> Callable[[list[Request]], Iterator[Group]]:
        """Pictures of one size together."""
        from ldm.image_tasks import image_to_image

        read = reader(pipeline.autoencoder.image_channels, size, ledger)

        def tasks(requests: list[Request]) -> Iterator[Group]:
            for group in alike(requests, read):
                pictures = [read(source_of(request)) for request in group]
                tell_size(pipeline, pictures[0].size, self.walk["windows"], ledger)
                yield group, image_to_image(pipeline, pictures, **_said(self.walk))

        return tasks


def _said(walk: dict[str, Any]) -> dict[str, Any]:
    """A walk as the tasks take it: a start time stands for the strength."""
    return {key: value for key, value in walk.items() if value is not None}


@dataclass(frozen=True)
class Inpainting(Start):
    """A hole of each picture drawn anew, all else kept bit for bit."""

    kind: ClassVar[str] = "inpainting"
    fact: ClassVar[str] = "inpaint"
    inputs: ClassVar[dict[str, str]] = {"sha256": "image", "mask_sha256": "mask"}
    settings: ClassVar[dict[str, tuple[str, type]]] = {
        **WALK, **HOLE, "invert_mask": ("invert_mask", bool), "posterior": ("method", dict),
    }  # fmt: skip
    shows: ClassVar[tuple[str, ...]] = ("masked",)
    sources: Sequence[Given]
    masks: Callable[[Given], Given]
    walk: dict[str, Any]
    hole: dict[str, Any]
    invert_mask: bool
    posterior: Posterior | None

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """Add `--mask`, `--invert-mask`, `--feather` and `--fill`."""
        add = group.add_argument
        text = "draw --image anew where this picture of its size is white, and nowhere else; or a folder of such"
        add("--mask", metavar="FILE|DIR", help=text)
        add("--invert-mask", action="store_true", help="draw anew where the mask is black instead")
        text = "pixels around the hole (of --mask or --outpaint) over which old and new are blended"
        add("--feather", metavar="PX", type=int, default=0, help=text)
        text = "what stands in the hole before the picture is encoded (default: nearest)"
        add("--fill", choices=("nearest", "grey"), help=text)

    @classmethod
    def from_flags(cls, args: argparse.Namespace, ledger: Ledger) -> Inpainting | None:
        """The pictures of `--image` with the holes of `--mask`, where that is given."""
        if not args.mask or args.restore:
            return None
        if not args.image:
            raise UserError("--mask needs the picture it is of", hint="give it with --image")
        sources = given("--image", args.image, ledger)
        masks = beside("--mask", args.mask, sources, ledger)
        return cls(sources, masks, _walk(args, 1.0), _hole(args), args.invert_mask, posterior_of(args))

    def facts(self, request: Request) -> dict[str, Any]:
        """The picture and its mask, and how the hole was drawn."""
        source = source_of(request)
        mask = self.masks(source)
        names = {"name": source.name, "mask_name": mask.name}
        hashes = {"sha256": source.sha256, "mask_sha256": mask.sha256}
        how = {"posterior": decoding.values_of(self.posterior)} if self.posterior else {}
        return {**hashes, **names, "invert_mask": self.invert_mask, **self.walk, **self.hole, **how}

    def tasks(self, pipeline: Pipeline, sampling: Sampling, size: Size | None,
              ledger: Ledger) -> Callable[[list[Request]], Iterator[Group]]:
        """Pictures of one size together, and of one mask where a posterior sampler fills it."""
        import torch

        from ldm.image_tasks import inpainting

        read = reader(pipeline.autoencoder.image_channels, size, ledger)

        def tasks(requests: list[Request]) -> Iterator[Group]:
            for group in self._together(alike(requests, read)):
                pictures = [read(source_of(request)) for request in group]
                holes = [hole_of(self.masks(source_of(r)), source_of(r), size, self.invert_mask) for r in group]
                tell_size(pipeline, pictures[0].size, self.walk["windows"], ledger)
                mask = torch.stack(holes[:1] if self.posterior else holes).to(pipeline.device)
                how = {**_said(self.walk), **self.hole, "posterior": self.posterior}
                yield group, inpainting(pipeline, pictures, mask, **how)

        return tasks

    def _together(self, groups: Iterator[list[Request]]) -> Iterator[list[Request]]:
        for group in groups:
            by_mask = groupby(group, lambda r: self.masks(source_of(r)).sha256 if self.posterior else "")
            yield from (list(part) for _, part in by_mask)


def _hole(args: argparse.Namespace) -> dict[str, Any]:
    if args.feather < 0:
        raise UserError(f"--feather: must be at least 0 (got {args.feather})", hint="leave it out for a hard edge")
    return {"feather": args.feather, "fill": args.fill or "nearest"}


@lru_cache(maxsize=8)  # for a picture that is drawn several times
def hole_of(mask: Given, source: Given, size: Size | None, invert: bool) -> Tensor:
    """(1, H, W), True where the mask is white, or black where that is asked for; fitted to `size` as its picture is.

    Raises UserError for a mask of another size than its picture, and for one all black or all white.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    picture, own = mask.decoded(1, Ledger()), source.size
    if picture.size != own:
        what = f"{mask.flag} {mask.name} has {picture.width}x{picture.height} pixels, {source.name} {own[0]}x{own[1]}"
        raise UserError(what, hint="save the mask in the size of its picture", code=DATA)
    if size and size != own[::-1]:
        picture = ImageOps.fit(picture, size[::-1], Image.Resampling.NEAREST)
    hole = torch.from_numpy(np.array(picture) >= 128)[None] ^ invert
    if not hole.any():
        hint = "paint white in it what is to be drawn"
        raise UserError(f"{mask.flag} {mask.name} leaves nothing to draw", hint=hint, code=DATA)
    if hole.all():
        hint = "paint black in it what is to stay, or leave --image and --mask out"
        raise UserError(f"{mask.flag} {mask.name} leaves nothing of {source.name}", hint=hint, code=DATA)
    return hole


@dataclass(frozen=True)
class Outpainting(Start):
    """A larger canvas around each picture, whose new part is drawn."""

    kind: ClassVar[str] = "outpainting"
    fact: ClassVar[str] = "outpaint"
    inputs: ClassVar[dict[str, str]] = {"sha256": "image"}
    settings: ClassVar[dict[str, tuple[str, type]]] = {**WALK, **HOLE, "margins": ("outpaint", str)}
    shows: ClassVar[tuple[str, ...]] = ("masked",)
    sources: Sequence[Given]
    margins: tuple[int, int, int, int]
    walk: dict[str, Any]
    hole: dict[str, Any]

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """Add `--outpaint`."""
        text = "draw so many pixels more on each side of --image: left, top, right, bottom"
        group.add_argument("--outpaint", metavar="L,T,R,B", help=text)

    @classmethod
    def from_flags(cls, args: argparse.Namespace, ledger: Ledger) -> Outpainting | None:
        """The pictures of `--image` and the margins of `--outpaint`, where that is given."""
        if not args.outpaint:
            return None
        if not args.image or args.mask:
            raise UserError("--outpaint takes a picture and no mask", hint="give --image, and leave --mask out")
        return cls(given("--image", args.image, ledger), parse_margins(args.outpaint), _walk(args, 1.0), _hole(args))

    def facts(self, request: Request) -> dict[str, Any]:
        """The picture, and what was drawn around it."""
        source, margins = source_of(request), ",".join(map(str, self.margins))
        return {"sha256": source.sha256, "name": source.name, "margins": margins, **self.walk, **self.hole}

    def tasks(self, pipeline: Pipeline, sampling: Sampling, size: Size | None,
              ledger: Ledger) -> Callable[[list[Request]], Iterator[Group]]:
        """Pictures of one size together, in windows of the trained size unless that is told otherwise; whole by a model
        that is shown the canvas."""
        from ldm.image_tasks import extended, inpainting

        left, top, right, bottom = self.margins
        inner = (size[0] - top - bottom, size[1] - left - right) if size else None
        if inner and min(inner) < 1:
            what = f"--size {size} leaves nothing of the picture within the margins of --outpaint"
            raise UserError(what, hint="--size is that of the whole canvas: give a larger one, or leave it out")
        read = reader(pipeline.autoencoder.image_channels, inner, ledger)
        own = 0 if pipeline.image.kind in self.shows else half_window(pipeline)
        walk = _said(self.walk) | {"windows": self.walk["windows"] or own}

        def tasks(requests: list[Request]) -> Iterator[Group]:
            for group in alike(requests, read):
                canvas, new = extended(pipeline, [read(source_of(request)) for request in group], self.margins)
                tell_size(pipeline, (canvas.shape[-1], canvas.shape[-2]), walk["windows"], ledger)
                # Nothing is hidden beyond the border, and what were drawn across it would be cut off.
                yield group, inpainting(pipeline, canvas, new, dilate=0, **walk, **self.hole)

        return tasks


def half_window(pipeline: Pipeline) -> int:
    """Latents: half the shorter side of the trained size."""
    return max(1, min(pipeline.latent_shape(pipeline.size)[1:]) // 2)


def parse_margins(text: str) -> tuple[int, int, int, int]:
    """`L,T,R,B`. Raises UserError for anything else."""
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        what = f"--outpaint {text}: expected four whole numbers L,T,R,B"
        raise UserError(what, hint="as --outpaint 0,0,32,0") from None
    if min(left, top, right, bottom) < 0 or not left + top + right + bottom:
        raise UserError(f"--outpaint {text}: none below 0, and at least one above", hint="as --outpaint 0,0,32,0")
    return left, top, right, bottom
