"""Controls of a drawing: `--control RUN[:WEIGHT]` with the hint it is shown, and what a picture says of them.

Free of torch, NumPy and Pillow at import.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.drawing.given import Given, Size, beside
from training.drawing.start import Start
from training.errors import CHECKPOINT, DATA, UserError, as_user_error
from training.ledger import Ledger

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from ldm.pipeline import Pipeline
    from training.drawing.requests import Request
    from training.models.adapters import Chosen
    from training.pictures.hints import Bytes, Hint

FACT = "controls"  # runs, weights and hints; the runs' hashes stand among those of the model
MOST = 16  # controls that a picture may tell of
STARTS = ("noise", "image-to-image", "inpainting")  # that controls go with


def add_flags(add: Callable[..., Any]) -> None:
    """Add `--control`, its hint, its weight and when it works."""
    text = "a control learned upon the model (train_denoiser --base), with a weight if not 1; repeatable"
    add("--control", metavar="RUN[:WEIGHT]", action="append", default=[], help=text)
    text = "the hint of each --control, in their order; or a folder, with --image DIR: the hint of each picture's name"
    add("--hint", metavar="FILE|DIR", action="append", default=[], help=text)
    text = "make the hint of this picture instead, by the rule that the control was trained on: its edges, say"
    add("--hint-of", metavar="FILE|DIR", action="append", default=[], help=text)
    text = "a further weight, of all controls or of each"
    add("--control-scale", metavar="X", type=float, nargs="+", default=[], help=text)
    text = "controls work at shares of noise sigma / (alpha + sigma) in LOW ... HIGH alone"
    add("--control-interval", metavar=("LOW", "HIGH"), type=float, nargs=2, help=text)


@dataclass(frozen=True)
class Shown:
    """A control, its weight, and the file that gives the hint of each request; `kind`: what its hints are, None where
    its run does not say; `made`: of the picture in that file, not what it holds."""

    chosen: Chosen
    channels: int
    kind: str | None
    flag: str
    of: Callable[[Given], Given]
    made: bool

    def values(self, given: Given, size: Size, ledger: Ledger) -> Bytes:
        """The hint (height, width, C) of a file for a drawing of `size` (height, width), told where it was resized.

        Raises UserError for what is no such hint, and where nothing says how it may be resized.
        """
        values, height_width = self._read(given, size, ledger), f"{size[1]}x{size[0]}"
        across, down = values.shape[1], values.shape[0]
        if values.min() == values.max():
            ledger.add("ignored", "hint of one value everywhere, which says nothing", given.name)
        if (down, across) == size:
            return values
        if self.kind is None:
            what = f"{self.flag} {given.name}: {across}x{down} for drawings of {height_width}, and {self.chosen.run} "
            hint = "give it in that size: lines are resized otherwise than depths"
            raise UserError(f"{what}does not say what its hints are", hint=hint, code=DATA)
        cut = abs(across * size[0] - down * size[1]) > max(size)
        effect = f"its middle resized to {height_width}" if cut else f"resized to {height_width}"
        ledger.add("cut" if cut else "replaced", f"hint of {self.flag}, {effect}", f"{given.name} {across}x{down}")
        scale = min(down / size[0], across / size[1])
        half = (across - size[1] * scale) / 2, (down - size[0] * scale) / 2
        return self.hint.resized(values, size, (half[0], half[1], across - half[0], down - half[1]))

    @cached_property
    def hint(self) -> Hint:
        """The member of the family that reads it."""
        from training.pictures.hints import hint_of

        return hint_of(self.kind or ("depth" if self.channels == 1 else "picture"))

    def _read(self, given: Given, size: Size, ledger: Ledger) -> Bytes:
        try:
            if self.made:
                return self._made(given, size, ledger)
            values, notes = self.hint.decoded(given.data)
        except UserError as problem:
            hint = f"this control reads hints of {self.kind or 'its own kind'}, of {self.channels} channels"
            raise UserError(f"{self.flag} {given.name}: {problem.what}", hint=hint, code=DATA) from None
        for effect, why in notes:
            ledger.add(effect, why, given.name)
        return values

    def _made(self, given: Given, size: Size, ledger: Ledger) -> Bytes:
        """The hint of a picture, whose middle is brought to the size of the drawing first."""
        import numpy as np
        from PIL import Image, ImageOps

        def fitted(picture: Image.Image) -> Any:
            return np.asarray(ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS))

        clear = given.decoded(4, Ledger()).getchannel("A")
        alpha = None if clear.getextrema()[0] == 255 else fitted(clear)
        return self.hint.made(fitted(given.decoded(3, ledger)), alpha).values


@dataclass(frozen=True)
class Controls:
    """The controls of a drawing, and the shares of noise at which they work; `asked`: pixels, where asked for."""

    shown: list[Shown]
    interval: tuple[float, float]
    asked: Size | None
    ledger: Ledger

    @property
    def chosen(self) -> list[Chosen]:
        """The runs, with their weights."""
        return [one.chosen for one in self.shown]

    def begin(self, pipeline: Pipeline) -> None:
        """Have the branches work in their interval. Raises UserError for none."""
        with as_user_error("as --control-interval 0.3 1, which is the first 70 % of the way from noise"):
            backbone: Any = pipeline.denoiser.backbone
            for branch in backbone.branches:
                branch.during(*self.interval, pipeline.denoiser.schedule)

    def extras(self, requests: list[Request], pipeline: Pipeline, size: Size) -> dict[str, Tensor]:
        """The hints of pictures that are drawn together, at their size: that of the picture they begin from, or
        `size`."""
        from ldm.image_tasks import padded

        begun = requests[0].source
        at = size if begun is None else self.asked or begun.size[::-1]
        names = ["image", *(f"image-{number}" for number in range(2, len(self.shown) + 1))]
        return {name: padded(self._batch(number, requests, at), pipeline.multiple)
                for number, name in enumerate(names)}  # fmt: skip

    def _batch(self, number: int, requests: list[Request], size: Size) -> Tensor:
        import torch

        files = [self.shown[number].of(file_of(request)) for request in requests]
        files = files[:1] if all(file is files[0] for file in files) else files
        values = [torch.from_numpy(self._values(number, file, size).copy()) for file in files]
        return torch.stack(values).permute(0, 3, 1, 2).float() / 255

    @cached_property
    def _values(self) -> Callable[[int, Given, Size], Bytes]:
        """A file's hint, read and told of once."""
        return lru_cache(maxsize=16)(lambda number, file, size: self.shown[number].values(file, size, self.ledger))

    def facts(self, request: Request) -> dict[str, Any]:
        """What the picture of a request says of them."""
        from training.models.folders import name_of

        files = [one.of(file_of(request)) for one in self.shown]
        return {
            "runs": [[name_of(run), weight] for run, weight in self.chosen],
            "hints": [[file.name, file.sha256] for file in files],
            "made": self.shown[0].made,
            "interval": list(self.interval),
        }


NOWHERE = Given("", "", b"")  # what a drawing from noise begins from


def file_of(request: Request) -> Given:
    """What a hint's file may be named after."""
    return request.source or NOWHERE


def controls_of(args: argparse.Namespace, start: Start, asked: Size | None, ledger: Ledger) -> Controls | None:
    """The controls that the flags ask for, with their hints read; None for none. Raises UserError where they are not of
    one number, for runs that are no controls, and for starts that they do not go with."""
    from training.drawing import adapters
    from training.models.adapters import hint_read, parse_chosen

    for run, _ in adapters.chosen(args):
        if hint_read(run):
            hint = f"--control {run} --hint FILE"
            raise UserError(f"--adapter {run}: is a control, which is shown a hint", hint=hint)
    files, flag = (args.hint_of, "--hint-of") if args.hint_of else (args.hint, "--hint")
    if args.hint and args.hint_of:
        raise UserError("--hint and --hint-of: one gives hints, the other makes them", hint="leave one of them out")
    if len(args.control) != len(files):
        what = f"{len(args.control)} controls and {len(files)} hints were given"
        raise UserError(what, hint="give one --hint FILE or --hint-of FILE for each --control RUN, in their order")
    if not args.control:
        return None
    if start.kind not in STARTS or args.windows:
        what = f"--control: not with {'--windows' if args.windows else start.kind}"
        raise UserError(what, hint="it goes with drawings from noise, with --image and with --mask")
    scales = _scales(args.control_scale, len(args.control))
    shown = []
    for text, file, scale in zip(args.control, files, scales, strict=True):
        run, weight = parse_chosen("--control", text)
        if (reads := hint_read(run)) is None:
            hint = f"an adapter that reads none is put to work with --adapter {run}"
            raise UserError(f"--control {run}: is shown no hint", hint=hint)
        chosen = parse_chosen("--control", text)._replace(weight=weight * scale)
        if not start.sources and Path(file).is_dir():
            what = f"{flag} {file}: is a folder, and nothing says which picture of it"
            raise UserError(what, hint="give one file; folders go with --image DIR, by name", code=DATA)
        of = beside(flag, file, list(start.sources), ledger)
        shown.append(Shown(chosen, reads.channels, reads.kind, flag, of, flag == "--hint-of"))
        if shown[-1].made and not (reads.kind and shown[-1].hint.of_pixels):
            what = f"--hint-of {file}: {run} reads hints of {reads.kind or 'a kind it does not say'}"
            raise UserError(what, hint="only edges and masks are made of a picture: give it with --hint FILE")
    low, high = args.control_interval or (0.0, 1.0)
    return Controls(shown, (low, high), asked, ledger)


def _scales(given: list[float], count: int) -> list[float]:
    if len(given) > 1 and count != len(given):
        what = f"--control-scale: {len(given)} numbers for {count} controls"
        raise UserError(what, hint="give one for all, or one each")
    if not all(map(math.isfinite, given)):
        raise UserError("--control-scale: must be finite numbers")
    return given if len(given) > 1 else (given or [1.0]) * count


def recall(args: argparse.Namespace, path: Path, told: Any) -> None:
    """Lay the weights and the interval that a picture tells over the controls that are given, with their hints.

    Raises UserError where it was drawn with more or fewer (exit 4), or a hint is not given (exit 3).
    """
    runs = told["runs"] if told else []
    if len(args.control) != len(runs):
        names = ", ".join(name for name, _ in runs) or "none"
        what = f"{path} was drawn with {len(runs)} controls ({names}), {len(args.control)} are given"
        raise UserError(what, hint="give the same ones in the same order with --control", code=CHECKPOINT)
    if not runs:
        return
    flag = "hint_of" if told["made"] else "hint"
    if len(getattr(args, flag)) != len(runs):
        names = ", ".join(name for name, _ in told["hints"])
        what = f"{path} was drawn by hints {'made of pictures' if told['made'] else 'in files'} ({names})"
        raise UserError(what, hint=f"give them in the same order with --{flag.replace('_', '-')}", code=DATA)
    from training.models.adapters import parse_chosen

    given = [parse_chosen("--control", text).run for text in args.control]
    args.control = [f"{run}:{weight}" for run, (_, weight) in zip(given, runs, strict=True)]
    args.control_interval = told["interval"]


def sound(told: Any) -> bool:
    """Whether the facts in a picture are of the kinds that `facts` gives."""
    def pairs(name: str, second: tuple[type, ...]) -> bool:
        return isinstance(told.get(name), list) and 0 < len(told[name]) <= MOST and all(
            isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is str and type(pair[1]) in second
            for pair in told[name])

    return (isinstance(told, dict) and pairs("runs", (float, int)) and pairs("hints", (str,))
            and len(told["runs"]) == len(told["hints"]) and type(told.get("made")) is bool
            and isinstance(told.get("interval"), list) and len(told["interval"]) == 2
            and all(type(end) in (float, int) for end in told["interval"]))  # fmt: skip


def compare(path: Path, then: Any, now: Any) -> None:
    """Raises UserError (exit 4) where the picture at `path` was drawn by other hints than those of now."""
    for (name, before), (_, given) in zip((then or {}).get("hints", []), (now or {}).get("hints", []), strict=True):
        if before != given:
            what = f"{path} was drawn by another hint than the one given for {name}"
            flag = "--hint-of" if then["made"] else "--hint"
            raise UserError(what, hint=f"give the same file with {flag}", code=CHECKPOINT)
