"""Training of transformers, few-step students and components."""
