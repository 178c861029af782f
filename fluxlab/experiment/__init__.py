"""Experiments: variants × prompts × seeds, from their YAML to a folder of pictures and numbers."""
