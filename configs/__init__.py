"""The configs that come with the package, found by name: autoencoder/*.toml and denoiser/*.toml."""
