"""Make pictures larger with a denoiser that was trained to: files of any size, or a folder of them.

Its config has image.kind low-res. Each is drawn with the caption beside it, and told is how true
it is to the small one.
"""

from __future__ import annotations

from training.drawing.adapters import add_flags as add_adapters
from training.settings.families import SAMPLING, listing
from training.settings.flags import Parser


def main() -> None:
    """Read the flags and upscale."""
    parser = Parser(__doc__ or "", epilog=listing(SAMPLING))
    add = parser.add_argument
    add("pictures", metavar="FILE|DIR", help="a picture, or each of a folder with the caption beside it")
    add("--model", metavar="RUN", required=True, help="a denoiser's run whose config has image.kind low-res")
    add_adapters(add)
    add("--output", metavar="DIR", required=True, help="where the pictures and upscaled.json go")
    add("--prompt", metavar="TEXT", help="the caption of all of them, in place of those beside them")
    add("--negative-prompt", metavar="TEXT", default="", help="what guidance moves away from")
    text = "noise in [0, 1] on the small picture, for ones that another model drew (default: 0)"
    add("--level", metavar="U", type=float, default=0.0, help=text)
    text = "draws of each picture, with seeds seed, seed + 1, ..., of which the mean is written: nearer, and smoother"
    add("--samples", metavar="N", type=int, default=1, help=text)
    text = "bring what is drawn to what the small picture says: its means over squares of pixels are then the same"
    add("--consistent", action="store_true", help=text)
    text = "latents from one window of the trained size to the next (default: half of one); 0: large ones whole"
    add("--windows", metavar="N", type=int, help=text)
    add("--seed", type=int, default=0, help="seed of each picture's first draw")
    how = parser.add_argument_group("how to draw (the run's own settings when not given)").add_argument
    how("--sampler", metavar="NAME", help="the kind of sampler: one of those below")
    how("--steps", metavar="N", type=int, help="steps of the sampler")
    how("--guidance-scale", metavar="W", type=float, help="1 = no guidance")
    text = "scale pictures in pixels (autoencoder identity) into range by this quantile of |x0|; 0 = off"
    how("--dynamic-threshold", metavar="P", type=float, help=text)
    group = parser.add_argument_group("run")
    add = group.add_argument
    text = "pictures that cannot be used: stop before any is drawn and name them, or leave them out and count them"
    add("--on-bad-data", choices=("error", "skip"), default="error", help=text)
    text = "draw all pictures again; without it those that the same command drew are kept, and the missing ones drawn"
    add("--overwrite", action="store_true", help=text)
    add("--batch-size", metavar="N", type=int, default=16, help="pictures of one size at once")
    add("--tile", metavar="N", type=int, default=0, help="decode in overlapping tiles of N x N latents; 0 = whole")
    add("--text-encoder", metavar="NAME|DIR", help="where a large frozen text encoder lies on this machine")
    add("--mixed-precision", choices=("no", "bf16"), default="no", help="precision of the networks")
    parser.machine(group)
    args = parser.read_with_keys()
    from training.drawing.upscale import upscale

    upscale(args)
