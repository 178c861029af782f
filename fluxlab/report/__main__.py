"""`python -m fluxlab.report STORE [STORE …]`: the page of a run folder again, or several run folders as one page."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from fluxlab.compose import guarded
from fluxlab.errors import UserError
from fluxlab.report.page import REPORT_FILE, write_report


def main(arguments: list[str] | None = None) -> int:
    """0 when done, 2 for what the user can mend (one to three lines on stderr), 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: run(_parser().parse_args(arguments)), "interrupted")


def run(options: argparse.Namespace) -> None:
    """Write the page, and say where it is."""
    from fluxlab.positions import load_plugins

    file = options.out or (options.stores[0] / REPORT_FILE if len(options.stores) == 1 else Path(REPORT_FILE))
    if file.is_dir():
        raise UserError(f"-o {file}: a folder; name a file, for instance {file / REPORT_FILE}")
    if options.out and not file.parent.is_dir():
        raise UserError(f"-o {file}: there is no folder {file.parent}; make it, or name another")
    load_plugins(options.plugins, "--plugins")
    write_report(options.stores, file)
    print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fluxlab.report",
        description="The page of a run folder: pictures, numbers, programs, and how to make them again, in one file.",
        allow_abbrev=False,
    )
    parser.error = _refuse
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE", help="run folders; several make one page")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the page (default: {REPORT_FILE} in the run folder; of several, here)",
    )
    parser.add_argument(
        "--plugins", action="append", default=[], metavar="MODULE", help="a module with ops that the runs' programs use"
    )
    return parser


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}\npython -m fluxlab.report --help lists what there is")


if __name__ == "__main__":
    sys.exit(main())
