"""What runs W&B, in a process of its own: `wandb_link` starts it and sends JSON lines, a message each.

The first line says how to start; then come `log`, `images`, `videos`, `tables`, `config`, `summary` and `artifact`, in
any combination; at last `finish` with an exit code. A parent that dies closes the pipe, and the run counts as failed.
What it answers, also a JSON object a line: `mode`, `id`, `folder`, `url` and `why` once W&B has started, then `done`,
or `lost` with the reason. Started by its path, so nothing of this package is imported here.
"""

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

RUNS = "runs.jsonl"
MOST_IMAGES = 108  # under one key in one step: W&B drops the others
THUMBNAIL = 256  # px: tables show pictures small, and W&B keeps a copy of each
FAILED = 1
LAST_WORDS = 10  # s, for a run that has failed to say so


def main() -> None:
    commands, replies = _private_pipes()
    run = None
    try:
        start = json.loads(next(commands))
        folder = Path(start["folder"])
        run, mode = _start(start, folder, replies)
        reported = FAILED
        for line in commands:
            message = json.loads(line)
            if "finish" in message:
                reported = message["finish"]
                break
            _tell(run, message)
        signal.alarm(max(1, int(start["seconds"])))  # whoever waited for us may be gone by now
        run.finish(reported)
        if mode == "online":  # all of it is on the server
            for copies in ("data", "cache"):
                shutil.rmtree(folder / copies, ignore_errors=True)
        _note(folder, run.id, start["mark"], "finished" if reported == 0 else "failed")
        print(json.dumps({"done": True}), file=replies)
    except Exception as error:
        print(json.dumps({"lost": _first_line(error)}), file=replies)
        signal.alarm(LAST_WORDS)
        with contextlib.suppress(Exception):
            run.finish(FAILED)
        os._exit(FAILED)  # W&B's own exit waits for what may never come


def _private_pipes() -> tuple[IO[str], IO[str]]:
    """Our ends of the pipes, out of the reach of W&B's own processes and prints."""
    commands, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", 1, encoding="utf-8")
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)
    return commands, replies


def _start(start: dict[str, Any], folder: Path, replies: IO[str]) -> tuple[Any, str]:
    """W&B's run and its mode, the first that works. Says which, and why not another."""
    import wandb

    known = wandb.Settings.model_fields  # some settings are newer than the oldest W&B that we take
    sys.argv[1:] = start["arguments"]  # which W&B shows
    settings = wandb.Settings(**{key: value for key, value in start["settings"].items() if key in known})
    earlier = _earlier(folder)
    config = {**start["config"], "resumed_from": earlier} if earlier else start["config"]
    why = None
    for mode in start["modes"]:
        before = set(folder.glob("*run-*"))
        try:
            run = wandb.init(dir=folder.parent, mode=mode, config=config, settings=settings, **start["init"])
        except Exception as error:
            if mode == start["modes"][-1]:
                raise
            why = _first_line(error)
            for failed in set(folder.glob("*run-*")) - before:
                shutil.rmtree(failed, ignore_errors=True)
        else:
            break
    _note(folder, run.id, start["mark"], "started")
    told = {"mode": mode, "id": run.id, "folder": str(Path(run.dir).parent), "why": why}
    print(json.dumps({**told, "url": run.url if mode == "online" else None}), file=replies)
    return run, mode


def _tell(run: Any, message: dict[str, Any]) -> None:
    import wandb

    if "config" in message:
        run.config.update(message["config"], allow_val_change=True)
    if "summary" in message:
        run.summary.update(message["summary"])
    values = dict(message.get("log", ()))
    for key, table in message.get("tables", {}).items():
        values[key] = wandb.Table(columns=table["columns"], data=[list(_cells(row)) for row in table["rows"]])
    images = message.get("images", {})
    values |= {key: _images(some[:MOST_IMAGES]) for key, some in images.items()}
    for key, some in message.get("videos", {}).items():
        values[key] = [wandb.Video(file, caption=caption, format="gif") for file, caption in some]
    if values:
        run.log(values, step=message.get("step"))
    for first in range(MOST_IMAGES, max(map(len, images.values()), default=0), MOST_IMAGES):
        parts = {key: some[first : first + MOST_IMAGES] for key, some in images.items()}
        run.log({key: _images(part) for key, part in parts.items() if part})
    if "artifact" in message:
        made = wandb.Artifact(message["artifact"]["name"], message["artifact"]["type"])
        for file, name in message["artifact"]["files"]:
            made.add_file(
                file, name, skip_cache=True, policy="immutable"
            )  # no copies: a store's files stay as they are
        run.log_artifact(made)


def _images(some: list[tuple[str, str]]) -> list[Any]:
    """W&B's images of files and data URLs with captions."""
    import wandb
    from PIL import Image

    def opened(source: str) -> Any:
        inline = source.startswith("data:")
        return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) if inline else source

    return [wandb.Image(opened(source), caption=caption) for source, caption in some]


def _cells(row: list[Any]) -> Iterator[Any]:
    """A table's cells: `{"image": file}` stands for a picture."""
    import wandb
    from PIL import Image

    for cell in row:
        if isinstance(cell, dict):
            with Image.open(cell["image"]) as picture:
                if max(picture.size) > THUMBNAIL:
                    small = picture.convert("RGB")
                    small.thumbnail((THUMBNAIL, THUMBNAIL))
                    yield wandb.Image(small)
                else:
                    yield wandb.Image(cell["image"])
        else:
            yield cell


def _earlier(folder: Path) -> list[str]:
    """The ids of the store's runs so far."""
    try:
        told = [json.loads(line) for line in (folder / RUNS).read_text().splitlines()]
    except FileNotFoundError:
        return []
    return list(dict.fromkeys(line["id"] for line in told))


def _note(folder: Path, run: str, mark: str, state: str) -> None:
    with open(folder / RUNS, "a") as file:
        print(json.dumps({"id": run, "state": state, "mark": mark}), file=file)


def _first_line(error: Exception) -> str:
    with contextlib.suppress(IndexError):
        return str(error).splitlines()[0][:200]
    return type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
