"""Measure what a model makes. Every number comes with its protocol; judges are networks that made no training data."""
