"""Captioned pictures to shards: `make_shards.py pack SOURCE --output DIR`, `index DIR`, `verify DIR`."""

from training.doors.make_shards import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
