"""Train a small classifier of captions on real packed pictures: a judge for generated ones."""

from training.doors.train_classifier import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
