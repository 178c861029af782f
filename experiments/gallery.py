"""`python -m experiments.gallery STORE`: the README's figures as small PNGs, from a run of the article's experiment.

The committed ones are written only on request: `-o experiments/gallery`. Figures at print size are made by the other
scripts.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from experiments import article, ids, schedule
from experiments.results import plain_name
from experiments.style import out_argument, refusing_parser
from fluxlab.compose import guarded
from fluxlab.experiment.reading import read_store
from fluxlab.images import open_image

WIDTH = 1200  # px


def make(store: Path, folder: Path) -> list[Path]:
    """Draw the three figures and write each as a PNG of at most 1200 px."""
    run = read_store(store)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        drawn = Path(name)
        article.make(run, drawn, widths=["page"])
        ids.make(drawn)
        schedule.make(drawn)
        stems = {"article": plain_name(run), "ids": "ids", "schedule": "schedule"}
        return [_reduce(drawn / f"{stem}-page.png", folder / f"{to}.png") for to, stem in stems.items()]


def _reduce(file: Path, to: Path) -> Path:
    image = open_image(file)
    image.thumbnail((WIDTH, 2 * WIDTH), Image.Resampling.LANCZOS)
    image.save(to, optimize=True)
    return to


def main(arguments: list[str]) -> int:
    """Return the exit code: 0; 2 for an error that the user can fix."""
    parser = refusing_parser("gallery", make.__doc__)
    parser.add_argument("store", type=Path, help="the folder of a finished run of +exp=article")
    out_argument(parser, "figures/gallery")

    def work() -> None:
        options = parser.parse_args(arguments)
        print(*make(options.store, options.out), sep="\n")

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
