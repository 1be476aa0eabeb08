"""Starts from a picture's own noise: DDIM inversion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from training.drawing.given import Given, given, reader
from training.drawing.start import Group, Size, Start, source_of
from training.errors import UserError
from training.ledger import Ledger

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from ldm.pipeline import Pipeline, Sampling
    from training.drawing.requests import Request


@dataclass(frozen=True)
class Inversion(Start):
    """The noise from which DDIM draws a given picture again, found by walking the grid upwards."""

    kind: ClassVar[str] = "inversion"
    fact: ClassVar[str] = "invert"
    inputs: ClassVar[dict[str, str]] = {"sha256": "invert"}
    settings: ClassVar[dict[str, tuple[str, type]]] = {
        "prompt": ("invert_prompt", str), "iterations": ("invert_iterations", int),
    }  # fmt: skip
    sources: Sequence[Given]
    prompt: str
    iterations: int

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """Add `--invert`, `--invert-prompt` and `--invert-iterations`."""
        add = group.add_argument
        add("--invert", metavar="FILE|DIR", help="begin from the noise that DDIM inversion finds for it")
        add("--invert-prompt", metavar="TEXT", default="", help="what --invert's picture shows")
        text = "fixed-point iterations in each step of --invert: the more, the nearer an unguided way back (default: 1)"
        add("--invert-iterations", metavar="N", type=int, help=text)

    @classmethod
    def from_flags(cls, args: argparse.Namespace, ledger: Ledger) -> Inversion | None:
        """The picture of `--invert`, where it is given."""
        if not args.invert:
            return None
        if args.image:
            raise UserError("--invert and --image both say what to begin from", hint="leave one of them out")
        iterations = 1 if args.invert_iterations is None else args.invert_iterations
        if iterations < 1:
            raise UserError(f"--invert-iterations: must be at least 1 (got {iterations})", hint="1 is DDIM's own rule")
        return cls(given("--invert", args.invert, ledger), args.invert_prompt, iterations)

    def facts(self, request: Request) -> dict[str, Any]:
        """The prompt of the inversion and the sha256 of its picture."""
        return {"prompt": self.prompt, "sha256": source_of(request).sha256, "iterations": self.iterations}

    def tasks(self, pipeline: Pipeline, sampling: Sampling, size: Size | None,
              ledger: Ledger) -> Callable[[list[Request]], Iterator[Group]]:
        """The noise of each picture, found with the grid that the drawing then walks down."""
        import torch

        from autoencoder.images import to_unit
        from ldm.image_tasks import as_pixels, inverted
        from ldm.tasks import Task

        read = reader(pipeline.autoencoder.image_channels, size or pipeline.size, ledger)
        if getattr(sampling.guidance, "scale", 1) != 1:
            what = "inversions drawn with guidance: their own prompt does not give the picture back either"
            ledger.add("guessed", what, "--guidance-scale 1 does, --edit-friendly at any scale")

        @lru_cache(maxsize=64)
        def noise_of(source: Given) -> Tensor:
            images = to_unit(as_pixels(pipeline, [read(source)]))
            return inverted(pipeline, images, self.prompt, sampling, self.iterations)

        def tasks(requests: list[Request]) -> Iterator[Group]:
            start = torch.cat([noise_of(source_of(request)) for request in requests])
            yield requests, lambda part: Task(start=start[part])

        return tasks
