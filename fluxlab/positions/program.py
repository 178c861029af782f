"""Programs: ordered lists of edits. They are read from a config, written back, hashed and described."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluxlab.errors import UserError, show, wrong
from fluxlab.positions.describe import describe_edit
from fluxlab.positions.edit import Edit, parse_edit
from fluxlab.positions.registry import find_op
from fluxlab.select.tokens import names_words

SCHEMA = 1
"""Part of every digest: raised when the meaning of a config changes."""


@dataclass(frozen=True)
class Program:
    """An ordered list of edits. Each acts on the result of the one before. The empty program changes nothing."""

    edits: tuple[Edit, ...] = ()

    @classmethod
    def from_config(cls, config: "Mapping[str, Any] | Program | None", path: str = "") -> "Program":
        """Return the program of `{name: {op: …, argument: …, tokens: …}}`. None and {} are the identity.

        Raises UserError, in one line, with the path of the wrong key (which starts with `path`), its value, what is
        accepted and the nearest spelling.
        """
        if isinstance(config, Program):
            return config
        if config is None:
            return cls()
        if not isinstance(config, Mapping):
            raise wrong(path, config, "a mapping of edits, for instance {a: {op: scale, factor: 1.2}}")
        if isinstance(config.get("op"), str):
            raise UserError(
                f"{path or 'program'}: {show(dict(config))} is an edit without a name, expected {{a: {{…}}}}"
            )
        return cls(tuple(parse_edit(name, edit, path) for name, edit in config.items()))

    def to_config(self, mask_digests: bool = False) -> dict[str, dict[str, Any]]:
        """Return plain nested values for YAML or JSON, which `from_config` reads back.

        Edits of the same name are numbered. Masks of more than 256 × 256 pixels are packed. With `mask_digests` they
        are given by size and SHA-256 only, which is enough to recognise the program and cannot be read back.
        """
        config: dict[str, dict[str, Any]] = {}
        for edit in self.edits:
            name, n = edit.name or "edit", 2
            while name in config:
                name, n = f"{edit.name or 'edit'}_{n}", n + 1
            config[name] = edit.to_config(mask_digests)
        return config

    @functools.cached_property
    def digest(self) -> str:
        """Hash of what the program does, 64 hex digits. Names, key order, spelling and defaults do not count."""
        edits = [{"op": edit.op, "arguments": edit.arguments, "where": edit.where} for edit in self.edits]
        text = json.dumps({"schema": SCHEMA, "edits": edits}, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __add__(self, other: "Program") -> "Program":
        """Return the program that applies this one, then the other."""
        return Program(self.edits + other.edits)

    def __bool__(self) -> bool:
        return bool(self.edits)

    @property
    def names_words(self) -> bool:
        """Whether the program depends on the prompt."""
        return any(names_words(edit.arguments) or names_words(edit.where) for edit in self.edits)

    @property
    def sees_latent(self) -> bool:
        """Whether the program depends on the latents of its sample at each step."""
        return any(find_op(edit.op, edit.path).sees_latent for edit in self.edits)

    @property
    def depends_on_training(self) -> bool:
        """Whether the program depends on the size that the model was trained on."""
        kinds = ("frequencies", "size", "windows", "scores")
        return any(find_op(edit.op, edit.path).acts_on in kinds for edit in self.edits)

    def describe(self) -> str:
        """Return the program in one readable line."""
        return "; then ".join(describe_edit(edit) for edit in self.edits) or "identity"
