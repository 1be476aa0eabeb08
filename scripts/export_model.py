"""Export a denoiser, finished or not, with all that it draws with, as one folder that generate --model takes."""

from training.doors.export_model import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
