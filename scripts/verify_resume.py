"""Prove on your own config and data that an interrupted training ends with the bytes of an uninterrupted one."""

from training.doors.verify_resume import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
