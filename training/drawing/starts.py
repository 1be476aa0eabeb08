"""Where a drawing begins: the family of starts. Each seed's own noise, or the noise that inversion finds for a picture.

A new start is a class here and an entry in `STARTS`: its flags, its latents, and what a picture says of it, so that
`--like` can repeat it. Free of torch at import: the command line asks each member for its flags.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.errors import CHECKPOINT, DATA, UserError
from training.ledger import Ledger

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from ldm.pipeline import Pipeline, Sampling


class Start(ABC):
    """A way to begin. `fact` is the key under which a picture tells of it; the first start has none."""

    kind: ClassVar[str]
    fact: ClassVar[str]

    @classmethod
    @abstractmethod
    def add_flags(cls, group: Any) -> None:
        """Add the flags that ask for it."""

    @classmethod
    @abstractmethod
    def from_flags(cls, args: argparse.Namespace) -> Start | None:
        """The start that the flags ask for, if it is this kind."""

    @classmethod
    @abstractmethod
    def recall(cls, args: argparse.Namespace, path: Path, facts: Any) -> None:
        """Put what the picture at `path` tells of this start where flags would put it.

        Raises UserError for facts that are not this kind's, and where its ingredients are not given.
        """

    @abstractmethod
    def latents(
        self, pipeline: Pipeline, size: tuple[int, int], sampling: Sampling, ledger: Ledger
    ) -> Tensor | None:
        """Latents of t = 1 for a picture of `size`, or None for each seed's own noise; what of a given picture is not
        used goes into the `ledger`."""

    @abstractmethod
    def facts(self) -> dict[str, Any] | None:
        """What a picture says of it."""

    @classmethod
    @abstractmethod
    def sound(cls, facts: Any) -> bool:
        """Whether the facts in a picture, which anyone may have written, are of the kind that `facts` gives."""

    @classmethod
    @abstractmethod
    def compare(cls, path: Path, then: Any, now: Any) -> None:
        """Raises UserError (exit 4) where the picture at `path` told other facts of this start than those of now."""


@dataclass(frozen=True)
class OwnNoise(Start):
    """The noise of each picture's own seed."""

    kind: ClassVar[str] = "noise"
    fact: ClassVar[str] = ""

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """The seed is a flag of every drawing."""

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> OwnNoise:
        """The start of every drawing that no other kind claims."""
        return cls()

    @classmethod
    def recall(cls, args: argparse.Namespace, path: Path, facts: Any) -> None:
        """The seed is recalled for every drawing."""

    def latents(self, pipeline: Pipeline, size: tuple[int, int], sampling: Sampling, ledger: Ledger) -> None:
        """None: the pipeline draws each seed's noise itself."""
        return None

    def facts(self) -> None:
        """None: the seed in the picture says it all."""
        return None

    @classmethod
    def sound(cls, facts: Any) -> bool:
        """Whether there are none."""
        return facts is None

    @classmethod
    def compare(cls, path: Path, then: Any, now: Any) -> None:
        """A picture that began otherwise tells so under another start's key."""


@dataclass(frozen=True)
class Inversion(Start):
    """The noise from which DDIM draws a given picture again, found by walking the grid upwards (`Pipeline.invert`)."""

    kind: ClassVar[str] = "inversion"
    fact: ClassVar[str] = "invert"
    picture: Path
    prompt: str

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """Add `--invert` and `--invert-prompt`."""
        group.add_argument("--invert", metavar="IMAGE", help="begin from the noise that DDIM inversion finds for it")
        group.add_argument("--invert-prompt", metavar="TEXT", default="", help="what --invert's picture shows")

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> Inversion | None:
        """The picture of `--invert`, where it is given."""
        return cls(Path(args.invert), args.invert_prompt) if args.invert else None

    @classmethod
    def recall(cls, args: argparse.Namespace, path: Path, facts: Any) -> None:
        """Take over the prompt. Raises UserError (exit 3) without `--invert`: the picture itself is not stored."""
        args.invert_prompt = facts["prompt"]
        if not args.invert:
            raise UserError(f"{path} was begun from another picture", hint="give that with --invert", code=DATA)

    def latents(self, pipeline: Pipeline, size: tuple[int, int], sampling: Sampling, ledger: Ledger) -> Tensor:
        """The noise (1, C, h, w) that inversion finds. UserError for pictures or settings that do not serve."""
        import numpy as np
        import torch
        from PIL import Image, ImageOps

        from autoencoder.images import to_unit
        from training.pictures.decoding import load_image

        try:
            picture = load_image(self.picture, channels=pipeline.autoencoder.image_channels)
        except UserError as problem:
            hint = problem.hint or "give a picture file"
            raise UserError(f"--invert {self.picture}: {problem.what}", hint=hint, code=DATA) from None
        for effect, kind in picture.info["remarks"]:
            ledger.add(effect, kind, str(self.picture))
        if picture.size != size[::-1]:
            fitted = f"picture of --invert, its middle resized to {size[1]}x{size[0]}"
            ledger.add("cut", fitted, f"{self.picture} {picture.width}x{picture.height}")
        cut = ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(cut).reshape(*size, -1)).permute(2, 0, 1)[None].to(pipeline.device)
        try:
            return pipeline.invert(to_unit(pixels), [self.prompt], sampling)
        except ValueError as failure:
            raise UserError(str(failure), hint="see --help for sizes, samplers and grids") from None

    def facts(self) -> dict[str, str]:
        """The prompt of the inversion and the sha256 of its picture."""
        from training.files import file_sha256

        return {"prompt": self.prompt, "sha256": file_sha256(self.picture)}

    @classmethod
    def sound(cls, facts: Any) -> bool:
        """Whether both are there as texts."""
        return isinstance(facts, dict) and all(isinstance(facts.get(name), str) for name in ("prompt", "sha256"))

    @classmethod
    def compare(cls, path: Path, then: Any, now: Any) -> None:
        """Raises UserError (exit 4) where the picture inverted is another one; its hash tells."""
        if (then or {}).get("sha256") != (now or {}).get("sha256"):
            raise UserError(f"{path} was begun from another picture than --invert's", code=CHECKPOINT)


STARTS: tuple[type[Start], ...] = (OwnNoise, Inversion)
TOLD = {start.fact: start for start in STARTS if start.fact}  # by the key in a picture's facts


def start_of_flags(args: argparse.Namespace) -> Start:
    """The start that the flags ask for: the last member that finds its own among them."""
    return next(start for kind in reversed(STARTS) if (start := kind.from_flags(args)))
