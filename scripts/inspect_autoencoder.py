"""Examine an autoencoder: one HTML page and a JSON of what its latents and reconstructions are like."""

from training.doors.inspect_autoencoder import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
