"""Take in another program's denoiser with all that it draws with, or give ours out as diffusers writes it."""

from training.doors.convert_denoiser import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
