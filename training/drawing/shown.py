"""Drawings of a model that is shown an image: a picture that it changes, and what it is not drawn without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from training.drawing.given import Given, Size, reader
from training.drawing.start import Group, Start, alike, source_of, tell_size
from training.errors import UserError
from training.ledger import Ledger

Drawer = TypeVar("Drawer", bound="Pipeline")

if TYPE_CHECKING:
    import argparse

    from ldm.pipeline import Pipeline, Sampling
    from training.drawing.requests import Request


@dataclass(frozen=True)
class Instructed(Start):
    """Each picture changed as the prompt says, by a model that was trained to: image.kind "source"."""

    kind: ClassVar[str] = "instruction"
    fact: ClassVar[str] = "instruct"
    inputs: ClassVar[dict[str, str]] = {"sha256": "image"}
    settings: ClassVar[dict[str, tuple[str, type]]] = {
        "strength": ("strength", float), "start_time": ("start_time", float),
    }  # fmt: skip
    shows: ClassVar[tuple[str, ...]] = ("source",)
    sources: Sequence[Given]
    walk: dict[str, Any]

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """`--image` is there already."""

    @classmethod
    def from_flags(cls, args: argparse.Namespace, ledger: Ledger) -> None:
        """None: `--image` becomes this start where the model was trained so, as `ImageToImage.settled` finds."""

    def facts(self, request: Request) -> dict[str, Any]:
        """The picture, and how far it was noised."""
        source = source_of(request)
        return {"sha256": source.sha256, "name": source.name, **{key: self.walk[key] for key in self.settings}}

    def tasks(self, pipeline: Pipeline, sampling: Sampling, size: Size | None,
              ledger: Ledger) -> Callable[[list[Request]], Iterator[Group]]:
        """Pictures of one size together."""
        from ldm.shown_tasks import instructed

        read = reader(pipeline.autoencoder.image_channels, size, ledger)

        def tasks(requests: list[Request]) -> Iterator[Group]:
            for group in alike(requests, read):
                pictures = [read(source_of(request)) for request in group]
                tell_size(pipeline, pictures[0].size, 0, ledger)
                walk = {key: self.walk[key] for key in self.settings if self.walk[key] is not None}
                yield group, instructed(pipeline, pictures, **walk)

        return tasks


def settled(start: Start, pipeline: Pipeline, args: argparse.Namespace) -> Start:
    """The start that this is with the model that draws. Raises UserError where that needs an image, and gets none."""
    start = start.settled(pipeline, args)
    shown(pipeline, *start.shows, *(["hint"] if args.hint or args.hint_of else []))
    return start


def shown(pipeline: Drawer, *kinds: str) -> Drawer:
    """The pipeline. Raises UserError where its model is shown an image, and what is given is of other `kinds`."""
    kind = pipeline.image.kind
    if kind not in ("none", *kinds):
        what = f"the model is shown an image besides the prompt (image.kind {kind}), and none is given"
        raise UserError(what, hint=f"give it: {pipeline.image.drawn_with}")
    return pipeline
