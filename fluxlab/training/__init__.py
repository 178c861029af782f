"""Trains small FLUX models: autoencoder, text encoders, transformer. A killed run resumes exactly."""
