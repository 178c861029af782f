"""One process at a time in a run folder."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fluxlab.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK, MARKER = ".lock", ".lock.marker"
LOCKS = (LOCK, MARKER)
"""Names of lock files: `.lock` is locked by the system, `.lock.marker` is a lock because it exists."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


def make_folder(path: Path) -> None:
    """Create a folder unless it exists. Raises `UserError` if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a folder while the block runs.

    On a file system without locks, such as NFS without a lock daemon, a marker file is the lock. A process on another
    machine cannot tell it from one that a killed process left behind. Raises `UserError` if another process has the
    lock, and if the folder cannot be written.
    """
    lock = _acquire(path)
    try:
        yield
    finally:
        lock.release()


def _acquire(path: Path) -> "BaseFileLock":
    from filelock import FileLock, SoftFileLock, Timeout

    try:
        lock = FileLock(path / LOCK, timeout=0)
        lock.acquire()
        return lock
    except Timeout:
        raise UserError(
            f"out={path}: another process is running in this folder; wait for it, or name another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise _not_writable(path, error) from error
    print(f"{path}: this file system has no locks; {MARKER} marks the folder as used instead", file=sys.stderr)
    try:
        lock = SoftFileLock(path / MARKER, timeout=0)
        lock.acquire()
        return lock
    except Timeout:
        raise UserError(
            f"out={path}: another process is running in this folder, or one was killed in it.\n"
            f"If none is running, delete {path / MARKER}."
        ) from None
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(f"out={path}: cannot be written ({error.strerror or error}); name another folder")
