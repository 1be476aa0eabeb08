"""What every training does beyond its gradient steps: opens its data, builds its stage, names its parts, exports.

A new kind of training is a `Job` and an entry in `train.JOBS`; `train.train` calls its methods in the order they stand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from training.loop.stage import Stage

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from accelerate import Accelerator
    from torch import Tensor


class Job(ABC):
    """One training. Raises UserError for what cannot be trained, as early as it can be known."""

    stage: ClassVar[str]  # the folder of configs/ and the name in run.json
    dataset: Any  # what is trained on, once `open_data` has found it
    held_out: Any  # and what is not

    def __init__(self, args: argparse.Namespace, config: Any) -> None:
        self.args, self.config = args, config

    @abstractmethod
    def open_data(self) -> None:
        """Find data and frozen parts; refuse, before anything is built, what the networks cannot take."""

    @abstractmethod
    def settle(self) -> None:
        """Fill in what the data decide of the config, whose global batch is settled."""

    @abstractmethod
    def build(self, accelerator: Accelerator, final: Path | None) -> Stage:
        """Networks and losses, initialised from the seed or another run; `final` is where the run will export."""

    def held(self) -> dict[str, nn.Module]:
        """The modules that it has built by name, besides those that its stage trains, calls or keeps itself."""
        return {}

    @abstractmethod
    def description(self) -> str:
        """The line that tells what is trained on what."""

    @abstractmethod
    def picture(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture that validation shows."""

    @abstractmethod
    def beside(self) -> int:
        """Bytes that `final` holds besides what is trained."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What names data and frozen parts in run.json: a resume with others is refused."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What the model card tells of the data besides its hash."""

    def counts(self) -> dict[str, Any]:
        """The samples trained on, of which a stream has no number, and those held out."""
        return {"train": None if self.args.stream else len(self.dataset), "held_out": len(self.held_out)}

    def buckets(self) -> dict[str, Any]:
        """The sizes of the buckets, where samples are in several, for the model card."""
        sizes = ", ".join(f"{height}x{width}" for height, width in self.dataset.sizes)
        return {"buckets": sizes} if sizes else {}

    def holds_out(self, least: int = 1) -> bool:
        """Whether so many samples are held out: `evaluate` measures on no other."""
        return len(self.held_out) >= least and self.held_out.shards.split != "train"

    def of_few(self) -> bool:
        """Whether few data, seen often, are the rule, so that nothing speaks against them."""
        return False

    @abstractmethod
    def begin(self, final: Path) -> None:
        """Write what `final` holds from the first step. In the main process."""

    @abstractmethod
    def export(self, run: Path, facts: dict[str, Any]) -> Mapping[str, Tensor]:
        """The last act, with averaged weights in place: the tensors of final/, and `facts` completed by `hashes`."""

    @abstractmethod
    def next_steps(self, run: Path) -> list[str]:
        """The commands that go on from the finished run, in their order."""


def parameters(module: Any) -> str:
    """Their number, for people."""
    return f"{sum(p.numel() for p in module.parameters()):,}"
