"""Edits of a given image through ids and attention: inpainting, super-resolution. They are methods of `Pipeline`."""

from fluxlab.editing.inpaint import inpaint
from fluxlab.editing.upscale import upscale

__all__ = ["inpaint", "upscale"]
