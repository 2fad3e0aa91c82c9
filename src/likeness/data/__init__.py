"""Faces on disk: prepared folders, shards of latents, the order in which they are seen, and drawn faces."""
