"""The README's pictures, from a run of the article's experiment: `python -m experiments.gallery STORE`.

Writes small PNGs into `experiments/gallery/`; the figures themselves, at print size, are what the other scripts make.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from experiments import article, ids, schedule
from fluxlab.compose import guarded
from fluxlab.experiment.reading import read_store

GALLERY = Path(__file__).parent / "gallery"
WIDTH = 1200  # px
FIGURES = {"article": "article-page", "ids": "ids-page", "schedule": "schedule-page"}


def make(store: Path) -> list[Path]:
    """Draw the three figures and write each as a PNG of at most `WIDTH` px."""
    GALLERY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        article.make(read_store(store), folder)
        ids.make(folder)
        schedule.make(folder)
        return [_reduced(folder / f"{stem}.png", GALLERY / f"{to}.png") for to, stem in FIGURES.items()]


def _reduced(file: Path, to: Path) -> Path:
    with Image.open(file) as image:
        image = image.convert("RGB")
        image.thumbnail((WIDTH, 2 * WIDTH), Image.Resampling.LANCZOS)
        image.save(to, optimize=True)
    return to


def main(arguments: list[str]) -> int:
    """0 when done, 2 for what the user can mend."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("python -m experiments.gallery STORE", file=sys.stderr)
        return 2
    return guarded(lambda: print(*make(Path(arguments[0])), sep="\n"), "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
