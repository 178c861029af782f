"""Experiments: variants × prompts × seeds, from YAML to a store with images and metrics."""
