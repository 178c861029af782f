"""Progress of a loop: a bar on a terminal, lines elsewhere."""

import sys
import time


class Progress:
    """Show the progress of `total` steps: a bar on a terminal, else a line at least `every` seconds apart.

    Lines are also printed for the first and the last step.
    """

    def __init__(self, what: str, total: int, done: int = 0, every: float = 30, unit: str = "step"):
        self.what, self.total, self.first, self.every, self.unit = what, total, done, every, unit
        self.start, self.last = time.monotonic(), None
        self.bar = None
        if sys.stdout is not None and sys.stdout.isatty():
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
        pace = (now - self.start) / max(1, done - self.first)
        speed = f"{pace:.2f} s per {self.unit}" if pace >= 0.5 else f"{1 / max(pace, 1e-9):.1f} {self.unit}s/s"
        text = "  ".join(part for part in (note, speed) if part)
        if self.bar:
            self.bar.update(self.task, completed=done, description=f"{self.what}  {text}")
        elif self.last is None or now - self.last >= self.every or done == self.total:
            self.last = now
            left = int(pace * (self.total - done))
            print(f"{self.what} {done}/{self.total}  {text}, {left // 60}:{left % 60:02} left", flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()
