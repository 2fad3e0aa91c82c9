"""Pipelines from a request to images, their loading, and the recipe in every image file."""
