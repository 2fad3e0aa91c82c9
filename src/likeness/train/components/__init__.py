"""Trainings of the components: autoencoder, decoder, text encoder with image encoder, face parser."""
