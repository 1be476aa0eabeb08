"""Make pictures from captions with a trained denoiser; edit pictures and restore them with it."""

from training.doors.generate import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
