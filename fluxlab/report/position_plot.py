"""The position plot of a variant, for the page and for trackers: where its tokens are after its edits."""

import json
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from fluxlab.drawing.pictures import data_url, plot_png
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run

MOST_TOKENS = 1024
"""Image tokens up to which a plot is SVG. More of them take less space as PNG."""

UNCHANGED = "the ids of all tokens are those of the model"


@dataclass(frozen=True)
class PositionPlot:
    """A plot as a data URL with its (width, height) in pixels, or the reason why there is none."""

    url: str = ""
    size: tuple[int, int] = (0, 0)
    missing: str = ""


def position_plot(run: Run, variant: str, prompt: str, kind: str = "svg") -> PositionPlot:
    """Return the plot of a variant at the run's own size and schedule. Words are looked up in `prompt`.

    kind: "svg", which is PNG too for more than `MOST_TOKENS`, or "png" for what cannot show SVG. matplotlib draws PNG.
    If no variant of the run has a program, there is nothing to compare the unchanged positions with, and no plot.
    """
    if not any(other["program"] for other in run.record["variants"].values()):
        return PositionPlot(missing=UNCHANGED)
    settings = run.record["settings"]
    program = json.dumps(run.record["variants"][variant]["program"])
    grid = tuple(settings[side] // settings["pixels_per_token"] for side in ("height", "width"))
    schedule = json.dumps(settings["schedule"])
    return _draw(program, grid, settings["max_sequence_length"], prompt, settings["steps"], schedule, kind)


@lru_cache(maxsize=256)
def _draw(
    program: str, grid: tuple[int, int], text: int, prompt: str, steps: int, schedule: str, kind: str = "svg"
) -> PositionPlot:
    """Draw a program's tokens at the first step and block where it acts.

    The store has no tokenizer, so every word of the prompt counts as one token. A program that cannot be read, for
    example because its plugin is not loaded, has no plot. Nor has one whose edits leave all ids as they are, such as an
    edit of activations or frequencies: a run may have hundreds of them.
    """
    from fluxlab.drawing import position_plot as plot
    from fluxlab.sampling.schedule import Schedule

    known = {field.name for field in fields(Schedule)}
    times = Schedule(**{key: value for key, value in json.loads(schedule).items() if key in known})
    context = plot.sequence(grid=grid, text=text, prompt=prompt, steps=steps)
    context = replace(context, sigmas=tuple(times.times(steps, grid[0] * grid[1])))
    try:
        state = plot.program_at_step(json.loads(program), context)
        # the store does not know how many blocks are double, so the plot does not name its block
        state = replace(state, labels={key: text for key, text in state.labels.items() if key != "block"})
    except UserError as error:
        return PositionPlot(missing=str(error))
    if state.program and state.before.equal(state.after):
        return PositionPlot(missing=UNCHANGED)
    if kind == "svg" and grid[0] * grid[1] <= MOST_TOKENS:
        from fluxlab.drawing.position_svg import positions_svg, svg_url

        svg, size = positions_svg(state)
        return PositionPlot(svg_url(svg), size)
    with plot.style(plot.STYLE):
        content, size = plot_png(plot.draw_positions(state))
    return PositionPlot(data_url(content, "png"), size)
