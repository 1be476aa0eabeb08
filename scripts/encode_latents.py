"""Encode packed images into latent shards with a trained autoencoder; run it again to go on where it stopped."""

from training.doors.encode_latents import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
