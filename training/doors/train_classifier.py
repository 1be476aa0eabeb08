"""Train a small classifier of captions on real packed pictures: a judge for generated ones."""

from __future__ import annotations

import sys

from training.settings.flags import Parser


def main() -> None:
    """Read the flags and train."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    parser.add_data("packed pictures whose captions are classes: folder or address", required=True)
    add("--output", metavar="DIR", required=True, help="where the classifier goes")
    add("--epochs", type=int, default=4, help="passes over the training pictures")
    add("--batch-size", type=int, default=128, help="pictures per step")
    text = "the network: convolutions with batch norm, or residual blocks with group norm, unlike it as a second judge"
    add("--kind", choices=("plain", "residual"), default="plain", help=text)
    add("--width", type=int, default=32, help="maps of the first layer")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    parser.machine()
    args = parser.read()
    from training.stages.classifier import train_classifier

    sys.exit(train_classifier(args))
