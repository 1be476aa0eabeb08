"""Captioned pictures to shards: `make_shards.py pack SOURCE --output DIR`, `index DIR`, `verify DIR`."""

from training.cli import run_main
from training.packing_cli import main

if __name__ == "__main__":
    run_main(main)
