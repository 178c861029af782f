"""Model families: what distinguishes one from another. One file describes each; CONTRIBUTING has the recipe."""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from fluxlab.families.family import ROLES, Architecture, Family, Later, Names

__all__ = [
    "FAMILIES",
    "ROLES",
    "Architecture",
    "Family",
    "Later",
    "Names",
    "architecture_of",
    "claimed",
    "family_and_part",
    "family_of",
    "register",
]

FAMILIES: dict[str, Family] = {}
"""By name, FLUX.1 first."""


def register(family: Family) -> None:
    """Make a family known. Raises ValueError for a name that is taken, or an axis that has another role elsewhere."""
    if family.name in FAMILIES:
        raise ValueError(f"{family.name}: there is a family of this name")
    known = {role: role for role in ROLES}
    for other in FAMILIES.values():
        known |= {axis: role for role, axis in other.roles.items()}
    for role, axis in family.roles.items():
        if known.get(axis, role) != role:
            raise ValueError(f"{family.name}: axis {axis} is the {role}, but in another family the {known[axis]}")
    if FAMILIES and family.transformer.only is None:
        raise ValueError(f"{family.name}: its transformer has no names of its own (`only`)")
    FAMILIES[family.name] = family


def claimed(test: Callable[[Family], bool]) -> Family:
    """Return the family that claims something as its own. FLUX.1 has what no other one claims."""
    first, *others = FAMILIES.values()
    return next(filter(test, others), first)


def family_and_part(params: object) -> tuple[Family, str]:
    """Return the family of a transformer or an autoencoder with these sizes, and which of the two it is."""
    every = ((family, part, a) for family in FAMILIES.values() for part, a in family.networks.items())
    return next((family, part) for family, part, architecture in every if isinstance(params, architecture.params))


def family_of(params: object) -> Family:
    """Return the family of a transformer or an autoencoder with these sizes."""
    return family_and_part(params)[0]


def architecture_of(params: object) -> Architecture:
    """Return the architecture of a transformer or an autoencoder with these sizes."""
    family, part = family_and_part(params)
    return family.networks[part]


_names = sorted(
    (m.name for m in iter_modules(__path__) if m.name != "family"), key=lambda name: (name != "flux1", name)
)
for _name in _names:
    register(import_module(f"{__name__}.{_name}").FAMILY)
