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
from training.drawing.hints import Shown
from training.drawing.start import Start
from training.errors import CHECKPOINT, DATA, UserError, as_user_error
from training.ledger import Ledger

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from ldm.pipeline import Pipeline
    from training.drawing.requests import Request
    from training.models.adapters import Chosen
    from training.pictures.hints import Bytes

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
class Controls:
    """The controls of a drawing, and the shares of noise at which they work; `asked`: pixels, where asked for."""

    shown: list[Shown]
    interval: tuple[float, float]
    asked: Size | None
    ledger: Ledger

    @property
    def chosen(self) -> list[Chosen]:
        """The runs, with their weights."""
        return [one.chosen for one in self.shown if one.chosen]

    def begin(self, pipeline: Pipeline) -> None:
        """Have the branches work in their interval. Raises UserError for none."""
        with as_user_error("as --control-interval 0.3 1, which is the first 70 % of the way from noise"):
            backbone: Any = pipeline.denoiser.backbone
            for branch in getattr(backbone, "branches", ()):  # none where the model itself is shown the hint
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
    from training.models.hints import hint_read

    for run, _ in adapters.chosen(args):
        if (reads := hint_read(run)) and not reads.by_model:
            hint = f"--control {run} --hint FILE"
            raise UserError(f"--adapter {run}: is a control, which is shown a hint", hint=hint)
    files, flag = (args.hint_of, "--hint-of") if args.hint_of else (args.hint, "--hint")
    if args.hint and args.hint_of:
        raise UserError("--hint and --hint-of: one gives hints, the other makes them", hint="leave one of them out")
    own = hint_read(args.model)
    if own and args.control:
        what = f"--control: {args.model} is itself shown a hint, and controls are learned upon models that are not"
        raise UserError(what, hint="leave --control out, and give the model's own --hint FILE")
    if not args.control and (args.control_scale or (args.control_interval and (own is None or own.by_model))):
        raise UserError("--control-scale and --control-interval: are of controls", hint="give --control RUN")
    if (count := len(args.control) or bool(own)) != len(files):
        what = f"{len(files)} hints were given, and {len(args.control)} controls" if not own else (
            f"{len(files)} hints were given, and the model is shown one")
        raise UserError(what, hint="give one --hint FILE or --hint-of FILE for each --control RUN, in their order")
    if not count:
        return None
    if start.kind not in STARTS or args.windows:
        what = f"--hint: not with {'--windows' if args.windows else start.kind}"
        raise UserError(what, hint="it goes with drawings from noise, with --image and with --mask")
    runs: list[Chosen | None] = [*_chosen(args)] or [None]
    shown = [_shown(args.model, chosen, flag, file, start, ledger) for chosen, file in zip(runs, files, strict=True)]
    low, high = args.control_interval or (0.0, 1.0)
    return Controls(shown, (low, high), asked, ledger)


def _shown(model: str, chosen: Chosen | None, flag: str, file: str, start: Start, ledger: Ledger) -> Shown:
    """What a control, or the model itself, is shown. Raises UserError for a run that is shown no hint, and for what no
    hint can be made of."""
    from training.models.hints import hint_read

    run = str(chosen.run if chosen else model)
    reads = hint_read(run)
    if reads is None or (chosen and reads.by_model):
        hint = f"an adapter that reads none is put to work with --adapter {run}"
        raise UserError(f"--control {run}: is no control, which is shown a hint", hint=hint)
    if not start.sources and Path(file).is_dir():
        what = f"{flag} {file}: is a folder, and nothing says which picture of it"
        raise UserError(what, hint="give one file; folders go with --image DIR, by name", code=DATA)
    of = beside(flag, file, list(start.sources), ledger)
    shown = Shown(run, chosen, reads, flag, of, flag == "--hint-of")
    if shown.made and not (reads.kind and shown.hint.of_pixels):
        what = f"--hint-of {file}: {run} reads hints of {reads.kind or 'a kind it does not say'}"
        raise UserError(what, hint="only edges and masks are made of a picture: give it with --hint FILE")
    return shown


def _chosen(args: argparse.Namespace) -> list[Chosen]:
    """The controls asked for, each by all of its weights."""
    from training.models.adapters import parse_chosen

    runs = [parse_chosen("--control", text) for text in args.control]
    scales = _scales(args.control_scale, len(runs))
    return [run._replace(weight=run.weight * scale) for run, scale in zip(runs, scales, strict=True)]


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
    if not told:
        return
    flag = "hint_of" if told["made"] else "hint"
    if len(getattr(args, flag)) != len(told["hints"]):
        names = ", ".join(name for name, _ in told["hints"])
        what = f"{path} was drawn by hints {'made of pictures' if told['made'] else 'in files'} ({names})"
        raise UserError(what, hint=f"give them in the same order with --{flag.replace('_', '-')}", code=DATA)
    from training.drawing import adapters

    args.control = adapters.reweighed("--control", args.control, [weight for _, weight in runs])
    args.control_interval = told["interval"] if told["interval"] != [0.0, 1.0] else None


def sound(told: Any) -> bool:
    """Whether the facts in a picture are of the kinds that `facts` gives."""
    def pairs(name: str, second: tuple[type, ...]) -> bool:
        return isinstance(told.get(name), list) and len(told[name]) <= MOST and all(
            isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is str and type(pair[1]) in second
            for pair in told[name])

    return (isinstance(told, dict) and pairs("runs", (float, int)) and pairs("hints", (str,))
            and len(told["hints"]) == max(1, len(told["runs"])) and type(told.get("made")) is bool
            and isinstance(told.get("interval"), list) and len(told["interval"]) == 2
            and all(type(end) in (float, int) for end in told["interval"]))  # fmt: skip


def compare(path: Path, then: Any, now: Any) -> None:
    """Raises UserError (exit 4) where the picture at `path` was drawn by other hints than those of now."""
    for (name, before), (_, given) in zip((then or {}).get("hints", []), (now or {}).get("hints", []), strict=True):
        if before != given:
            what = f"{path} was drawn by another hint than the one given for {name}"
            flag = "--hint-of" if then["made"] else "--hint"
            raise UserError(what, hint=f"give the same file with {flag}", code=CHECKPOINT)
