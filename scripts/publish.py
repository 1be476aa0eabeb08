"""Publish a finished model on the Hugging Face hub: checked, listed, then sent as one commit."""

from training.doors.publish import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
