"""Numbers of a trained model: reconstruction, distances, obedience, likelihood, inspection."""
