"""Notes on an experiment's programs, as `plan=true` and a run print them. They change nothing."""

from fluxlab.experiment.cells import Settings
from fluxlab.experiment.reference_images import grids
from fluxlab.experiment.spec import Experiment
from fluxlab.pipeline import Pipeline
from fluxlab.positions import lint, split_resample
from fluxlab.references import Grids

UNTRAINED = "references: {} was not trained with reference images; its images show what the tokens do, no edited image"
MOST_NOTES = 8
"""Notes that a run prints. `plan=true` prints all."""


def notes(experiment: Experiment, pipe: Pipeline, settings: Settings, most: int | None = None) -> list[str]:
    """Return one line per note of `fluxlab.positions.lint`, with the variants it is about, for the first prompt.

    most: more notes than this are counted in a last line. Left out: programs that name words without a tokenizer, and
    those computed at another size (`resample`).
    """
    rows, cols = pipe.grid(settings.height, settings.width)
    prompts = [experiment.prompts[0]] if pipe.text.tokenizer is not None else None
    context = pipe.context(
        prompts,
        settings.max_sequence_length,
        Grids((rows, cols), grids(experiment.references_of(experiment.prompts[0]), settings.pixels_per_token)),
        pipe.schedule.times(settings.steps, rows * cols),
    )
    found: dict[tuple[str, str], list[str]] = {}
    for variant, program in experiment.variants.items():
        if (prompts or not program.names_words) and split_resample(program)[1] is None:
            for where, text in lint(program, context):
                key = where.removeprefix(f"variants.{variant}.")
                found.setdefault((key, text), []).append(variant)
    untrained = experiment.references and not experiment.model.references
    lines = [UNTRAINED.format(experiment.model.name)] if untrained else []
    lines += [f"{_listed(where, names)}: {text}" for (where, text), names in found.items()]
    if most is not None and len(lines) > most:
        lines = [*lines[: most - 1], f"and {len(lines) - most + 1} more; plan=true prints all"]
    return lines


def _listed(where: str, variants: list[str]) -> str:
    names = [f"{name}.{where}" if where else name for name in variants]
    return ", ".join(names if len(names) <= 4 else [*names[:2], "…", f"{names[-1]} ({len(names)} variants)"])
