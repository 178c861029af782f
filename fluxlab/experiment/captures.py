"""Attention captured in a run: checks before anything is computed, and the index of the arrays afterwards."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fluxlab.errors import UserError
from fluxlab.experiment.cells import Settings, at_once, batches, cells, each_cell, portions
from fluxlab.experiment.reference_images import sizes
from fluxlab.experiment.sources import with_sources_of
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import Store
from fluxlab.files import has_content
from fluxlab.pipeline import Pipeline
from fluxlab.positions import split_resample
from fluxlab.probes import INDEX, Probe, index
from fluxlab.select.masks import compact

CheckPrompts = Callable[[Sequence[str]], None]
"""Raises `UserError` if a batch of these prompts cannot be captured."""


def check(experiment: Experiment, pipe: Pipeline, settings: Settings, fixed: bool = False) -> None:
    """Raise `UserError` for a capture that some batch cannot give: an unknown word, step or block, a small budget.

    fixed: batch_tokens is the store's, so that smaller batches need another folder.
    """
    if not experiment.capture:
        return
    for variant, program in experiment.variants.items():
        if split_resample(program)[1]:
            raise UserError(
                f"variants.{variant}: the op resample computes another size, whose attention is not captured; use "
                f"capture=none, or leave it out: '~variants.{variant}'"
            )

    def check_prompts(prompts: Sequence[str]) -> None:
        probe = Probe(experiment.capture)
        given = sizes([experiment.references_of(prompt) for prompt in prompts])
        pipe.check(prompts, None, settings.sampling, probe=probe, references=given)

    messages = [_error(check_prompts, [prompt]) for prompt in experiment.prompts]
    failed = [(prompt, message) for prompt, message in zip(experiment.prompts, messages, strict=True) if message]
    if failed:
        prompt, message = failed[0]
        same = len(set(messages)) == 1
        raise UserError(message if same else f"{message}\nThe prompt is {prompt!r}.")
    message = _first_error(check_prompts, experiment, settings)
    if message:
        counts = range(at_once(settings, each_cell(experiment, settings)) - 1, 0, -1)
        smaller = (replace(settings, batch_tokens=size * settings.tokens) for size in counts)
        fits = next((s.batch_tokens for s in smaller if not _first_error(check_prompts, experiment, s)), None)
        if fits is None:
            raise UserError(f"{message}\nOr fewer variants that act alike in the first step: they are one batch.")
        elsewhere = " with another out= folder" if fixed else ""
        raise UserError(f"{message}\nOr batch_tokens={fits}{elsewhere}, for fewer images at a time.")


def _error(check_prompts: CheckPrompts, prompts: Sequence[str]) -> str:
    """Return why a batch of these prompts cannot be captured; "" if it can."""
    try:
        check_prompts(prompts)
    except UserError as error:
        return str(error)
    return ""


def _first_error(check_prompts: CheckPrompts, experiment: Experiment, settings: Settings) -> str:
    """Return why the first batch that cannot be captured cannot; "" if all can."""
    return next(filter(None, (_error(check_prompts, prompts) for prompts in compositions(experiment, settings))), "")


def compositions(experiment: Experiment, settings: Settings) -> Iterator[tuple[str, ...]]:
    """Yield the prompts of every batch of cells with its sources; equal ones of neighbouring batches once."""
    for prompts in portions(experiment, len(experiment.variants) * len(experiment.seeds)):
        groups = batches(cells(experiment, settings, prompts), settings)
        yield from dict.fromkeys(tuple(cell.prompt for cell in with_sources_of(group)) for group in groups)


def write_index(experiment: Experiment, settings: Settings, store: Store) -> None:
    """Write which file has the arrays of which cell. Without a capture, remove the index."""
    if not experiment.capture:
        store.remove(INDEX)
        return
    content = {"capture": compact(experiment.capture.to_config()), "digest": experiment.captures, "cells": []}

    def text() -> Iterator[str]:
        return _with_rows(content, _captured(experiment, settings, store))

    if not has_content(store.path / INDEX, map(str.encode, text())):  # a finished run writes nothing
        store.write(INDEX, text())


def _captured(experiment: Experiment, settings: Settings, store: Store) -> Iterator[dict[str, Any]]:
    """Yield a row for every cell that has arrays. A cell with NaN has none."""
    for cell in each_cell(experiment, settings):
        file = store.arrays(cell.key, experiment.captures)
        if file.is_file():
            keys = {"variant": cell.variant, "prompt": cell.prompt, "seed": cell.seed, "cell": cell.key}
            yield {**keys, "file": file.relative_to(store.path).as_posix()}


def _with_rows(content: dict[str, Any], rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield JSON, one row at a time. content: ends with an empty list, in which the rows are written."""
    yield json.dumps(content, indent=1, ensure_ascii=False).removesuffix("]\n}")
    before, closing = "\n  ", "]\n}\n"
    for row in rows:
        yield before + json.dumps(row, indent=1, ensure_ascii=False).replace("\n", "\n  ")
        before, closing = ",\n  ", "\n ]\n}\n"
    yield closing


def names(experiment: Experiment) -> str:
    """Return what is captured, in a few words; "" without a capture."""
    requests = ", ".join(request.name for request in experiment.capture.requests)
    return f"attention: {requests}" if requests else ""


def summary(store: Store) -> str:
    """Return where the arrays are, their size and how to read them; "" if the run captured nothing."""
    content = index(store.path)
    if content is None or not content["cells"]:
        return ""
    files = {store.path / row["file"] for row in content["cells"]}
    size = sum(file.stat().st_size for file in files) / 1e6
    folder = next(iter(files)).parent
    return f"{folder}: attention, {len(files)} files, {size:.3g} MB; read with fluxlab.probes.read({str(store.path)!r})"
