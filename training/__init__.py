"""All that touches disk, clock and devices: data, the two stages, the loop, checkpoints, runs."""
