"""Speed and memory: `suite`, or a part: `autoencoder`, `samplers`, `reading`, `order`, `durability`; see --help."""

from training.doors.benchmark import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
