"""Take in another program's autoencoder, or give ours out as diffusers writes it."""

from training.doors.convert_autoencoder import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
