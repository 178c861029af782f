"""What a run shows of itself: curve and sample grids to files first, then to W&B."""

import csv
import io
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fluxlab.files import write_atomic


class Tracker:
    """W&B if wanted and possible. Whatever goes wrong with it is said once and never stops a run."""

    def __init__(self, kind: str, folder: Path, config: dict):
        self.run = None
        if kind == "none":
            return
        try:
            import wandb

            netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
            keyed = os.environ.get("WANDB_API_KEY") or (netrc.is_file() and "wandb" in netrc.read_text())
            mode = os.environ.get("WANDB_MODE") or ("online" if keyed else "offline")
            self.run = wandb.init(project="fluxlab-train", group=config["name"], dir=folder, config=config, mode=mode)
        except Exception as error:
            self._lost(error)

    def log(self, values: dict[str, float], step: int, images: dict[str, Path] | None = None) -> None:
        if self.run is None:
            return
        try:
            import wandb

            shown = {key: wandb.Image(str(file)) for key, file in (images or {}).items()}
            self.run.log({**values, **shown}, step=step)
        except Exception as error:
            self._lost(error)

    def close(self) -> None:
        if self.run is not None:
            try:
                self.run.finish(quiet=True)
            except Exception as error:
                self._lost(error)

    def _lost(self, error: Exception) -> None:
        self.run = None
        print(
            f"tracking stopped ({type(error).__name__}: {error}); the run goes on, curve.csv has everything",
            file=sys.stderr,
        )


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
