"""The type checker behind jaxtyping's hook: it takes the functions that state tensor shapes and leaves the rest."""

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a good float


def check(function):
    stated = getattr(function, "__annotations__", {}).values()
    return (
        _beartype(function) if any("jaxtyping" in repr(type(a)) or "jaxtyping" in repr(a) for a in stated) else function
    )
