"""Edits of a given image through ids and attention: inpainting. The functions are methods of `Pipeline`."""

from fluxlab.editing.inpaint import inpaint

__all__ = ["inpaint"]
