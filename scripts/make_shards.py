"""Captioned pictures to shards: `make_shards.py pack SOURCE --output DIR`, `index DIR`, `verify DIR`."""

from training.packing.command import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
