"""Check whether a model's files are complete, and whether it computes what FLUX should."""
