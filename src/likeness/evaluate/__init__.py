"""Measure models: generate images, extract features, compute metrics, compare evaluations, write reports."""
