"""Stage two: train a denoiser on encoded latents; or, with --base, an adapter upon a trained one."""

from __future__ import annotations

import sys

from training.settings.families import SAMPLING, TRAINING, listing
from training.settings.flags import TrainParser


def main() -> None:
    """Read the flags and train."""
    args = stage_two(__doc__ or "").read_training()
    from training.stages.train import train

    sys.exit(train(args, "denoiser"))


def stage_two(description: str) -> TrainParser:
    """The flags of the training of a denoiser."""
    parser = TrainParser(description, "denoiser")
    parser.epilog = f"{parser.epilog}\n\n{listing(TRAINING, SAMPLING)}"
    parser.data.add_argument("--latents", metavar="DIR", help="encoded latents (encode_latents)")
    parser.data.add_argument(
        "--text-encoder", metavar="NAME|DIR", help="frozen Hugging Face text encoder, for --text.kind huggingface"
    )
    text = "learn an adapter, one of configs/adapter/, upon this trained denoiser, which stays as it is; or demo"
    parser.data.add_argument("--base", metavar="RUN", help=text)
    text = "with --init-from or --base: words or labels that the run does not know get rows after its own"
    parser.data.add_argument("--new-words", action="store_true", help=text)
    return parser
