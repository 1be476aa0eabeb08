"""Folders of models and the networks in them: found, loaded, hashed, exported, exchanged with other programs."""
