"""Kill a small training at random moments, resume it each time, and compare its end with that of a calm one."""

from training.doors.soak import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
