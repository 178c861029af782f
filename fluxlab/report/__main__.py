"""`python -m fluxlab.report STORE [STORE …]`: write the page of a run folder, or of several run folders together."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from fluxlab.compose import guarded
from fluxlab.errors import UserError
from fluxlab.report.page import REPORT_FILE, write_report


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for an error that the user can fix; 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: run(_parser().parse_args(arguments)), "interrupted")


def run(options: argparse.Namespace) -> None:
    """Write the page and print its name and size."""
    from fluxlab.positions import load_plugins

    file = _file(options.stores, options.out)
    load_plugins(options.plugins, "--plugins")
    write_report(options.stores, file)
    print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")


def _file(stores: list[Path], out: Path | None) -> Path:
    """Return where to write. A page of several run folders belongs to none of them, so it has to be named."""
    if out is None and len(stores) > 1:
        raise UserError(f"a page of {len(stores)} run folders needs a name: add -o FILE, for example -o {REPORT_FILE}")
    file = out or stores[0] / REPORT_FILE
    if file.is_dir():
        raise UserError(f"-o {file}: a folder; name a file, for example {file / REPORT_FILE}")
    if out and not file.parent.is_dir():
        raise UserError(f"-o {file}: there is no folder {file.parent}; create it or name another")
    return file


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fluxlab.report",
        description="Write the page of a run folder: images, findings, programs and settings, in one file.",
        allow_abbrev=False,
    )
    parser.error = _refuse
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE", help="run folders; several make one page")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the page (default: {REPORT_FILE} in the run folder; required for several run folders)",
    )
    parser.add_argument(
        "--plugins", action="append", default=[], metavar="MODULE", help="a module whose ops the programs use"
    )
    return parser


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}\npython -m fluxlab.report --help lists the arguments")


if __name__ == "__main__":
    sys.exit(main())
