"""Rebuild a denoiser's averaged weights with another length, from the snapshots its training kept."""

from training.doors.posthoc_ema import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
