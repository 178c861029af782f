"""What Hydra and OmegaConf refuse, in words for the user."""

import re
from collections.abc import Callable, Sequence

from fluxlab.errors import nearest, show


def short(text: str) -> str:
    """Return at most three non-empty lines."""
    return "\n".join([line for line in text.splitlines() if line.strip()][:3])


OF_LEARN = ("updates", "starts", "rate", "batch", "memory_gb")
OF_ATTRIBUTION = ("source", "patches", "ablate")
OF_BOTH = ("objective", "held_out", "variant")
"""Keys of `python -m fluxlab.learn` and `python -m fluxlab.attribution` that a run does not have."""


def unknown_key(key: str, known: Sequence[str]) -> str:
    for keys, command in (
        (OF_LEARN, "python -m fluxlab.learn"),
        (OF_ATTRIBUTION, "python -m fluxlab.attribution"),
        (OF_BOTH, "python -m fluxlab.learn and fluxlab.attribution"),
    ):
        if key in keys:
            return f"{key}: a key of {command}, which this command does not have"
    hint = nearest(key, known)
    return f"{key}: there is no such key{hint or '; known: ' + ', '.join(known)}"


def explain(
    error: Exception, known: Sequence[str], keys_below: Callable[[str], Sequence[str]], prepared: Sequence[str] = ()
) -> str:
    """Return the message for what Hydra or OmegaConf refuses, in one to three lines.

    known: the top-level keys; keys_below(parent): those of a mapping; prepared: the overrides that were composed.
    """
    cause, override = error.__cause__, getattr(error, "override", None)
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    composing = re.match(r"In '([^']+)'", lines[0]) if lines else None
    if cause and (not lines or lines[0].startswith("Error merging override")):
        lines = [line.rstrip() for line in str(cause).splitlines() if line.strip()]
    elif composing and len(lines) > 1 and lines[0].endswith("raised while composing config:"):
        lines = lines[1:]
    lines = lines or [type(error).__name__]
    missing = re.search(r"Could not find '([\w/]+)/([^/]+)'", lines[0])
    if missing:
        options = [line.strip() for line in lines[1:] if line.startswith("\t") and "provider=" not in line]
        hint = nearest(missing[2], options)
        return f"{missing[1]}={missing[2]}: there is none{hint}; available: {', '.join(options)}"
    unfilled = re.match(r"Interpolation key '(.+)' not found", lines[0])
    if unfilled:
        hint = nearest(unfilled[1], known)
        return f"${{{unfilled[1]}}}: there is no key {unfilled[1]} to fill in{hint}"
    full_key = next((line.strip().removeprefix("full_key: ") for line in lines if "full_key: " in line), "")
    full_key = full_key or getattr(error, "full_key", None) or ""
    refused = re.match(r"Could not (?:override|delete from config\.) '(\S+)'", lines[0])
    where = f"{composing[1]}: " if composing else ""
    of_learn = re.search(r"Could not override '(\w+)'", lines[0])
    if of_learn and of_learn[1] in (*OF_LEARN, *OF_ATTRIBUTION, *OF_BOTH):
        return where + unknown_key(of_learn[1], known)
    if refused or re.match(r"Key '.*' (is )?not in ", lines[0]):
        key = refused[1] if refused else full_key
        return where + _unknown_path(key, full_key or key, known, keys_below, prepared)
    if "Config search path:" in lines:
        lines = lines[: lines.index("Config search path:")]
    subject = full_key or override
    value = re.match(r"Value '(.*?)'(?: of type '\w+')? could not be converted to (\w+)", lines[0], re.DOTALL)
    value = value or re.match(r"Value '(.*?)' is not a valid (bool)", lines[0], re.DOTALL)
    if value and value[2] in _EXPECTED:
        return f"{subject}: {show(value[1])}, expected {_EXPECTED[value[2]]}"
    if "is incompatible with (str)" in lines[0]:
        return f"{subject}: a name is text, and the command line reads a number; set it in a YAML file, in quotes"
    return (f"{subject}: " if subject else "") + ("\n".join(lines[:3]) if not full_key else lines[0])


_EXPECTED = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}


def _unknown_path(
    key: str, full_key: str, known: Sequence[str], keys_below: Callable[[str], Sequence[str]], prepared: Sequence[str]
) -> str:
    """Return the message for a key that is not in the config, with the keys next to where it would be."""
    parts = full_key.split(".")
    if parts[0] not in known:
        return unknown_key(parts[0], known)
    depth = 1
    while depth < len(parts) and parts[depth] in (known := keys_below(".".join(parts[:depth]))):
        depth += 1
    parent, last = ".".join(parts[:depth]), parts[min(depth, len(parts) - 1)]
    expected = nearest(last, known) or ("; known: " + ", ".join(known) if known else "")
    adding = "" if f"~{key}" in prepared else f"; a new one is added as '+{parent}.{last}=…'"
    return f"{key}: {parent} has no key {last}{expected}{adding}"
