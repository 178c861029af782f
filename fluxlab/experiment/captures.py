"""Attention captured in a run: before anything runs, whether it can be; after, which arrays are whose."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from fluxlab.errors import UserError
from fluxlab.experiment.cells import Cell, Settings, batches, cells
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import Store
from fluxlab.pipeline import Pipeline
from fluxlab.probes import INDEX, Probe, index
from fluxlab.select.masks import compact

Settle = Callable[[Sequence[str]], None]
"""Raises where a batch of these prompts cannot be captured."""


def check(experiment: Experiment, pipe: Pipeline, settings: Settings, fixed: bool = False) -> None:
    """Raise for a capture that some batch cannot give: no such word, step or block, too small a budget.

    fixed: batch_tokens is the store's, so that only another one can have smaller batches.
    """
    if not experiment.capture:
        return

    def settle(prompts: Sequence[str]) -> None:
        probe = Probe(experiment.capture)
        pipe.check(prompts, None, settings.sampling, probe=probe)

    told = [_refusal(settle, [prompt]) for prompt in experiment.prompts]
    refused = [(prompt, message) for prompt, message in zip(experiment.prompts, told, strict=True) if message]
    if refused:
        prompt, message = refused[0]
        alike = len(set(told)) == 1
        raise UserError(message if alike else f"{message}\nThis is of the prompt {prompt!r}.")
    every = cells(experiment, settings)
    message = _refused(settle, every, settings)
    if message:
        largest = len(batches(every, settings)[0])
        smaller = (replace(settings, batch_tokens=size * settings.tokens) for size in range(largest - 1, 0, -1))
        fits = next(one.batch_tokens for one in smaller if not _refused(settle, every, one))
        elsewhere = " with another out= folder" if fixed else ""
        raise UserError(f"{message}\nOr batch_tokens={fits}{elsewhere}: fewer pictures at a time.")


def _refusal(settle: Settle, prompts: Sequence[str]) -> str:
    """Why a batch of these prompts cannot be captured; "" where it can."""
    try:
        settle(prompts)
    except UserError as error:
        return str(error)
    return ""


def _refused(settle: Settle, every: Sequence[Cell], settings: Settings) -> str:
    """The same of the first of an experiment's batches that cannot be."""
    compositions = dict.fromkeys(tuple(cell.prompt for cell in batch) for batch in batches(every, settings))
    return next(filter(None, (_refusal(settle, prompts) for prompts in compositions)), "")


def write_index(experiment: Experiment, settings: Settings, store: Store) -> None:
    """Tell which arrays are whose, once all are there. Where nothing is captured, nothing is told."""
    if not experiment.capture:
        store.remove(INDEX)
        return
    rows = [
        {
            "variant": cell.variant,
            "prompt": cell.prompt,
            "seed": cell.seed,
            "cell": cell.key,
            "file": store.arrays(cell.key, experiment.captures).relative_to(store.path).as_posix(),
        }
        for cell in cells(experiment, settings)
    ]
    told = {"capture": compact(experiment.capture.to_config()), "digest": experiment.captures, "cells": rows}
    store.write(INDEX, json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def names(experiment: Experiment) -> str:
    """What is captured, in a few words; "" for nothing."""
    requests = ", ".join(request.name for request in experiment.capture.requests)
    return f"attention: {requests}" if requests else ""


def summary(store: Store) -> str:
    """Where the arrays are, how large and how to read them; "" where the run captured nothing."""
    told = index(store.path)
    if told is None:
        return ""
    files = {store.path / row["file"] for row in told["cells"]}
    size = sum(file.stat().st_size for file in files) / 1e6
    folder = next(iter(files)).parent
    return (
        f"{folder}: attention, {len(files)} files, {size:.3g} MB; fluxlab.probes.read({str(store.path)!r}) reads them"
    )
