"""Few steps: teach a student of a trained denoiser."""

from training.doors.distill_denoiser import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
