"""What experiments that load a model and make their images themselves share: arguments, means, captions, panels."""

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.results import mean_text
from experiments.style import OKABE_ITO, out_argument, refusing_parser
from fluxlab.compose import compose, guarded
from fluxlab.config import ModelRow, model_row, with_loras
from fluxlab.errors import UserError, nearest
from fluxlab.measure.summary import summarise
from fluxlab.run import RunConfig

if TYPE_CHECKING:
    import argparse

    from matplotlib.axes import Axes

KEYS = ("model", "lora", "device", "dtype", "memory", "cache", "steps")
"""The keys of a run (`configs/config.yaml`) that these experiments take."""

Row = Mapping[str, Any]
Means = dict[str, dict[str, dict[str, float]]]
"""Variant → measure → n, mean, low and high, and more of `means`."""


@dataclass(frozen=True)
class Loaded:
    """A model as the command line asks for it. command: without the folder of the results."""

    pipe: Any
    row: ModelRow
    steps: int
    command: str

    @property
    def record(self) -> dict[str, Any]:
        """What a file of results says of the model."""
        from fluxlab.checkpoints.identity import fingerprint

        dtype = str(self.pipe.dtype).removeprefix("torch.")
        return {"model": self.row.name, "weights": fingerprint(self.row)[:12], "steps": self.steps, "dtype": dtype}

    @property
    def conditions(self) -> str:
        """The last line of a caption, as `results.conditions` has it for a run."""
        from fluxlab.experiment.versions import versions

        about, made = self.record, versions()
        height, width = self.pipe.size
        return (
            f"Model {about['model']} (digest {about['weights']}), {self.steps} steps, model's size {width} × {height} "
            f"px, {about['dtype']} on {self.pipe.device}. "
            f"{', '.join(f'{key} {made[key]}' for key in ('fluxlab', 'commit', 'torch'))}: {self.command}"
        )

    def scale(self, side: int) -> int:
        """Return how many times as large as `side` pixels the model's own images are.

        Raises UserError unless they are square and a whole number of times as large.
        """
        height, width = self.pipe.size
        if height != width or height % side:
            raise UserError(
                f"model.size={[height, width]}: the scenes need a square and a multiple of {side} pixels; "
                f"model.size=[{max(side, height // side * side)},{max(side, height // side * side)}]"
            )
        return height // side


def run_alone(
    name: str,
    description: str | None,
    arguments: Sequence[str] | None,
    counts: Mapping[str, tuple[int, str]],
    steps: int,
    work: Callable[[Loaded, "argparse.Namespace"], Iterable[Any]],
) -> int:
    """Run `work(loaded, options)` with the arguments of `python -m experiments.<name>`, and print what it returns.

    counts: flags that take a number from 1, each with its default and its help. steps: see `load`.
    Returns 0, or 2 for an error that the user can fix.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = refusing_parser(name, description)
    about = f"{', '.join(KEYS)}, as in a run; steps={steps} by default for embedded models"
    parser.add_argument("words", nargs="*", metavar="key=value", help=about)
    out_argument(parser)
    for flag, (default, text) in counts.items():
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=f"{text}; default: {default}")

    def main() -> None:
        options = parser.parse_intermixed_args(arguments)
        for flag in counts:
            if (value := getattr(options, flag)) < 1:
                raise UserError(f"--{flag} {value}: expected at least 1")
        given = {flag: getattr(options, flag) for flag in counts}
        flags = [f"--{flag} {value}" for flag, value in given.items() if value != counts[flag][0]]
        command = " ".join([f"python -m experiments.{name}", *map(shlex.quote, options.words), *flags])
        print(*work(load(options.words, steps, command), options), sep="\n")

    return guarded(main, "interrupted")


def read_words(words: Sequence[str]) -> RunConfig:
    """Return the config that key=value words give. Raises UserError for keys that are not among `KEYS`."""
    for word in words:
        key = key_of(word)
        if "=" not in word or key not in KEYS:
            raise UserError(
                f"{word}: expected key=value with one of the keys {', '.join(KEYS)}{nearest(key, KEYS)}; see --help"
            )
    return compose("config", RunConfig, "schema", ["name=alone", "tracking=none", *words])


def key_of(word: str) -> str:
    """Return the first part of the key that a word of a command line sets: `model` of `model.path=…`."""
    return re.split(r"[.=]", word, maxsplit=1)[0].lstrip("+~")


def row_of(config: RunConfig) -> ModelRow:
    """Return the model of a config, with its LoRAs."""
    return with_loras(model_row(config.model, f"model {config.model.get('name', '')}".strip()), config.lora)


def load(words: Sequence[str], steps: int, command: str) -> Loaded:
    """Load the model that key=value words name.

    steps: of the embedded models if the words do not say. Other models have their own.
    """
    from fluxlab.checkpoints import dtype_of
    from fluxlab.loading import load_row
    from fluxlab.settings import Sampling

    config = read_words(words)
    row = row_of(config)
    pipe = load_row(row, dtype_of(config.dtype, row), config.device, cache=config.cache, memory=config.memory)
    steps = pipe.resolve(Sampling(steps=config.steps or (steps if row.scenes else None))).steps
    return Loaded(pipe, row, steps, command)


def means(rows: Sequence[Row], base: str, measures: Iterable[str]) -> Means:
    """Return variant → measure → n, mean, low, high, the paired difference to `base`, and the value of the first row.

    rows: one per image, with `variant`, `prompt`, `seed` and measures. What is missing, nan or infinite is left out.
    """
    found: Means = {}
    first = {row["variant"]: row for row in reversed(rows)}
    for row in summarise(rows, base, [name for name in measures if name in rows[0]]):
        if not row["n"]:
            continue
        values = {key: row[key] for key in ("mean", "low", "high", "paired_mean", "paired_low", "paired_high")}
        values |= {"first": first[row["variant"]][row["metric"]]}
        kept = {key: round(value, 6) for key, value in values.items() if np.isfinite(value)}
        found.setdefault(row["variant"], {})[row["metric"]] = {"n": row["n"], **kept}
    return found


def measure_lines(found: Means, titles: Mapping[str, str]) -> list[str]:
    """Return a caption's lines: every measure of `titles` that there is, with its value for every variant."""
    lines = []
    for measured, title in titles.items():
        rows = [f"  {name}: {value_text(row[measured])}" for name, row in found.items() if measured in row]
        lines += [f"{title}:", *rows] if rows else []
    return lines


def value_text(row: Mapping[str, float]) -> str:
    """Return `0.91 [0.84, 0.97], Δ 0.02 [-0.03, 0.06], n = 64`, as far as there are values."""
    parts = []
    for sign, kind in (("", ""), ("Δ ", "paired_")):
        if f"{kind}mean" in row:
            ends = (row.get(f"{kind}{end}", np.nan) for end in ("low", "high"))
            parts.append(f"{sign}{mean_text(row[f'{kind}mean'], *ends)}")
    return ", ".join([*parts, f"n = {row['n']}"])


def mean_panels(
    panels: Sequence["Axes"], found: Means, shown: Mapping[str, str], shares: Iterable[str], bold: Iterable[str]
) -> None:
    """Draw a panel for each measure: its mean with its interval, a row per variant.

    shown: measure → title, one for each panel. shares: measures between 0 and 1. bold: variants in blue; others are
    grey.
    """
    for axes, (measured, title) in zip(panels, shown.items(), strict=True):
        for y, (name, row) in enumerate(found.items()):
            if measured not in row:
                continue
            value, colour = row[measured], OKABE_ITO["blue"] if name in bold else "0.45"
            axes.plot([value.get("low", value["mean"]), value.get("high", value["mean"])], [y, y], color=colour)
            axes.plot(value["mean"], y, "o", ms=3, color=colour)
        axes.set_title(title, loc="left")
        axes.grid(axis="x", color="0.9", lw=0.5)
        if measured in shares:
            axes.set_xlim(-0.04, 1.04)
    panels[0].set_yticks(range(len(found)), list(found))
    panels[0].set_ylim(len(found) - 0.4, -0.6)
