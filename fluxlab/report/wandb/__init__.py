"""Sends a finished or running store to Weights & Biases."""
