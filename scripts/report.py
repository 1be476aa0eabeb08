"""Write one HTML page of a run, or of several beside each other."""

from training.doors.report import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
