"""Training: one loop for the transformers, and the components that stand below them."""
