"""Weights on disk: where models are (`catalog`), the packed format (`packed`) and hashes (`hashes`)."""
