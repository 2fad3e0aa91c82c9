"""Training data: prepared folders, latent stores, the order of samples, and synthetic faces."""
