"""Speed and memory: `suite`, or a part: `autoencoder`, `samplers`, `reading`, `durability`; --help says what."""

from training.doors.benchmark import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
