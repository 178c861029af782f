"""`python -m fluxlab.merge FOLDER… out=FOLDER`: join run folders of one experiment, then measure and draw."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.compose import guarded
from fluxlab.errors import UserError, show

if TYPE_CHECKING:
    from fluxlab.experiment.cells import Cell, Settings
    from fluxlab.experiment.spec import Experiment
    from fluxlab.experiment.store import Store


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for an error that the user can fix; 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: run(arguments), "interrupted; the same command continues from here")


def run(arguments: Sequence[str]) -> None:
    """Join the folders and print where the result is."""
    from fluxlab.positions import load_plugins

    parser = argparse.ArgumentParser(
        prog="python -m fluxlab.merge",
        description="Join run folders that hold parts of one experiment, then measure and draw.",
        usage="%(prog)s FOLDER… out=FOLDER",
        allow_abbrev=False,
    )
    parser.error = _refuse
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="run folders, such as those of the shards")
    parser.add_argument("--plugins", action="append", default=[], metavar="MODULE", help="a module whose ops are used")
    options = parser.parse_args(arguments)
    folders = [Path(word).expanduser() for word in options.folders if not word.startswith("out=")]
    out = [Path(word.removeprefix("out=")).expanduser() for word in options.folders if word.startswith("out=")]
    if not folders or len(out) != 1:
        raise UserError("name the folders to join and where to write: python -m fluxlab.merge FOLDER… out=FOLDER")
    load_plugins(options.plugins, "--plugins")
    copied = merge(folders, out[0])
    print(f"{copied} images joined → {out[0]}")


def _refuse(message: str) -> None:
    raise UserError(f"{message}\npython -m fluxlab.merge --help lists the arguments")


def merge(folders: Sequence[Path], out: Path) -> int:
    """Join stores of one experiment at `out`, then measure and draw. Returns how many images were copied.

    Files are copied, and a file that `out` has already is left as it is. Raises `UserError` for stores of different
    experiments, settings or models, for a cell whose images differ, and if images are still missing.
    """
    from fluxlab.api import tabulate
    from fluxlab.experiment import captures
    from fluxlab.experiment.spec import from_request
    from fluxlab.experiment.store import Store, open_store
    from fluxlab.experiment.work import every_batch, lacking

    sources = [Store(folder) for folder in dict.fromkeys(folders)]
    for source in sources:
        if not source.record:
            raise UserError(f"{source.path}: not a run folder, or its experiment.yaml is damaged")
    first = sources[0]
    for other in sources[1:]:
        _check_same(first, other)
    experiment, settings = from_request(first.record["request"]), first.settings()
    if experiment.digest != first.record["digest"]:
        raise UserError(f"{first.path}: experiment.yaml was changed, or its ops are those of another version")
    with open_store(out) as store:
        if store.record:
            _check_same(first, store)
        else:
            command = _command(first.record["command"], out)
            store.write_experiment(experiment, settings, first.record["versions"], command)
        copied = 0
        for batch in every_batch(experiment, settings):
            for cell in batch.cells:
                copied += sum(_copy(source, store, cell, batch.folder, experiment) for source in sources)
        missing = lacking(experiment, settings, store)
        if missing:
            raise UserError(
                f"{out}: {missing} images are in none of the folders; run the shards that have not ended, then merge "
                f"again.\nOr run {_command(first.record['command'], out)}"
            )
        captures.write_index(experiment, settings, store)
        if copied or not store.sealed(()):
            tabulate(experiment, settings, store)
    return copied


def _check_same(first: "Store", other: "Store") -> None:
    """Raise `UserError` if two stores do not hold parts of one experiment, computed in the same way."""
    pairs = [("", first.record["request"], other.record["request"])]
    pairs += [("settings.", _comparable(first.settings()), _comparable(other.settings()))]
    for prefix, a, b in pairs:
        for key in {**a, **b}:
            if a.get(key) != b.get(key):
                raise UserError(
                    f"{first.path} and {other.path} hold different experiments: {prefix}{key} is {show(a.get(key))} "
                    f"and {show(b.get(key))}"
                )


def _comparable(settings: "Settings") -> dict[str, Any]:
    """Return the settings that change bits of images. Only a CPU's depend on the number of threads."""
    record = settings.record()
    device = record["device"].split(":")[0]
    return {**record, "device": device, "threads": record["threads"] if device == "cpu" else 0}


def _command(command: str, out: Path) -> str:
    """Return the command of a shard as that of the whole run in another folder."""
    words = shlex.split(command)
    if words[:3] != ["python", "-m", "fluxlab.run"]:
        return command
    return shlex.join([*(word for word in words if not word.startswith(("out=", "shard="))), f"out={out}"])


def _copy(source: "Store", store: "Store", cell: "Cell", folder: str, experiment: "Experiment") -> int:
    """Copy the files of a cell that `store` lacks. Returns 1 if its image was copied, else 0."""
    from fluxlab.experiment.store import CELLS
    from fluxlab.files import write_atomic

    captured = experiment.captures if folder == CELLS else ""
    if captured and source.has_arrays(cell, captured) and not store.has_arrays(cell, captured):
        target = store.arrays(cell.key, captured)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, source.arrays(cell.key, captured).read_bytes())
    if not source.has(cell, folder) or source.path.resolve() == store.path.resolve():
        return 0
    png, target = source.png(cell.key, folder), store.png(cell.key, folder)
    if store.has(cell, folder):
        if png.read_bytes() != target.read_bytes():
            raise UserError(f"{png} and {target}: two different images of one cell; remove one with its .json")
        return 0
    target.parent.mkdir(exist_ok=True)
    write_atomic(target, png.read_bytes())
    write_atomic(target.with_suffix(".json"), png.with_suffix(".json").read_bytes())
    return 1


if __name__ == "__main__":
    sys.exit(main())
