"""Make pictures larger with a denoiser that was trained to."""

from training.doors.upscale import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
