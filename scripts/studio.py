"""Draw, edit, restore and compare by hand, on a page of this machine."""

from training.doors.studio import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
