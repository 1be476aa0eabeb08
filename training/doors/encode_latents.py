"""Encode packed images into latent shards with a trained autoencoder; run it again to go on where it stopped."""

from __future__ import annotations

import sys

from training.settings.flags import Parser


def main() -> None:
    """Read the flags and encode."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--autoencoder", metavar="RUN", required=True, help="a finished autoencoder run, or its final/; or demo")
    parser.add_data("packed images (make_shards pack): folder or address", required=True)
    add("--output", metavar="DIR", required=True, help="where the latent shards go")
    add("--flip", action="store_true", help="also encode the mirrored image")
    add("--dtype", choices=("float16", "float32"), default="float16", help="how moments are stored")
    add("--batch-size", type=int, default=64, help="images at once")
    text = "encode in overlapping tiles of N x N latents: large pictures in the memory of one tile; 0 = whole"
    add("--tile", metavar="N", type=int, default=0, help=text)
    text = "processes that read and decode ahead of the encoder; they do not change what is written"
    add("--num-workers", metavar="N", type=int, default=2, help=text)
    text = "also store the pictures N times smaller, for super-resolution: --image.kind low-res"
    add("--low-res", metavar="N", type=int, default=0, help=text)
    text = "store the latents of the hints, pictures before an edit, in place of the hints: --image.kind source"
    add("--encode-hint", action="store_true", help=text)
    text = "also store features of this vision model, of Hugging Face or train_classifier: --representation.kind repa"
    add("--vision", metavar="NAME|DIR", help=text)
    add("--text-encoder", metavar="NAME|DIR", help="also store the embeddings of this frozen Hugging Face encoder")
    add("--text-length", type=int, default=77, help="tokens a caption may have")
    add(
        "--text-pooling", choices=("auto", "mean", "eos", "none"), default="auto", help="how one vector is made of them"
    )
    add("--text-lower", action="store_true", help="lower-case captions first")
    add("--mixed-precision", choices=("no", "bf16"), help="precision of the encoder (default: no)")
    add(
        "--on-bad-data",
        choices=("error", "skip"),
        help="a sample that cannot be read: an error, or left out and counted, up to 1 %%; unless told, left out "
        "with exit code 3",
    )
    parser.machine()
    args = parser.read()
    from training.encoding.data_set import encode

    sys.exit(encode(args))
