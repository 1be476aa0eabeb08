"""What a model is measured by: pictures, distances, obedience, and whether the samplers keep their law."""
