"""What a training will need and take, said before it is run."""
