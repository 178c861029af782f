"""What a run shows of itself: curve and sample grids to files first, then to W&B."""

import csv
import io
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fluxlab.files import write_atomic
from fluxlab.report.wandb.link import Link


class Tracker:
    """W&B if wanted and possible. Whatever goes wrong with it is said once and never stops a run."""

    def __init__(self, kind: str, folder: Path, config: dict):
        self.link = None
        if kind != "none":
            command = f"python -m fluxlab.train {shlex.join(sys.argv[1:])}"
            self.link = Link(folder, {"project": "fluxlab-train", "group": config["name"]}, config, command)

    def log(self, values: dict[str, float], step: int, images: dict[str, Path] | None = None) -> None:
        """Numbers and pictures of a step. The pictures' files have to stay as they are."""
        if self.link:
            shown = {key: [(str(file.resolve()), None)] for key, file in (images or {}).items()}
            self.link.say({"log": values, "images": shown, "step": step})

    def close(self) -> None:
        """End the run: as failed where an exception is on its way."""
        if self.link:
            self.link.close(exit_code=int(sys.exc_info()[0] is not None))


def write_curve(file: Path, curve: list[list[float]]) -> None:
    """The loss curve as CSV: step, weighted loss, plain loss, gradient norm, learning rate's share."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["step", "loss", "plain_loss", "grad_norm", "lr_share"])
    rows.writerows(curve)
    write_atomic(file, text.getvalue())


def write_grid(file: Path, images: np.ndarray, columns: int, zoom: int = 2) -> None:
    """uint8 images `(n, H, W, 3)` side by side, each pixel `zoom` wide."""
    rows = [
        np.concatenate(list(images[i : i + columns]), axis=1)
        for i in range(0, len(images) // columns * columns, columns)
    ]
    whole = Image.fromarray(np.concatenate(rows))
    whole = whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST)
    write_atomic(file, lambda handle: whole.save(handle, format="png"))
