"""What a start of a drawing is: its flags, what a picture says of it, and the task that it gives the pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.drawing.given import Given, Size
from training.errors import CHECKPOINT, DATA, UserError
from training.ledger import Ledger

if TYPE_CHECKING:
    import argparse

    from PIL.Image import Image

    from ldm.pipeline import Pipeline, Sampling
    from ldm.tasks import Tasks
    from training.drawing.requests import Request

Group = tuple[list["Request"], "Tasks | None"]  # requests that are drawn together, and how


class Start(ABC):
    """A way to begin. `fact` is the key under which a picture tells of it; `sources` are the pictures it begins from,
    each drawn with every caption, none where there is nothing but noise.

    `inputs`: the flag of each file it is given, by the key of the file's hash in the facts; the first is the picture it
    begins from. `settings`: the flags whose values a picture keeps, with their types, by their key in the facts.
    `shows`: the kinds of image conditions that it gives a model the image of.
    Free of torch at import: the command line asks each member for its flags.
    """

    kind: ClassVar[str]
    fact: ClassVar[str]
    inputs: ClassVar[dict[str, str]] = {}
    settings: ClassVar[dict[str, tuple[str, type]]] = {}
    shows: ClassVar[tuple[str, ...]] = ()
    sources: Sequence[Given]

    @classmethod
    @abstractmethod
    def add_flags(cls, group: Any) -> None:
        """Add the flags that ask for it and that no earlier member has added."""

    @classmethod
    @abstractmethod
    def from_flags(cls, args: argparse.Namespace, ledger: Ledger) -> Start | None:
        """The start that the flags ask for, if it is this kind. Raises UserError for flags that contradict."""

    def settled(self, pipeline: Pipeline, args: argparse.Namespace) -> Start:
        """The start that this is with the model that draws."""
        return self

    @abstractmethod
    def facts(self, request: Request) -> dict[str, Any]:
        """What the picture of a request says of it: the hashes of its `inputs`, and its `settings`."""

    @abstractmethod
    def tasks(self, pipeline: Pipeline, sampling: Sampling, size: Size | None,
              ledger: Ledger) -> Callable[[list[Request]], Iterator[Group]]:
        """From requests to those that are drawn together, each with its task. `size`: pixels, where they are asked for;
        what of a given picture is not used goes into the `ledger`."""

    def seed_of(self, request: Request) -> int:
        """The seed that the model draws a request with."""
        return request.seed

    @classmethod
    def recall(cls, args: argparse.Namespace, path: Path, facts: dict[str, Any]) -> None:
        """Put what the picture at `path` tells of this start where flags would put it.

        Raises UserError (exit 3) where a file it was made from is not given: files are not stored.
        """
        for key, flag in cls.inputs.items():
            if facts.get(key) and not getattr(args, flag):
                named = f" ({facts['name']})" if "name" in facts else ""
                what = f"{path} was begun from another picture{named}"
                raise UserError(what, hint=f"give its file with --{flag}", code=DATA)
            if getattr(args, flag) and Path(getattr(args, flag)).is_dir():
                raise UserError(f"--like draws one picture, and --{flag} is a folder", hint="give the one file of it")
        for key, (flag, _) in cls.settings.items():
            setattr(args, flag, facts.get(key, getattr(args, flag)))

    @classmethod
    def sound(cls, facts: Any) -> bool:
        """Whether the facts in a picture, which anyone may have written, are of the kinds that `facts` gives."""
        return (isinstance(facts, dict)
                and all(isinstance(facts.get(key), str | None) for key in cls.inputs)
                and (not cls.inputs or any(isinstance(facts.get(key), str) for key in cls.inputs))
                and all(isinstance(facts.get(key), kind | None) for key, (_, kind) in cls.settings.items()))

    @classmethod
    def compare(cls, path: Path, then: Any, now: Any) -> None:
        """Raises UserError (exit 4) where the picture at `path` was begun from other files than those of now."""
        for key, flag in cls.inputs.items():
            if (then or {}).get(key) != (now or {}).get(key):
                what = f"{path} was begun from another file than --{flag}'s"
                raise UserError(what, hint=f"give the same file with --{flag}", code=CHECKPOINT)


def alike(requests: list[Request], read: Callable[[Given], Image]) -> Iterator[list[Request]]:
    """Requests one after another whose pictures are of one size."""
    for _, group in groupby(requests, lambda request: read(source_of(request)).size):
        yield list(group)


def source_of(request: Request) -> Given:
    """The picture a request begins from, where every one has one."""
    assert request.source is not None
    return request.source


def tell_size(pipeline: Pipeline, size: Size, windows: int, ledger: Ledger) -> None:
    """Write down how a picture of `size` (width, height) is drawn that is not of the trained size."""
    width, height = size
    if height % pipeline.multiple or width % pipeline.multiple:
        ledger.add("replaced", f"pictures drawn on a canvas that {pipeline.multiple} divides, then cut back",
                   f"{width}x{height}")
    if (height, width) not in (pipeline.size, *pipeline.sizes) and not windows:
        larger = "" if pipeline.hints else ", or --windows for larger ones"
        ledger.add("guessed", f"drawn at another size than the trained {pipeline.size[1]}x{pipeline.size[0]}: "
                              f"--size{larger}", f"{width}x{height}")
