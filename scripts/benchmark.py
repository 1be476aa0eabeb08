"""Speed and memory: `benchmark.py autoencoder`, `samplers`, `reading`, `order`, `durability`; --help says what."""

from training.doors.benchmark import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
