"""Check every sampler against an exact answer, on every process, prediction and grid; or on a trained run."""

from training.doors.check_samplers import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
