"""Make pictures from captions with a trained denoiser.

Samplers, grids and guidances are chosen by name; their own settings as --sampler.KEY, --grid.KEY, --guidance.KEY.
"""

from __future__ import annotations

import sys

from training.cli import Parser, run_main
from training.names import SAMPLING, listing


def main() -> None:
    parser = Parser(__doc__ or "", epilog=listing(SAMPLING))
    what = parser.add_argument_group("what to draw")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", action="append", help="a caption; may be given several times")
    source.add_argument("--prompts", metavar="FILE", help="a text file, one caption a line")
    source.add_argument("--like", metavar="PICTURE", help="draw again what generate drew: all is read from its PNG")
    what.add_argument(
        "--num-images", metavar="N", type=int, default=1, help="pictures per caption, with seeds seed, seed + 1, ..."
    )
    what.add_argument("--negative-prompt", metavar="TEXT", default="", help="what guidance moves away from")
    what.add_argument(
        "--also",
        metavar=("WEIGHT", "TEXT"),
        nargs=2,
        action="append",
        default=[],
        help="a further caption for every picture, with its own guidance weight (below 0: away from it); repeatable",
    )
    what.add_argument("--invert", metavar="IMAGE", help="begin from the noise that DDIM inversion finds for it")
    what.add_argument("--invert-prompt", metavar="TEXT", default="", help="what --invert's picture shows")
    what.add_argument("--seed", type=int, default=0, help="seed of each caption's first picture")
    what.add_argument("--size", metavar="N|HxW", help="pixels; the training size when not given")
    how = parser.add_argument_group("how to draw it (the run's own settings when not given)")
    how.add_argument("--sampler", metavar="NAME", help="the kind of sampler: one of those below")
    how.add_argument("--steps", metavar="N", type=int, help="steps of the sampler")
    how.add_argument("--guidance-scale", metavar="W", type=float, help="1 = no guidance")
    how.add_argument("--weak-model", metavar="RUN", help="a poorer model, for --guidance.kind autoguidance")
    how.add_argument(
        "--classifier", metavar="DIR", help="one of train_classifier.py, for --guidance.kind classifier"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--model",
        metavar="RUN",
        required=True,
        help="a denoiser's run (also while it trains), its final/, or a checkpoint",
    )
    run.add_argument("--output", metavar="DIR", required=True, help="where 00000.png ... and grid.png go")
    run.add_argument("--strip", action="store_true", help="also draw strips/: what each picture was on its way")
    run.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    run.add_argument("--batch-size", metavar="N", type=int, default=64, help="pictures at once; does not change them")
    run.add_argument(
        "--text-encoder", metavar="NAME|DIR", help="where a large frozen text encoder lies on this machine"
    )
    run.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help="precision of the networks")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    run.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.read_with_keys()
    from training.generate import generate

    sys.exit(generate(args))


if __name__ == "__main__":
    run_main(main)
