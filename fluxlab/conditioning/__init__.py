"""Prompts to text tokens: encoders are opened only for prompts that are not known, and leave the device again."""

from fluxlab.conditioning.texts import Texts

__all__ = ["Texts"]
