"""Stage two: train a denoiser on encoded latents."""

from __future__ import annotations

import sys

from training.settings.families import SAMPLING, TRAINING, listing
from training.settings.flags import TrainParser


def main() -> None:
    """Read the flags and train."""
    parser = TrainParser(__doc__ or "", "denoiser")
    parser.epilog = f"{parser.epilog}\n\n{listing(TRAINING, SAMPLING)}"
    parser.data.add_argument("--latents", metavar="DIR", help="encoded latents (encode_latents)")
    parser.data.add_argument(
        "--text-encoder", metavar="NAME|DIR", help="frozen Hugging Face text encoder, for --text.kind huggingface"
    )
    text = "with --init-from: words or labels that the run does not know get rows of their own, after its rows"
    parser.data.add_argument("--new-words", action="store_true", help=text)
    args = parser.read_training()
    from training.stages.train import train

    sys.exit(train(args, "denoiser"))
