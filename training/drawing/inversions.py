"""Starts from the noise that a walk finds for a picture: DDIM inversion, edit-friendly inversion, a style's noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from training.drawing.given import Given, Size, given, reader
from training.drawing.start import Group, Start, source_of
from training.errors import UserError
from training.ledger import Ledger
from training.settings import decoding

if TYPE_CHECKING:
    import argparse

    from PIL.Image import Image
    from torch import Tensor

    from ldm.coupling import Coupling
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
        "edit_friendly": ("edit_friendly", bool), "strength": ("strength", float),
    }  # fmt: skip
    sources: Sequence[Given]
    prompt: str
    iterations: int
    edit_friendly: bool
    strength: float

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """Add `--invert`, `--invert-prompt`, `--invert-iterations` and `--edit-friendly`."""
        add = group.add_argument
        add("--invert", metavar="FILE|DIR", help="begin from the noise that DDIM inversion finds for it")
        add("--invert-prompt", metavar="TEXT", default="", help="what --invert's picture shows")
        text = "fixed-point iterations in each step of --invert: the more, the nearer an unguided way back (default: 1)"
        add("--invert-iterations", metavar="N", type=int, help=text)
        text = "find draws of an ancestral sampler for --invert instead: its own prompt gives it back at any guidance"
        add("--edit-friendly", action="store_true", help=text)

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
        if args.strength is not None and not args.edit_friendly:
            raise UserError("--strength is for --image, or for --invert with --edit-friendly", hint="leave it out")
        strength = 0.64 if args.strength is None else args.strength
        sources = given("--invert", args.invert, ledger)
        return cls(sources, args.invert_prompt, iterations, args.edit_friendly, strength if args.edit_friendly else 1.0)

    def facts(self, request: Request) -> dict[str, Any]:
        """The prompt of the inversion, how it was made, and the sha256 of its picture."""
        how: dict[str, Any] = {"iterations": self.iterations, "edit_friendly": self.edit_friendly}
        how |= {"strength": self.strength} if self.edit_friendly else {}
        return {"prompt": self.prompt, "sha256": source_of(request).sha256, **how}

    def tasks(self, pipeline: Pipeline, sampling: Sampling, size: Size | None,
              ledger: Ledger) -> Callable[[list[Request]], Iterator[Group]]:
        """The noise of each picture, found with the grid that the drawing then walks down."""
        import torch

        from ldm.image_tasks import edit_friendly_inversion
        from ldm.tasks import Task

        read = reader(pipeline.autoencoder.image_channels, size or pipeline.size, ledger)
        if self.edit_friendly:
            return lambda requests: iter([(requests, edit_friendly_inversion(
                pipeline, [read(source_of(request)) for request in requests], self.prompt, strength=self.strength,
                sampling=sampling))])
        if getattr(sampling.guidance, "scale", 1) != 1:
            what = "inversions drawn with guidance: their own prompt does not give the picture back either"
            ledger.add("guessed", what, "--guidance-scale 1 does, --edit-friendly at any scale")

        noise_of = noises(pipeline, read, sampling, self.iterations)

        def tasks(requests: list[Request]) -> Iterator[Group]:
            start = torch.cat([noise_of(source_of(request), self.prompt) for request in requests])
            yield requests, lambda part: Task(start=start[part])

        return tasks


@dataclass(frozen=True)
class Styled(Start):
    """In the style of a picture, which is inverted and drawn beside each: its keys and values, its statistics."""

    kind: ClassVar[str] = "style"
    fact: ClassVar[str] = "style"
    inputs: ClassVar[dict[str, str]] = {"sha256": "style", "image_sha256": "image"}
    settings: ClassVar[dict[str, tuple[str, type]]] = {"prompt": ("style_prompt", str), "settings": ("coupling", dict)}
    style: Given
    prompt: str
    coupling: Coupling
    sources: Sequence[Given] = ()

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """Add `--style` and `--style-prompt`."""
        add = group.add_argument
        text = "draw in the colours and textures of this picture; with --image, that one in its style"
        add("--style", metavar="FILE", help=text)
        add("--style-prompt", metavar="TEXT", default="", help="what --style's picture shows")

    @classmethod
    def from_flags(cls, args: argparse.Namespace, ledger: Ledger) -> Styled | None:
        """The picture of `--style`, where it is given, and those of `--image`."""
        if not args.style:
            return None
        found = given("--style", args.style, ledger)
        if len(found) > 1:
            raise UserError(f"--style {args.style}: one picture is a style, this folder has {len(found)}",
                            hint="give one file of it")
        sources = given("--image", args.image, ledger) if args.image else []
        return cls(found[0], args.style_prompt, coupling_of(args, "style"), sources)

    def facts(self, request: Request) -> dict[str, Any]:
        """Both pictures, and how much is shared."""
        own = {"image_sha256": request.source.sha256} if request.source else {}
        how = {"prompt": self.prompt, "settings": decoding.values_of(self.coupling)}
        return {"sha256": self.style.sha256, **own, **how}

    def tasks(self, pipeline: Pipeline, sampling: Sampling, size: Size | None,
              ledger: Ledger) -> Callable[[list[Request]], Iterator[Group]]:
        """All requests together, each from its own noise or from that of its picture."""
        import torch

        from ldm.image_tasks import styled

        read = reader(pipeline.autoencoder.image_channels, size or pipeline.size, ledger)

        noise_of = noises(pipeline, read, sampling)

        def tasks(requests: list[Request]) -> Iterator[Group]:
            own = [noise_of(r.source, r.prompt) for r in requests if r.source]
            content = torch.cat(own) if own else None
            yield requests, styled(pipeline, noise_of(self.style, self.prompt), self.prompt, self.coupling, content)

        return tasks


def coupling_of(args: argparse.Namespace, kind: str) -> Coupling:
    """A coupling of a kind with the settings of `--coupling.KEY`, or those that `--like` read."""
    told = isinstance(args.coupling, dict)
    coupling: Coupling = (decoding.recalled("coupling", {**args.coupling, "kind": kind}) if told
                          else decoding.chosen("coupling", {**args.overrides, "coupling.kind": kind}))  # fmt: skip
    return coupling


def noises(pipeline: Pipeline, read: Callable[[Given], Image], sampling: Sampling,
           iterations: int = 1) -> Callable[[Given, str], Tensor]:
    """The noise (1, C, h, w) that inversion finds for a picture under a prompt, kept for those drawn several times."""
    from autoencoder.images import to_unit
    from ldm.image_tasks import as_pixels, inverted

    @lru_cache(maxsize=64)
    def noise_of(source: Given, prompt: str) -> Tensor:
        return inverted(pipeline, to_unit(as_pixels(pipeline, [read(source)])), prompt, sampling, iterations)

    return noise_of
