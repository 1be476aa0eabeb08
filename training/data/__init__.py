"""What a training step reads: the order of samples, the samples themselves, and the loaders that bring them ahead."""
