"""Export a denoiser, finished or not, with all that it draws with, as one folder that generate --model takes.

With bfloat16 its files have half the size, and its weights, loaded as float32 again, eight significant bits.
"""

from __future__ import annotations

import sys

from training.settings.flags import Parser


def main() -> None:
    """Read the flags and write the folder."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("model", metavar="RUN", help="a denoiser's run (also while it trains), its final/, or a checkpoint")
    add("--output", metavar="DIR", required=True, help="the new model folder")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="precision of the weights in the files")
    text = "write what was learned upon the model (train_denoiser --base) into its weights, in float32; repeatable"
    add("--adapter", metavar="RUN[:WEIGHT]", action="append", default=[], help=text)
    add("--text-encoder", metavar="NAME|DIR", help="where a large frozen text encoder lies on this machine")
    parser.machine(device="")
    args = parser.read()
    from training.models.exporting import export_model

    sys.exit(export_model(args))
