"""Frozen encoders from images and text to the inputs of the transformers."""
