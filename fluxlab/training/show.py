"""Curves and sample grids of a training run: first to files, then to W&B."""

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
    """Log to W&B if requested. Its failures are reported once and never stop a run."""

    def __init__(self, kind: str, folder: Path, config: dict):
        self.link = None
        if kind != "none":
            command = f"python -m fluxlab.train {shlex.join(sys.argv[1:])}"
            self.link = Link(folder, {"project": "fluxlab-train", "group": config["name"]}, config, command)

    def log(self, values: dict[str, float], step: int, images: dict[str, Path] | None = None) -> None:
        """Log numbers and images of a step. The image files must not change afterwards."""
        if self.link:
            shown = {key: [(str(file.resolve()), None)] for key, file in (images or {}).items()}
            self.link.send({"log": values, "images": shown, "step": step})

    def close(self) -> None:
        """End the run, as failed if an exception is being raised."""
        if self.link:
            self.link.close(exit_code=int(sys.exc_info()[0] is not None))


def write_curve(file: Path, curve: list[list[float]]) -> None:
    """Write the loss curve as CSV: step, weighted loss, plain loss, gradient norm, share of the learning rate."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["step", "loss", "plain_loss", "grad_norm", "lr_share"])
    rows.writerows(curve)
    write_atomic(file, text.getvalue())


def write_grid(file: Path, images: np.ndarray, columns: int, zoom: int = 2) -> None:
    """Write uint8 images `(n, H, W, 3)` as one PNG with `columns` per row, enlarged `zoom` times."""
    rows = [
        np.concatenate(list(images[i : i + columns]), axis=1)
        for i in range(0, len(images) // columns * columns, columns)
    ]
    whole = Image.fromarray(np.concatenate(rows))
    whole = whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST)
    write_atomic(file, lambda handle: whole.save(handle, format="png"))
