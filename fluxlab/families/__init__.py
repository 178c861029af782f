"""Model families: what distinguishes FLUX.2 from FLUX.1. One file describes each; CONTRIBUTING has the recipe."""

from fluxlab.families.family import Family
from fluxlab.families.flux1 import FLUX1
from fluxlab.families.flux2 import FLUX2

FAMILIES: dict[str, Family] = {family.name: family for family in (FLUX1, FLUX2)}

__all__ = ["FAMILIES", "FLUX1", "FLUX2", "Family", "family_of"]


def family_of(params: object) -> Family:
    """Return the family of a transformer or an autoencoder with these sizes."""
    return next(f for f in FAMILIES.values() if isinstance(params, (f.transformer_params, f.autoencoder_params)))
