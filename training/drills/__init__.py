"""Proofs that a run survives: exact resume on a user's data, kills at random moments."""
