"""What a search writes: its curve while it runs; then scores on held-out cells, and the program as an experiment."""

import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fluxlab.drawing.style import OKABE_ITO, STYLE, style, write_figure
from fluxlab.experiment.spec import Experiment
from fluxlab.files import write_atomic
from fluxlab.learning.arguments import Template, described
from fluxlab.learning.fit import Fit, Problem, Row
from fluxlab.learning.objectives import Place
from fluxlab.measure.summary import CSV_COLUMNS, summarise, to_csv
from fluxlab.progress import Progress
from fluxlab.report.wandb import tracking
from fluxlab.report.wandb.link import Link
from fluxlab.settings import Sampling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVE, FIGURE, CELLS, SCORES, RESULT = "curve.csv", "curve.png", "cells.csv", "scores.csv", "result.json"
START, LEARNED = "start", "learned"


class Report:
    """Writes the curve after each evaluation, shows progress, and logs to W&B if `settings` ask for it.

    settings: a file of `configs/tracking`. As a context manager it draws the curve at the end, also when interrupted.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        out: Path,
        experiment: Experiment,
        template: Template,
        config: Mapping[str, Any],
        command: str,
    ):
        self.out, self.template, self.title = out, template, str(config["title"])
        self.progress: Progress | None = None
        self.found: Fit | None = None
        self.link = None
        if tracking.checked(settings).get("name") == "wandb":
            init = tracking.init_arguments({"job_type": "learn", **_given(settings)}, experiment, os.environ)
            asked = {**tracking.config(experiment), **config, "command": command}
            self.link = Link(out, init, asked, command, settings.get("mode"), settings.get("seconds") or 120)

    def __call__(self, found: Fit, total: int) -> None:
        self.found, row = found, found.rows[-1]
        self.progress = self.progress or Progress("learn", total, len(found.rows) - 1, every=5, unit="evaluation")
        write_atomic(self.out / CURVE, curve(found, self.template))
        self.progress(len(found.rows), f"{row.phase} {row.score:.5g} at {described(row.values, self.template)}")
        if self.link:
            values = {f"argument/{a.name}": v for a, v in zip(self.template.learned, row.values, strict=True)}
            self.link.send({"log": {f"score/{row.phase}": row.score, **values}, "step": len(found.rows) - 1})

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress:
            self.progress.close()
        if self.found:
            write_figure(draw(self.found, self.template, self.title), self.out / FIGURE)
        if self.link:
            images = {"curve": [(str((self.out / FIGURE).resolve()), None)]} if self.found else {}
            self.link.close([{"images": images}], exit_code=int(sys.exc_info()[0] is not None))

    def finish(self, found: Fit, result: Mapping[str, Any]) -> None:
        """Show the end of the search. found: also of a search that was done already."""
        self.found = found
        write_atomic(self.out / CURVE, curve(found, self.template))
        if self.link:
            flat = {f"held_out.{name}": values[0] for name, values in result["held_out"].items()}
            self.link.send({"summary": {**result["values"], **flat}})


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without the job type of a run, which is the default of configs/tracking."""
    return {key: value for key, value in settings.items() if not (key == "job_type" and value == tracking.JOB_TYPE)}


def curve(found: Fit, template: Template) -> str:
    """Return the curve as CSV: evaluation, phase, score, and a column for each argument."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["evaluation", "phase", "score", *(argument.name for argument in template.learned)])
    writer.writerows([n, row.phase, row.score, *row.values] for n, row in enumerate(found.rows))
    return text.getvalue()


def draw(found: Fit, template: Template, title: str) -> "Figure":
    """Return the figure of a curve: the score, then each argument with its bounds, over evaluations."""
    from matplotlib.figure import Figure

    panels = 1 + len(template.learned)
    phases = list(dict.fromkeys(row.phase for row in found.rows))
    colours = dict(zip(("scan", "coarse", "update"), ("black", "orange", "blue"), strict=True))
    with style(STYLE):
        figure = Figure((4.5, 1.1 + 1.2 * panels), layout="constrained")
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        for phase in phases:
            at = [n for n, row in enumerate(found.rows) if row.phase == phase]
            columns = [[found.rows[n].score for n in at]]
            columns += [[found.rows[n].values[i] for n in at] for i in range(panels - 1)]
            for ax, column in zip(axes, columns, strict=True):
                look = {"lw": 0, "marker": "x", "ms": 4} if phase == "scan" else {"lw": 1, "marker": ".", "ms": 3}
                ax.plot(at, column, color=OKABE_ITO[colours[phase]], label=phase, **look)
        for ax, argument in zip(axes[1:], template.learned, strict=True):
            for bound in (argument.low, argument.high):
                if bound is not None:
                    ax.axhline(bound, color="0.75", lw=0.7, ls=":")
            ax.set_ylabel(argument.name)
        axes[0].set_ylabel("score")
        axes[0].set_title(title, loc="left")
        axes[0].legend(frameon=False)
        axes[-1].set_xlabel("evaluation")
    return figure


def scored(
    problem: Problem, template: Template, values: Sequence[float], held_out: Sequence[Place]
) -> list[dict[str, Any]]:
    """Return the score of the unchanged ids, the start and the learned program at each held-out place."""
    from fluxlab.positions import Program

    held = replace(problem, places=held_out)
    programs = {
        "baseline": Program(),
        START: Program.from_config(template.config_at(template.starts), START),
        LEARNED: Program.from_config(template.config_at(values), LEARNED),
    }
    return [
        {"variant": name, "prompt": place.prompt, "seed": place.seed, "score": score}
        for name, program in programs.items()
        for place, score in zip(held_out, held.scores(program), strict=True)
    ]


def intervals(rows: Sequence[Mapping[str, Any]], against: str) -> dict[str, list[float | None]]:
    """Return mean, low and high of each variant's score, and of its difference to the variant `against`."""
    found = {}
    for row in summarise(rows, against, ["score"]):
        found[row["variant"]] = [row["mean"], row["low"], row["high"]]
        if row["variant"] != against:
            found[f"{row['variant']} - {against}"] = [row["paired_mean"], row["paired_low"], row["paired_high"]]
    return {name: [None if v != v else v for v in values] for name, values in found.items()}


def finish(
    problem: Problem,
    experiment: Experiment,
    template: Template,
    found: Fit,
    held_out: Sequence[Place],
    out: Path,
    command: str,
) -> dict[str, Any]:
    """Score the result on held-out cells and write it. Returns what `result.json` has."""
    best: Row = found.best
    rows = scored(problem, template, best.values, held_out)
    against_start = intervals(rows, START)
    difference = intervals(rows, "baseline")[f"{LEARNED} - baseline"]
    held = {**against_start, f"{LEARNED} - baseline": difference}
    del held[f"baseline - {START}"]
    values = {a.name: v for a, v in zip(template.learned, best.values, strict=True)}
    result = {
        "values": values,
        "score": best.score,
        "cells": [len(problem.places), len(held_out)],
        "at_a_bound": [a.name for a, v in zip(template.learned, best.values, strict=True) if v in (a.low, a.high)],
        "held_out": held,
    }
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["variant", "prompt", "seed", "score"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / CELLS, text.getvalue())
    summary = [{**dict.fromkeys(CSV_COLUMNS), **row} for row in summarise(rows, "baseline", ["score"])]
    write_atomic(out / SCORES, to_csv(summary))
    write_atomic(out / RESULT, json.dumps(result, indent=1) + "\n")
    name = f"{experiment.name}_learned"[:100]
    file = out / "exp" / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    write_atomic(
        file, as_experiment(name, problem.objective.title, experiment, template, result, held_out, out, command)
    )
    return result


def as_experiment(
    name: str,
    title: str,
    experiment: Experiment,
    template: Template,
    result: Mapping[str, Any],
    held_out: Sequence[Place],
    out: Path,
    command: str,
) -> str:
    """Return the YAML of an experiment with the learned program, its start, and the held-out prompts."""
    values = list(result["values"].values())
    unset = Sampling()
    settings = {key: value for key, value in vars(experiment.sampling).items() if value != getattr(unset, key)}
    content = {
        "name": name,
        "caption": f"learned: {described(values, template)}",
        "prompts": list(dict.fromkeys(place.prompt for place in held_out)),
        "seeds": list(dict.fromkeys(place.seed for place in held_out)),
        **settings,
        "variants": {
            "baseline": {},
            START: template.config_at(template.starts),
            LEARNED: template.config_at(values),
        },
    }
    lines = [
        "# @package _global_",
        f"# python -m fluxlab.run --config-dir {out} +exp={name} model={experiment.model.name}",
        f"# Found by {command}",
        f"# {title}, on {len(held_out)} held-out cells, with 95 % bootstrap intervals:",
        *(f"#   {key}: {interval_text(interval)}" for key, interval in result["held_out"].items()),
    ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def interval_text(interval: Sequence[float | None]) -> str:
    """Return `-0.25 [-0.27, -0.24]`, or the mean alone without an interval."""
    mean, low, high = interval
    return f"{mean:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]")
