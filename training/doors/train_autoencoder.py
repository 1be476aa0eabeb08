"""Stage one: train an autoencoder on packed images."""

from __future__ import annotations

import sys

from training.settings.flags import TrainParser


def main() -> None:
    """Read the flags and train."""
    args = stage_one(__doc__ or "").read_training()
    from training.stages.train import train

    sys.exit(train(args, "autoencoder"))


def stage_one(description: str) -> TrainParser:
    """The flags of the training of an autoencoder."""
    parser = TrainParser(description, "autoencoder")
    parser.data.add_argument("--data", metavar="DIR", help="packed images (make_shards pack)")
    parser.data.add_argument("--lpips-weights", metavar="FILE", help="torchvision weights of the LPIPS backbone")
    text = "learn the latents of this finished autoencoder, as a preview of it: use with --config tiny"
    parser.data.add_argument("--teacher", metavar="RUN", help=text)
    text = "frozen Hugging Face vision model, folder or name, whose features the latents follow as loss.align weighs"
    parser.data.add_argument("--align-with", metavar="DIR", help=text)
    return parser
