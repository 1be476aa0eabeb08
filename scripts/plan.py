"""Say before a training what it will take: parameters, FLOPs, memory, disk, hours and price."""

from training.doors.plan import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
