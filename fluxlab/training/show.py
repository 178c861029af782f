"""What a run shows of itself: progress in the terminal, curve and sample grids to files first, then to W&B."""

import csv
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image


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


class Progress:
    """A rich bar with time left on a terminal, else a line every `every` seconds."""

    def __init__(self, what: str, total: int, done: int = 0, every: float = 30):
        self.what, self.total, self.first, self.every = what, total, done, every
        self.start = self.last = time.monotonic()
        self.bar = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar.start()
            self.task = self.bar.add_task(what, total=total, completed=done)

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=done, description=f"{self.what} {note}")
        elif now - self.last >= self.every or done == self.total:
            self.last = now
            pace = (now - self.start) / max(1, done - self.first)
            left = int(pace * (self.total - done))
            print(
                f"{self.what} {done}/{self.total}  {note}  {pace:.2f} s a step, {left // 60}:{left % 60:02} left",
                flush=True,
            )

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def write_curve(file: Path, curve: list[list[float]]) -> None:
    """The loss curve as CSV: step, weighted loss, plain loss, gradient norm, learning rate's share."""
    partial = file.with_suffix(".part")
    with open(partial, "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["step", "loss", "plain_loss", "grad_norm", "lr_share"])
        rows.writerows(curve)
    os.replace(partial, file)


def write_grid(file: Path, images: np.ndarray, columns: int, zoom: int = 2) -> None:
    """uint8 images `(n, H, W, 3)` side by side, each pixel `zoom` wide."""
    rows = [
        np.concatenate(list(images[i : i + columns]), axis=1)
        for i in range(0, len(images) // columns * columns, columns)
    ]
    whole = Image.fromarray(np.concatenate(rows))
    partial = file.with_suffix(".part")
    whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST).save(partial, format="png")
    os.replace(partial, file)
