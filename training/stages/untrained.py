"""An autoencoder without parameters: nothing to train, only to measure and to export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from autoencoder.base import Autoencoder
from training.data.images import Images
from training.data.samples import Batch
from training.errors import UserError
from training.loop.stage import StatelessStage
from training.models.reconstructions import measure
from training.settings.decoding import AutoencoderConfig

if TYPE_CHECKING:
    import argparse


class UntrainedStage(StatelessStage):
    """A stage of no networks, whose run ends before its first step."""

    def __init__(self, config: AutoencoderConfig, model: Autoencoder, dataset: Images, held_out: Images) -> None:
        self.config, self.model, self.dataset, self.held_out = config, model, dataset, held_out
        self.networks, self.averaged, self.optimizers = {}, {}, {}
        self.frozen, self.score = [model], ("psnr", -1.0)

    def connect(self) -> None:
        """Nothing is shared by processes."""

    def compiled_parts(self) -> list[nn.Module]:
        """None."""
        return []

    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """There are no steps."""
        raise AssertionError("a stage without networks takes no step")

    def evaluate(self, folder: Path) -> dict[str, float]:
        """PSNR and SSIM of held-out pictures, and a grid of input, output, error."""
        batches = self.held_out.chunks(self.held_out.evenly(self.config.train.validation_size), 64, "validating")
        return measure(self.model, None, (batch.data.to(self.accelerator.device) for batch in batches), folder)

    def normalise(self) -> None:
        """The latents stay the pictures in [-1, 1]."""


def check_no_lessons(args: argparse.Namespace) -> None:
    """Raises UserError where a flag names what a model without parameters should learn from or begin with."""
    for flag in ("teacher", "align_with", "init_from"):
        if getattr(args, flag):
            what = f"--{flag.replace('_', '-')}: an identity autoencoder has no weights, and nothing to learn"
            raise UserError(what, hint="leave it out, or choose another --config")
