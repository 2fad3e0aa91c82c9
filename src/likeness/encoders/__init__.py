"""Frozen encoders between pixels or words and what the transformers read."""
