"""The model card. Every number in it comes from `benchmarks/embedded.py` or from the training run."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from fluxlab.checkpoints.params import check_class
from fluxlab.families import FAMILIES

ATTRIBUTES = ("object", "colour", "shape", "place", "sign", "word")
_MEANINGS = {
    "object": "one thing is in the image",
    "colour": "its colour",
    "shape": "it is the requested thing",
    "place": "its place",
    "sign": "a sign is in the image",
    "word": "the words on the sign, all letters right",
    "letters": "share of letters right",
}

_TEXT = """# {name}: the {family} that ships with fluxlab

A text-to-image model of {parameters:.1f} million parameters with {family}'s architecture: {hidden} wide,
{double} double and {single} single blocks, heads of 64 split {axes} over {names} as {family} splits its 128, an
autoencoder of factor 2 with {z} channels, and {text} of its own. It draws 64 × 64 pixels on a 16 × 16
token grid: one coloured thing, with or without a sign of one or two words, or two things. It is small enough to run
anywhere, and a program can check what is in its images.

## Making
| | |
|---|---|
| command | `{command}` |
| commit | `{commit}` |
| data | drawn by `fluxlab.scenes`; one in eight combinations of colour, thing and word is held out |
| training | {training} |
{start}| optimizers | Muon on the blocks' matrices, AdamW on the rest; EMA |
| weights | bf16 safetensors, {megabytes:.1f} MB; sha256 of every file in `manifest.json` |
| licence | Apache-2.0 |

{notes}Loss (mean squared error of the velocity, over 50 steps):

{curve}

## What it can do
{cells} cells, each a held-out caption and a seed, {sampling_steps} steps, read by the scene oracle
(`fluxlab.measure.oracle`). Brackets are bootstrap 95 % intervals over cells.

{ability}

## What the article's edits of `img_ids` do to it
Nothing was tuned for these edits. Captions, seeds and steps are the same for every edit. `letters`
counts each letter on its own; chance is about one in twenty. The last two rows are controls: all ids shifted by a
constant (rounding only), and unchanged ids with a different seed.

{edits}

What the article saw on FLUX.1 schnell:

{sentences}

## Limits
It knows the {words} words of `fluxlab.scenes.VOCABULARY`. It was trained at 48 to 80 pixels per side, with flat colours
and one font. Its results describe this model. They suggest what to try on {family} and are no evidence about it.
"""


def shown(value: Sequence[float | None] | None, name: str) -> str:
    """Format a mean and its interval: `98.4 % [96, 100]`, `0.412 [0.390, 0.431]`, or a dash without a value."""
    if value is None:
        return "–"
    mean, low, high = value
    if name in (*ATTRIBUTES, "letters"):
        return f"{100 * mean:.1f} %" + ("" if low is None else f" [{100 * low:.0f}, {100 * high:.0f}]")
    digits = 1 if mean >= 5 else 3 if mean >= 0.01 else 4
    return f"{mean:.{digits}f}" + ("" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(scores: dict, names: Sequence[str]) -> list[str]:
    return [shown(scores[name], name) for name in names]


def _stages(training: dict) -> str:
    """Describe the second and third stage of a run."""
    samples = f"{training['samples']:,}"
    return f"{training['steps']} steps of flow matching, {samples} samples{_guidance(training.get('guidance'))}"


def _start(start: dict | None) -> str:
    """Return the row about the model that a run continues; an empty string for a run from nothing."""
    if not start:
        return ""
    made = (
        f", made by `{start['command']}` at commit `{start['commit']}`: {_stages(start)}" if "command" in start else ""
    )
    return f"| continues | the weights `{start['weights']}`{made} |\n"


def _teacher(teacher: dict | None) -> str:
    """Return the row about the model whose velocity a run learned; an empty string for a run without one."""
    if not teacher:
        return ""
    weights = teacher["weights"]
    return f"| teacher | the weights `{weights}`: their velocity was the target, and at first their hidden states |\n"


def _guidance(stage: dict | None) -> str:
    """Describe the third stage; an empty string for a run without it."""
    if not stage or not stage["steps"]:
        return ""
    steps, batch, scale = stage["steps"], stage["batch"], stage["scale"]
    return f"; then {steps} steps of {batch} samples to distil true guidance by {scale:g} into one forward"


def _two_words(two: dict | None) -> list[list[str]]:
    """Return the rows about the cells that ask for a sign with two words."""
    if not two or not two["cells"]:
        return []
    names = {"word": "all letters right", "letters": "share of letters right"}
    return [[f"signs with two words ({two['cells']} cells): {text}", shown(two[n], n)] for n, text in names.items()]


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return "The run was changed by hand:\n" + "\n".join(f"- {note}" for note in notes) + "\n\n"


def curve_points(file: Path, count: int = 8) -> list[tuple[int, float]]:
    """Read `curve.csv`. Return at most `count` pairs (step, mean plain loss of the 50 steps up to it)."""
    with open(file, newline="") as handle:
        losses = [float(row["plain_loss"]) for row in csv.DictReader(handle)]
    stops = sorted({max(1, round(len(losses) * (i + 1) / count)) for i in range(count)})
    return [(stop, sum(losses[max(0, stop - 50) : stop]) / len(losses[max(0, stop - 50) : stop])) for stop in stops]


def card(results: dict, training: dict, folder: Path) -> str:
    """Return the text of the card.

    Args:
        results: what `benchmarks/embedded.py` writes.
        training: `training.json` of the run.
        folder: the model's folder.
    """
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    vae = json.loads((folder / "vae" / "config.json").read_text())
    weights = list(folder.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    base = results["edits"]["as trained"]
    names = (*ATTRIBUTES, "letters")
    effects = (*names, "ssim", "edges", "size")
    units, controls = results["units"], results.get("controls", {})
    return _TEXT.format(
        parameters=sum(file.stat().st_size for file in weights) / 2e6,
        hidden=transformer["num_attention_heads"] * transformer["attention_head_dim"],
        double=transformer["num_layers"],
        single=transformer["num_single_layers"],
        axes=" + ".join(str(n) for n in transformer["axes_dims_rope"]),
        z=vae["latent_channels"],
        command=training["command"],
        commit=training["commit"],
        training=_stages(training),
        start=_start(training.get("start")) + _teacher(training.get("teacher")),
        **FAMILIES[check_class(transformer, "transformer", folder / "transformer")].training().CARD,
        megabytes=size / 1e6,
        curve=_table(
            ["step", *(str(step) for step, _ in training["curve"])],
            [["loss", *(f"{loss:.3f}" for _, loss in training["curve"])]],
        ),
        notes=_notes(training["notes"]),
        cells=results["cells"],
        sampling_steps=results["steps"],
        ability=_table(
            ["", "right"], [[_MEANINGS[n], shown(base[n], n)] for n in names] + _two_words(results.get("two_words"))
        ),
        edits=_table(
            ["edit", *(f"{name} ({units[name]})" if name in units else name for name in effects)],
            [[f"`{edit}`", *_row(scores, effects)] for edit, scores in {**results["edits"], **controls}.items()],
        ),
        sentences="\n".join(f"- {edit}: {text}" for edit, text in results["sentences"].items() if edit != "as trained"),
        words=training["words"],
    )


def write_card(results: dict, folder: Path) -> Path:
    """Write `README.md` into a model's folder that has a `training.json`. Return its path."""
    file = folder / "README.md"
    file.write_text(card(results, json.loads((folder / "training.json").read_text()), folder))
    return file
