"""The program that runs W&B in a separate process. `link.py` starts it and sends one JSON object per line.

The first line says how to start. The next ones have `log`, `images`, `videos`, `tables`, `config`, `summary` and
`artifact` in any combination, the last one `finish` with an exit code. If the parent ends, the pipe closes and the run
counts as failed. Replies are also one JSON object per line: `mode`, `id`, `folder`, `url` and `why` once W&B has
started, then `done`, or `lost` with the reason. The program is started by its path, so it imports nothing from fluxlab.
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
MOST_IMAGES = 108  # per key and step; W&B drops more
THUMBNAIL = 256  # px: tables show small images, and W&B keeps a copy of each
FAILED = 1
LAST_WORDS = 10  # s in which a failed run may report that


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
            _log(run, message)
        signal.alarm(max(1, int(start["seconds"])))  # the parent may have stopped waiting
        run.finish(reported)
        if mode == "online":  # the server has everything
            for copies in ("data", "cache"):
                shutil.rmtree(folder / copies, ignore_errors=True)
        _note(folder, run.id, start["mark"], "finished" if reported == 0 else "failed")
        print(json.dumps({"done": True}), file=replies)
    except Exception as error:
        print(json.dumps({"lost": _first_line(error)}), file=replies)
        signal.alarm(LAST_WORDS)
        with contextlib.suppress(Exception):
            run.finish(FAILED)
        os._exit(FAILED)  # W&B's own exit could wait forever


def _private_pipes() -> tuple[IO[str], IO[str]]:
    """Return the pipes to the parent on descriptors that W&B's processes and prints do not use."""
    commands, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", 1, encoding="utf-8")
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)
    return commands, replies


def _start(start: dict[str, Any], folder: Path, replies: IO[str]) -> tuple[Any, str]:
    """Return W&B's run and its mode, the first that works. Reply which one, and why not an earlier one."""
    import wandb

    known = wandb.Settings.model_fields  # some settings are newer than the oldest W&B that is supported
    sys.argv[1:] = start["arguments"]  # W&B shows them
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
    started = {"mode": mode, "id": run.id, "folder": str(Path(run.dir).parent), "why": why}
    print(json.dumps({**started, "url": run.url if mode == "online" else None}), file=replies)
    return run, mode


def _log(run: Any, message: dict[str, Any]) -> None:
    """Send one message to W&B."""
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
            # no copies: the files of a store do not change
            made.add_file(file, name, skip_cache=True, policy="immutable")
        run.log_artifact(made)


def _images(some: list[tuple[str, str]]) -> list[Any]:
    """Return W&B's images of (file or data URL, caption)."""
    import wandb

    def content(source: str) -> Any:
        inline = source.startswith("data:")
        return _open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) if inline else source

    return [wandb.Image(content(source), caption=caption) for source, caption in some]


def _open(source: Any) -> Any:
    """Return a loaded image. `fluxlab.images` cannot be imported here."""
    from PIL import Image

    with Image.open(source) as image:
        image.load()
        return image


def _cells(row: list[Any]) -> Iterator[Any]:
    """Yield the cells of a table row, with an image for `{"image": file}`."""
    import wandb

    for cell in row:
        if not isinstance(cell, dict):
            yield cell
            continue
        image = _open(cell["image"])
        if max(image.size) > THUMBNAIL:
            image = image.convert("RGB")
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            yield wandb.Image(image)
        else:
            yield wandb.Image(cell["image"])


def _earlier(folder: Path) -> list[str]:
    """Return the ids of the earlier runs of a store."""
    try:
        lines = [json.loads(line) for line in (folder / RUNS).read_text().splitlines()]
    except FileNotFoundError:
        return []
    return list(dict.fromkeys(line["id"] for line in lines))


def _note(folder: Path, run: str, mark: str, state: str) -> None:
    with open(folder / RUNS, "a") as file:
        print(json.dumps({"id": run, "state": state, "mark": mark}), file=file)


def _first_line(error: Exception) -> str:
    with contextlib.suppress(IndexError):
        return str(error).splitlines()[0][:200]
    return type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
