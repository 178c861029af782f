"""From the state of controls to a program, and from a program to an experiment in YAML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from fluxlab.errors import UserError, show
from fluxlab.positions import OPS, Program

VARIANT = "mine"
"""Name of the program in the experiment."""


@dataclass
class EditState:
    """The controls of one edit: values in YAML by key, and the first and last of its steps and blocks."""

    op: str
    values: dict[str, str] = field(default_factory=dict)
    steps: tuple[int, int] | None = None
    blocks: tuple[int, int] | None = None

    def config(self, name: str, steps: int, blocks: int) -> dict[str, Any]:
        """Return the edit as a config. `steps` and `blocks` are the numbers that the model has.

        Raises `UserError` for a value that is not YAML.
        """
        known = OPS[self.op]
        config: dict[str, Any] = {"op": self.op}
        for key in (*known.types, *known.where):
            if key in self.values and self.values[key].strip():
                config[key] = read_value(self.values[key], f"{name}.{key}")
        for key, chosen, count in (("steps", self.steps, steps), ("blocks", self.blocks, blocks)):
            if key in known.where and chosen is not None and chosen != (0, count - 1):
                low, high = chosen
                config[key] = str(low) if low == high else f"{low}-{high}"
        return config


def read_value(text: str, path: str) -> Any:
    """Return a value from YAML, read as a config is. Raises `UserError`."""
    try:
        return yaml.load(text, Loader=get_yaml_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{path}: {show(text)}, not YAML that can be read: {reason}") from None


def program_of(edits: Sequence[EditState], steps: int, blocks: int) -> Program:
    """Return the program of edits, in order. Raises `UserError` for a wrong value."""
    configs = {name: edit.config(name, steps, blocks) for name, edit in zip(names_of(edits), edits, strict=True)}
    return Program.from_config(configs)


def names_of(edits: Sequence[EditState]) -> list[str]:
    """Return a name for each edit: that of its op, and a number from the second edit with this op."""
    ops = [edit.op for edit in edits]
    return [op if (n := ops[:i].count(op)) == 0 else f"{op}_{n + 1}" for i, op in enumerate(ops)]


def experiment_yaml(program: Program, settings: Mapping[str, Any], model: str) -> str:
    """Return the file of an experiment that draws the image before and after `program`.

    settings: keys of an experiment such as prompts, seeds and steps. model: the words that name the model.
    """
    command = f"python -m fluxlab.run --config-dir my +exp={VARIANT} {model}".rstrip()
    head = [f"# my/exp/{VARIANT}.yaml: {command}", f"name: {VARIANT}"]
    variants = ["variants:", "  baseline: {}"]
    if program:
        edits = program.to_config()
        variants += [f"  {VARIANT}:", *(f"    {_dumped({name: edit})[1:-1]}" for name, edit in edits.items())]
    return "\n".join([*head, *(_dumped({key: value})[1:-1] for key, value in settings.items()), *variants, ""])


class _Dumper(yaml.SafeDumper):
    """Quotes text that OmegaConf would read as something else, such as 1e3."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    try:
        same = yaml.load(value, Loader=get_yaml_loader()) == value
    except (yaml.YAMLError, ValueError):
        same = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if same else '"')


_Dumper.add_representer(str, _text)


def _dumped(value: Any) -> str:
    """Return one line of YAML in flow style."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**9)
    return text.strip()
