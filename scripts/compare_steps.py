"""Compare models by quality against network calls and seconds: how many steps are enough."""

from training.doors.compare_steps import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
