"""What all commands share: flags, exit codes, and errors as one to three lines."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fluxlab.compose.explain import short
from fluxlab.errors import BatchError, NonFiniteError, UserError
from fluxlab.stopping import EXIT_CODE, Terminated, sigterm_raises
from fluxlab.terminal import tolerant_output


def flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the flags, and the other words as `overrides`. Raises UserError for an unknown flag or folder."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=Path, default=None)
    parser.add_argument("--cfg", "-c", choices=["job"], default=None)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("overrides", nargs="*")
    known, others = parser.parse_known_intermixed_args(list(arguments))
    unknown = [other for other in others if other.startswith("-")]
    if unknown:
        key = unknown[0].lstrip("-").partition("=")[0]
        raise UserError(
            f"{unknown[0]}: there is no such flag; see --help for flags and keys\n"
            f"Keys have no dashes: {key}=<value>. To leave a variant out, write '~variants.<name>'."
        )
    known.overrides += others
    if known.config_dir:
        known.config_dir = known.config_dir.expanduser()
        if not known.config_dir.is_dir():
            raise UserError(f"--config-dir {known.config_dir}: there is no such folder; it has exp/, model/ or op/")
    return known


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def command_line(arguments: Sequence[str] | None, run: Callable[[list[str]], None], interrupted: str) -> int:
    """Run a command of words and return its exit code, see `guarded`. SIGTERM ends it after the work at hand.

    arguments: None means those of this process, which also finds plugins in its working directory.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        # `python -m` looks in the working directory too, an installed script only in its own folder
        if not sys.flags.safe_path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())

    def work() -> None:
        with sigterm_raises():
            run(list(arguments))

    return guarded(work, interrupted)


def guarded(work: Callable[[], None], interrupted: str) -> int:
    """Run `work` and return its exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C, 143 after
    SIGTERM, 1 for NaN and for batches that were set aside.

    The message of such an error, at most three lines, goes to standard error. `FLUXLAB_DEBUG=1` shows its traceback
    instead. Any other exception is a bug and is raised. Output goes on without its reader, see `tolerant_output`.
    """
    with tolerant_output():
        try:
            work()
        except Terminated:
            print(interrupted, file=sys.stderr)
            return EXIT_CODE
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return 130
        except (NonFiniteError, BatchError) as error:
            print(error, file=sys.stderr)
            return 1
        except (UserError, OSError) as error:
            if debugging() or not is_users(error):
                raise
            print(short(str(error)), file=sys.stderr)
            return 2
        return 0


def debugging() -> bool:
    """Whether `FLUXLAB_DEBUG=1` (or Hydra's `HYDRA_FULL_ERROR=1`) asks for tracebacks of user errors."""
    return "1" in (os.environ.get("FLUXLAB_DEBUG"), os.environ.get("HYDRA_FULL_ERROR"))


def is_users(error: BaseException) -> bool:
    """Whether the user can fix an error: UserError, and OSError that names a file."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None)
