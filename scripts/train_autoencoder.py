"""Stage one: train an autoencoder on packed images."""

from training.doors.train_autoencoder import main
from training.settings.flags import run_main

if __name__ == "__main__":
    run_main(main)
