"""The flags of `generate`, in groups as --help shows them. Free of torch."""

from __future__ import annotations

from training.drawing import adapters, compiled, controls, references
from training.drawing.starts import STARTS
from training.settings.flags import Parser


def add_flags(parser: Parser) -> None:
    """All of them."""
    what_to_draw(parser)
    what_to_begin_from(parser)
    how_to_draw_it(parser)
    where_from_and_to(parser)


def what_to_draw(parser: Parser) -> None:
    """Captions, and what stands beside them."""
    group = parser.add_argument_group("what to draw")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", action="append", help="a caption; may be given several times")
    source.add_argument("--prompts", metavar="FILE", help="a text file, one caption a line")
    source.add_argument("--like", metavar="PICTURE", help="draw again what generate drew: all is read from its PNG")
    add = group.add_argument
    add("--num-images", metavar="N", type=int, default=1, help="pictures per caption, with seeds seed, seed + 1, ...")
    add("--negative-prompt", metavar="TEXT", default="", help="what guidance moves away from")
    text = "a further caption for every picture, with its own guidance weight (below 0: away from it); repeatable"
    add("--also", metavar=("WEIGHT", "TEXT"), nargs=2, action="append", default=[], help=text)
    add("--seed", type=int, default=0, help="seed of each caption's first picture")
    add("--size", metavar="N|HxW", help="pixels; the training size, or that of --image, when not given")
    text = "of a model of conditioning.size: what it is told of the picture that it draws a part of; its own size"
    add("--original-size", metavar="N|HxW", help=text)
    add("--crop-offset", metavar="N|TOPxLEFT", help="the same: pixels cut off above and to the left; 0")


def what_to_begin_from(parser: Parser) -> None:
    """Pictures to edit, and measurements to restore from."""
    group = parser.add_argument_group("what to begin from, instead of noise")
    for start in STARTS:
        start.add_flags(group)
    references.add_flags(group)


def how_to_draw_it(parser: Parser) -> None:
    """The sampler and its guidance."""
    add = parser.add_argument_group("how to draw it (the run's own settings when not given)").add_argument
    add("--sampler", metavar="NAME", help="the kind of sampler: one of those below")
    add("--steps", metavar="N", type=int, help="steps of the sampler")
    add("--guidance-scale", metavar="W", type=float, help="1 = no guidance")
    text = "how much the picture of --image counts, for a model that is told to change it (image.kind source): 1 to 2"
    add("--image-guidance-scale", metavar="W", type=float, help=text)
    adapters.add_flags(add)
    controls.add_flags(add)
    text = "scale pictures in pixels (autoencoder identity) into range by this quantile of |x0|, such as 0.995; 0 = off"
    add("--dynamic-threshold", metavar="P", type=float, help=text)
    add("--weak-model", metavar="RUN", help="a poorer model, for --guidance.kind autoguidance")
    add("--classifier", metavar="DIR", help="one of train_classifier, for --guidance.kind classifier")


def where_from_and_to(parser: Parser) -> None:
    """The run, the folder, and what the machine can bear."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    text = "a denoiser's run (also while it trains), its final/, or a checkpoint; demo or demo-student: of the package"
    add("--model", metavar="RUN", help=text)
    add("--output", metavar="DIR", required=True, help="where 00000.png ... and grid.png go")
    add("--strip", action="store_true", help="also draw strips/: what each picture was on its way")
    add("--overwrite", action="store_true", help="replace pictures that are there")
    add("--batch-size", metavar="N", type=int, default=64, help="pictures at once; does not change them")
    text = "decode in overlapping tiles of N x N latents: large pictures in the memory of one tile; 0 = whole"
    add("--tile", metavar="N", type=int, default=0, help=text)
    text = "draw quickly and roughly with this tiny autoencoder, distilled (--teacher) from the denoiser's own"
    add("--preview", metavar="RUN", help=text)
    add("--text-encoder", metavar="NAME|DIR", help="where a large frozen text encoder lies on this machine")
    add("--mixed-precision", choices=("no", "bf16"), help="precision of the networks (default: no)")
    compiled.add_flags(add)
    parser.machine(group)
