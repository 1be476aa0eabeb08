"""Measure a run."""

from training.doors.evaluate import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
