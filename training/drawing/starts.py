"""Where a drawing begins: the family of starts. Each seed's own noise, a picture, or a measurement of one.

A new start is a `Start` and an entry in `STARTS`: its flags, its task, and what a picture says of it, so that `--like`
can repeat it. Free of torch at import: the command line asks each member for its flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from training.drawing.cascades import Cascaded
from training.drawing.edits import ImageToImage, Inpainting, Outpainting
from training.drawing.given import Given, Size
from training.drawing.inversions import Inversion, Styled
from training.drawing.restoration import Restoration
from training.drawing.shown import Instructed
from training.drawing.start import Group, Start
from training.ledger import Ledger
from training.messages import note

if TYPE_CHECKING:
    import argparse

    from ldm.pipeline import Pipeline, Sampling
    from training.drawing.requests import Request


@dataclass(frozen=True)
class OwnNoise(Start):
    """The noise of each picture's own seed."""

    kind: ClassVar[str] = "noise"
    fact: ClassVar[str] = "canvas"
    settings: ClassVar[dict[str, tuple[str, type]]] = {"windows": ("windows", int)}
    windows: int
    sources: Sequence[Given] = ()

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """The seed is a flag of every drawing."""

    @classmethod
    def from_flags(cls, args: argparse.Namespace, ledger: Ledger) -> OwnNoise:
        """The start of every drawing that no other kind claims."""
        return cls(args.windows)

    def facts(self, request: Request) -> dict[str, Any]:
        """The windows of a large canvas."""
        return {"windows": self.windows} if self.windows else {}

    def tasks(self, pipeline: Pipeline, sampling: Sampling, size: Size | None,
              ledger: Ledger) -> Callable[[list[Request]], Iterator[Group]]:
        """All requests together."""
        from ldm.image_tasks import windowed
        from ldm.tasks import Task

        if size and size not in (pipeline.size, *pipeline.sizes) and not self.windows:
            asked, trained = ("x".join(map(str, sides)) for sides in (size, pipeline.size))
            repeats = f"drawn at {asked}, while the model was trained at {trained}: things may be repeated or torn"
            if pipeline.hints:  # which go with no windows
                note(repeats)
            else:
                note(f"{repeats}; --windows N draws a larger picture in windows of the trained size")
        held = Task(hold=windowed(pipeline, self.windows))
        return lambda requests: iter([(requests, lambda part: held)])


STARTS: tuple[type[Start], ...] = (
    OwnNoise, Instructed, ImageToImage, Inpainting, Outpainting, Inversion, Styled, Restoration, Cascaded,
)  # fmt: skip
TOLD = {start.fact: start for start in STARTS}  # by the key in a picture's facts


BESIDE = {"coupling", "method", "invert_prompt"}  # flags that more than a start reads
SECTIONS = {"operator": ("restore",), "measurement": ("restore",), "posterior": ("restore", "mask"),
            "coupling": ("coupling", "style")}  # fmt: skip


def unread(args: argparse.Namespace, start: Start) -> list[str]:
    """The flags of other starts and the keys that were given, each with the word that nothing of this drawing reads it.
    """
    own = {flag for flag, _ in start.settings.values()} | {*start.inputs.values()} | BESIDE
    every = [flag for kind in STARTS for flag in (*(f for f, _ in kind.settings.values()), *kind.inputs.values())]
    flags = [flag for flag in dict.fromkeys(every) if flag not in own and getattr(args, flag)]
    flags += ["source_prompt"] if args.source_prompt and not args.coupling else []
    keys = [key for key in args.overrides or () if (by := SECTIONS.get(key.partition(".")[0]))
            and not any(getattr(args, flag) for flag in by)]  # fmt: skip
    return [f"--{word.replace('_', '-')}: nothing of this drawing reads it"
            for word in dict.fromkeys([*flags, *keys])]  # fmt: skip


def start_of_flags(args: argparse.Namespace, ledger: Ledger) -> Start:
    """The start that the flags ask for: the last member that finds its own among them."""
    return next(start for kind in reversed(STARTS) if (start := kind.from_flags(args, ledger)))
