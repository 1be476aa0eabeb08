"""Speed and memory: `benchmark.py autoencoder`, `samplers`, `reading` or `durability`; each verb's --help says what."""

from training.doors.benchmark import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
