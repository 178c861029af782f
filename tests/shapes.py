"""The type checker of jaxtyping's import hook. It checks functions with shape annotations and no others."""

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # accepts an int as a float


def check(function):
    annotations = getattr(function, "__annotations__", {}).values()
    has_shapes = any("jaxtyping" in repr(type(a)) or "jaxtyping" in repr(a) for a in annotations)
    return _beartype(function) if has_shapes else function
