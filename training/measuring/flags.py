"""The flags of `evaluate`, in groups as --help shows them. Free of torch."""

from __future__ import annotations

from training.drawing import adapters
from training.settings.flags import Parser

FEATURES = (
    "random, inception:FILE (that of FID), torchvision-inception:FILE, dinov2:DIR, clip:DIR, or a classifier's folder"
)


def add_flags(parser: Parser) -> None:
    """All of them."""
    what_is_measured(parser)
    pictures(parser)
    held_out(parser)
    restored(parser)
    how_pictures_are_drawn(parser)
    where_to(parser)


def what_is_measured(parser: Parser) -> None:
    """The run, and the pictures that it is measured on."""
    add = parser.add_argument
    add("--model", metavar="RUN", required=True, help="a run of either stage, its final/ or a checkpoint; or demo")
    parser.add_data("packed pictures, folder or address; their val split, else test split, is the truth")
    add("--count", metavar="N", type=int, default=1000, help="pictures measured or generated; 0 = all of the val split")
    add("--seed", type=int, default=0, help="first seed of the pictures")
    adapters.add_flags(add)
    add("--batch-size", metavar="N", type=int, default=100, help="pictures, or pairs of one and a caption, at once")
    add("--text-encoder", metavar="NAME|DIR", help="where a large frozen text encoder lies on this machine")


def pictures(parser: Parser) -> None:
    """What judges reconstructions and generated pictures."""
    add = parser.add_argument_group("reconstructed and generated pictures").add_argument
    add("--features", metavar="NET", default="random", help=FEATURES)
    text = "also score drawn pictures and their captions by this CLIP, a folder with its tokenizer"
    add("--clip", metavar="DIR", help=text)
    text = "shapes (the rule-based checker), or the folder of a classifier of captions"
    add("--obedience", metavar="JUDGE", help=text)
    text = "shapes: edit scenes of these, --count of each kind; --grid FILE is a sheet for each, FILE-inpainting ..."
    add("--edits", choices=("shapes",), help=text)
    add("--crop", metavar="N", type=int, help="measure PSNR and SSIM on the central N x N pixels")
    add("--lpips", metavar="WEIGHTS", help="standard, random, or a file of backbone weights")
    add("--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg", help="backbone of LPIPS")


def held_out(parser: Parser) -> None:
    """What is asked of held-out pictures instead of distances."""
    group = parser.add_argument_group("held-out pictures under the denoiser, or copies of training pictures, instead")
    asked, add = group.add_mutually_exclusive_group().add_argument, group.add_argument
    text = "log p of the latents of N held-out pictures, in nats and bits/dim, over the sampler's grid"
    asked("--likelihood", metavar="N", type=int, default=0, help=text)
    text = "which of these captions, one a line, each picture shows: that at which the denoiser errs least"
    asked("--classify", metavar="FILE", help=text)
    text = "draw each of them again from what this operator, a kind of --operator.kind, leaves of it, with noise"
    asked("--restore", metavar="OPERATOR", help=text)
    text = "make each of them small and draw it large again, by a model that was trained to"
    asked("--upscale", action="store_true", help=text)
    text = "whether drawn pictures repeat training pictures of --data; --grid FILE is a sheet of the nearest pairs"
    asked("--copies", action="store_true", help=text)
    text = "draw each of them again from its caption and its hint: how far drawings follow their hints, and, with"
    asked("--hints", action="store_true", help=f"{text} --obedience shapes, how near their objects are")
    add("--train-count", metavar="N", type=int, default=0, help="training pictures that --copies searches; 0 = all")
    text = "the trace of --likelihood: hutchinson estimates it, exact takes one backward pass a latent dimension"
    add("--likelihood-trace", choices=("hutchinson", "exact"), default="hutchinson", help=text)
    text = "random vectors per picture that hutchinson's estimate averages over"
    add("--likelihood-probes", metavar="N", type=int, default=1, help=text)
    add("--draws", metavar="N", type=int, default=32, help="pairs of a time and noise for each picture of --classify")
    text = "after so many of the draws leave each picture its KEEP best captions by either weighting; several in turn"
    add("--eliminate", metavar="DRAWS:KEEP", nargs="+", default=[], help=text)


def restored(parser: Parser) -> None:
    """How pictures are measured and drawn again."""
    add = parser.add_argument_group("pictures of --restore").add_argument
    text = "how: kinds of --measurement.kind, with any sampler, or of --posterior.kind; several, with commas between"
    add("--method", metavar="NAMES", default="pigdm", help=text)
    text = "standard deviation of the measurement's noise, of values in [-1, 1]"
    add("--sigma-y", metavar="S", type=float, default=0.05, help=text)
    text = "draws of each picture, by whose spread methods are judged; of 19 and more, intervals of 90 %% are exact"
    add("--samples", metavar="N", type=int, default=19, help=text)
    text = "what the model is told of a picture: its own caption, or the empty one"
    add("--captions", choices=("own", "empty"), default="own", help=text)
    text = "noise in [0, 1] on the small pictures of --upscale"
    add("--level", metavar="U", type=float, default=0.0, help=text)
    text = "what is restored: held-out pictures, or the model's own drawings of their captions, of which it is the"
    text += " exact prior, so that coverage judges the method alone"
    add("--truth", choices=("data", "model"), default="data", help=text)


def how_pictures_are_drawn(parser: Parser) -> None:
    """The sampler and its guidance."""
    add = parser.add_argument_group("how pictures are drawn (the run's own settings when not given)").add_argument
    add("--sampler", metavar="NAME", help="the kind of sampler")
    add("--steps", metavar="N", type=int, help="steps of the sampler")
    add("--guidance-scale", metavar="W", type=float, help="1 = no guidance")
    text = "scale pictures in pixels (autoencoder identity) into range by this quantile of |x0|; 0 = off"
    add("--dynamic-threshold", metavar="P", type=float, help=text)


def where_to(parser: Parser) -> None:
    """What is written, and what the machine can bear."""
    group = parser.add_argument_group("results")
    add = group.add_argument
    add("--grid", metavar="FILE", help="also draw the first judged pictures with their verdicts")
    add("--output", metavar="FILE", help="write all numbers and settings as JSON")
    add("--overwrite", action="store_true", help="replace these files where they are there")
    parser.machine(group)
