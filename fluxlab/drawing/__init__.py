"""Figures and pictures: style, lettering, grids, attention overlays, token layouts, RoPE similarity."""
