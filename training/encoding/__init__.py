"""Image shards to latent shards, and pairs of a teacher as such shards; restartable shard by shard."""
