"""Image shards to latent shards, restartable shard by shard."""
