"""Gradient ascent on a score, one evaluation of all places at a time, with a state after each."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxlab.errors import NonFiniteError, UserError
from fluxlab.gradients import Prepared, checkpointed, compiled, frozen, prepare, stepping
from fluxlab.learning.arguments import Template, described
from fluxlab.learning.objectives import Objective, Place
from fluxlab.positions import region_prompts
from fluxlab.sampling import Sampling
from fluxlab.training.state import read_tensors, write_tensors

if TYPE_CHECKING:
    from fluxlab.pipeline import Pipeline

SCAN, COARSE, UPDATE = "scan", "coarse", "update"
FINAL_RATE = 0.02
"""The step size at the end, as a share of that at the beginning. In between it follows a cosine."""


@dataclass(frozen=True)
class Row:
    """One evaluation: its phase, the score over all places, and the values at which it was taken.

    In the phases scan and coarse the score is that of the objective's coarse form if it has one.
    """

    phase: str
    score: float
    values: list[float]


@dataclass
class Fit:
    """rows: all evaluations in order."""

    rows: list[Row] = field(default_factory=list)

    @property
    def best(self) -> Row:
        """The evaluation with the largest score among those of the last phase, the first of equal ones."""
        return max((row for row in self.rows if row.phase == self.rows[-1].phase), key=lambda row: row.score)


@dataclass(frozen=True, eq=False)
class Problem:
    """What is maximised: the mean score of a program over places.

    batch: places in one forward. keep: keep the activations of all blocks instead of computing them again.
    """

    pipe: "Pipeline"
    template: Template
    objective: Objective
    places: Sequence[Place]
    settings: Sampling
    batch: int
    keep: bool

    def parts(self) -> list[Sequence[Place]]:
        return [self.places[i : i + self.batch] for i in range(0, len(self.places), self.batch)]

    def prepared(self, part: Sequence[Place]) -> Prepared:
        prompts, seeds, regions = (
            [p.prompt for p in part],
            [p.seed for p in part],
            region_prompts(self.template.program),
        )
        return prepare(self.pipe, prompts, seeds, self.settings, keep=self.keep, regions=regions)

    def scores(self, program: Any) -> list[float]:
        """Return the score of a program at each place, without gradients."""
        found = []
        with torch.no_grad():
            for part in self.parts():
                prepared = self.prepared(part)
                score = self.objective.score(part)
                found += score(prepared, partial(stepping, prepared, compiled(prepared, program))).tolist()
        return found

    def coarse(self) -> "Problem":
        """Return the problem with the objective's coarse form."""
        return replace(self, objective=replace(self.objective, score=self.objective.coarse))

    def score(self, values: Sequence[float]) -> float:
        """Return the mean score at some values, without gradients."""
        scores = self.scores(self.template.at(torch.tensor(values, dtype=torch.float64)))
        return math.fsum(scores) / len(scores)

    def gradient(self, values: Tensor) -> tuple[float, Tensor]:
        """Return the mean score, and its gradient in fp64."""
        leaf, scores = values.detach().clone().requires_grad_(), []
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(frozen(self.pipe))
            if not self.keep:
                stack.enter_context(checkpointed(self.pipe))
            for part in self.parts():
                prepared = self.prepared(part)
                make = partial(stepping, prepared, compiled(prepared, self.template.at(leaf)))
                of_part = self.objective.score(part)(prepared, make)
                (of_part.double().sum() / len(self.places)).backward()
                scores += of_part.tolist()
        return math.fsum(scores) / len(scores), leaf.grad


def fit(
    problem: Problem,
    *,
    starts: int,
    updates: int,
    rate: float,
    state: Path,
    digest: str,
    report: Callable[[Fit, int], None] = lambda found, total: None,
) -> Fit:
    """Return all evaluations of a search: `starts` points without gradients, then ascent from the best of them.

    The first start is the template's, the others are a Sobol sequence within the bounds. Adam moves each argument by
    about `rate` of its unit, less towards the end. state: the file from which an interrupted search goes on to the
    same bits. digest: of all that the search depends on. report(found, total): called after each evaluation.

    Raises UserError for a state of another search and `NonFiniteError` for a score that is not finite.
    """
    learned = problem.template.learned
    unit, low, high = (torch.tensor(column, dtype=torch.float64) for column in _columns(learned))
    first = round(updates * problem.objective.coarse_share)
    phases = [(COARSE, problem.coarse(), first, rate)] if first else []
    phases += [(UPDATE, problem, updates - first, rate / 4 if first else rate)]
    total = starts + updates
    found, tensors = _read(state, digest)
    for values in _points(problem, starts)[len(found.rows) :]:
        _append(found, SCAN, phases[0][1].score(values), values, problem)
        _write(state, digest, found, {})
        report(found, total)
    before = starts
    for phase, current, count, size in phases:
        begin = Fit(found.rows[:before]).best.values
        moving = torch.nn.Parameter(torch.tensor(begin, dtype=torch.float64) / unit)
        optimizer = torch.optim.Adam([moving], lr=size, betas=(0.8, 0.95))
        done = min(count, len(found.rows) - before)
        if 0 < done < count:
            with torch.no_grad():
                moving.copy_(tensors["moving"])
            names = ("step", "exp_avg", "exp_avg_sq")
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {name: tensors[name] for name in names}}})
        for update in range(done, count):
            values = moving.detach() * unit
            score, gradient = current.gradient(values)
            _append(found, phase, score, values.tolist(), problem)
            if not bool(gradient.isfinite().all()):
                raise NonFiniteError(f"the gradient at {described(values.tolist(), problem.template)} is not finite")
            share = FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * update / max(1, count - 1))) / 2
            optimizer.param_groups[0]["lr"] = size * share
            moving.grad = -gradient * unit
            optimizer.step()
            with torch.no_grad():
                moving.copy_((moving * unit).clamp(low, high) / unit)
            _write(state, digest, found, {"moving": moving.detach(), **optimizer.state_dict()["state"][0]})
            report(found, total)
        before += count
    return found


def _columns(learned: Sequence[Any]) -> list[list[float]]:
    bounds = [(-math.inf if a.low is None else a.low, math.inf if a.high is None else a.high) for a in learned]
    return [[a.unit for a in learned], [low for low, _ in bounds], [high for _, high in bounds]]


def _points(problem: Problem, starts: int) -> list[list[float]]:
    """Return the given start and further ones, spread evenly within the bounds."""
    points = [problem.template.starts]
    if starts == 1:
        return points
    learned = problem.template.learned
    unbounded = next((a for a in learned if a.low is None or a.high is None), None)
    if unbounded:
        raise UserError(f"starts={starts}: {unbounded.path} needs min and max, between which starts are spread")
    drawn = torch.quasirandom.SobolEngine(len(learned)).draw(starts, dtype=torch.float64)[1:]  # the first is a corner
    return points + [[a.low + float(x) * (a.high - a.low) for a, x in zip(learned, row, strict=True)] for row in drawn]


def _append(found: Fit, phase: str, score: float, values: Sequence[float], problem: Problem) -> None:
    if not math.isfinite(score):
        raise NonFiniteError(
            f"the score at {described(values, problem.template)} is {score}; lower rate= or set min and max"
        )
    found.rows.append(Row(phase, score, list(values)))


def _write(state: Path, digest: str, found: Fit, tensors: dict[str, Tensor]) -> None:
    rows = [[row.phase, row.score, row.values] for row in found.rows]
    write_tensors(state, tensors or {"none": torch.zeros(0)}, {"digest": digest, "rows": rows})


def _read(state: Path, digest: str) -> tuple[Fit, dict[str, Tensor]]:
    if not state.is_file():
        return Fit(), {}
    tensors, notes = read_tensors(state)
    if notes.get("digest") != digest:
        raise UserError(
            f"out={state.parent}: holds another search; name another folder, or delete {state.name} to start over"
        )
    return Fit([Row(*row) for row in notes["rows"]]), tensors
