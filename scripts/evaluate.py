"""Measure a run.

An autoencoder: PSNR, SSIM, LPIPS, Frechet distance of reconstructions, on the val split of --data.
A denoiser: Frechet and kernel distance of generated to held-out pictures, and how far captions are obeyed.
"""

from __future__ import annotations

import sys

from training.settings.flags import Parser, run_main


def main() -> None:
    """Read the flags and measure."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--model", metavar="RUN", required=True, help="a run of either stage, its final/ or a checkpoint")
    parser.add_data("packed pictures, folder or address; their val split, else test split, is the truth")
    add("--count", metavar="N", type=int, default=1000, help="pictures measured or generated; 0 = all of the val split")
    add("--features", metavar="NET", default="random", help="random, inception:FILE, or the folder of a classifier")
    add(
        "--obedience",
        metavar="JUDGE",
        help="shapes (the rule-based checker), or the folder of a classifier of captions",
    )
    add(
        "--likelihood",
        metavar="N",
        type=int,
        default=0,
        help="log p of the latents of N held-out pictures instead, in nats and bits/dim, over the sampler's grid",
    )
    text = "the trace of --likelihood: hutchinson estimates it, exact takes one backward pass a latent dimension"
    add("--likelihood-trace", choices=("hutchinson", "exact"), default="hutchinson", help=text)
    text = "random vectors per picture that hutchinson's estimate averages over"
    add("--likelihood-probes", metavar="N", type=int, default=1, help=text)
    add("--crop", metavar="N", type=int, help="measure PSNR and SSIM on the central N x N pixels")
    add("--lpips", metavar="WEIGHTS", help="standard, random, or a file of backbone weights")
    add("--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg", help="backbone of LPIPS")
    add("--seed", type=int, default=0, help="first seed of the pictures")
    add("--sampler", metavar="NAME", help="the run's own when not given")
    add("--steps", metavar="N", type=int, help="the run's own when not given")
    add("--guidance-scale", metavar="W", type=float, help="the run's own when not given")
    add("--batch-size", metavar="N", type=int, default=100, help="pictures at once")
    add("--text-encoder", metavar="NAME|DIR", help="where a large frozen text encoder lies on this machine")
    add("--grid", metavar="FILE", help="also draw the first judged pictures with their verdicts")
    add("--output", metavar="FILE", help="write all numbers and settings as JSON")
    add("--overwrite", action="store_true", help="replace these files where they are there")
    parser.machine()
    args = parser.read_with_keys()
    from training.measuring.evaluate import evaluate

    sys.exit(evaluate(args))


if __name__ == "__main__":
    run_main(main)
