"""`python -m fluxlab.check`: whether a model's files are whole, and it computes what FLUX should."""
