"""What the playground shows for one prompt, seed and program: images, positions, word maps. No user interface."""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fluxlab.errors import UserError
from fluxlab.positions import Context, Program, lint, region_prompts, sources_of, split_resample, with_sources
from fluxlab.positions.at_step import program_at_step
from fluxlab.references import Grids
from fluxlab.resampling import check_resampled, is_resampled

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxlab.pipeline import Pipeline
    from fluxlab.probes import Captured
    from fluxlab.sampling import Sampling

MAPS = {"words": {"kind": "words", "direction": "image_to_word", "average": ["steps", "blocks", "heads"]}}
"""The capture `words`, averaged over all that the page does not show, so that it stays small for any model."""

MAP_SIDE = 128  # px, the longer side of a word map


@dataclass(frozen=True)
class WordMap:
    """A word of the prompt and its map over each image, with one scale for both."""

    word: str
    before: "Image"
    after: "Image"


@dataclass(frozen=True)
class Drawn:
    """One answer of the playground.

    positions: a plot of the token layout as PNG. maps_note: why there are no word maps; empty if there are. notes: of
    `fluxlab.positions.lint`. seconds: what it all took.
    """

    before: "Image"
    after: "Image"
    positions: bytes
    maps: Sequence[WordMap]
    maps_note: str
    notes: Sequence[str]
    seconds: float


def draw(
    pipe: "Pipeline", prompt: str, seed: int, program: Program, steps: int | None = None, enlarge: float | None = None
) -> Drawn:
    """Return the images before and after a program, computed in one batch, and what explains them.

    steps: None means the model's own number. enlarge: the image's size by that of the model's.

    Raises `UserError` for what does not fit the model, and `NonFiniteError` for an image with NaN. If only the capture
    of attention is refused, there are no maps, and a note gives the reason.
    """
    from fluxlab.probes import Probe
    from fluxlab.sampling import Sampling

    started = time.perf_counter()
    settings = pipe.resolve(Sampling(steps=steps, enlarge=enlarge, unknown_words="error"))
    programs = [Program(), own_sources(program)]
    probe, note = Probe(MAPS), ""
    pipe.check([prompt] * 2, programs, settings)
    try:
        if not prompt.strip():
            raise UserError("the prompt has no words")
        if is_resampled(programs):
            check_resampled("pil", probe=probe)
        pipe.check([prompt] * 2, programs, settings, probe)
    except UserError as error:
        probe, note = None, str(error)
    before, after = pipe.sample([prompt] * 2, seed, programs, settings, probe=probe)
    context = context_of(pipe, prompt, programs[1], settings)
    shown, _ = split_resample(programs[1])
    return Drawn(
        before,
        after,
        positions_png(shown, context),
        word_maps(probe.arrays, (before, after)) if probe else (),
        note,
        [str(one) for one in lint(shown, context)],
        time.perf_counter() - started,
    )


def own_sources(program: Program) -> Program:
    """Return a program whose `inject`s take from the image before it, sample 0 of the batch.

    Raises `UserError` for another source, which a run has and this page has not.
    """
    for path, source in sources_of(program):
        if source != {"variant": "baseline"}:
            raise UserError(f"{path}: {source}, expected baseline here; a run can take from other images")
    return with_sources(program, [{"sample": 0}] * len(sources_of(program)))


def context_of(pipe: "Pipeline", prompt: str, program: Program, settings: "Sampling") -> Context:
    """Return the context in which a program of one image is resolved."""
    rows, cols = pipe.grid(settings.height, settings.width)
    length = settings.max_sequence_length
    grids = Grids((rows, cols), further=len(region_prompts(program)) * length)
    return pipe.context([prompt], length, grids, pipe.schedule.times(settings.steps, rows * cols))


def positions_png(program: Program, context: Context) -> bytes:
    """Return the plot of a program's positions, where it acts first, as a PNG."""
    from fluxlab.drawing.position_plot import STYLE, draw_positions, style

    figure, content = draw_positions(program_at_step(program, context)), io.BytesIO()
    figure.set_size_inches(5.2, 6)  # the page shows it small, and two columns of the legend do not fit
    (wide,) = figure.legends
    labels = [text.get_text() for text in wide.get_texts()]
    wide.remove()
    with style(STYLE):
        figure.legend(wide.legend_handles, labels, loc="outside lower left")
        figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def word_maps(arrays: "Mapping[str, Captured]", images: "Sequence[Image]") -> list[WordMap]:
    """Return a map for each word of the prompt over the images of a batch. The two of a word share their scale."""
    from fluxlab.drawing.attention import overlay
    from fluxlab.probes import of_sample

    heats = [of_sample(arrays, sample)["words"].mean("direction") for sample in range(len(images))]
    made = []
    for word in heats[0].labels("word"):
        pair = [heat.sel(word=word).values for heat in heats]
        highest = max(float(heat.max()) for heat in pair)
        shown = [
            overlay(heat, image, highest=highest, size=_fitted(image)) for heat, image in zip(pair, images, strict=True)
        ]
        made.append(WordMap(word, *shown))
    return made


def _fitted(image: "Image") -> tuple[int, int]:
    scale = MAP_SIDE / max(image.size)
    return tuple(max(1, round(scale * n)) for n in image.size)
