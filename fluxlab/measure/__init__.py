"""Measures on images: what a scene shows (`oracle`)."""
