"""Stage two: train a denoiser on encoded latents."""

from training.doors.train_denoiser import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
