"""Figures and images: style, lettering, grids, attention overlays, token layouts, RoPE similarity."""
