"""Captioned pictures to image shards."""
