"""Locks of a run folder: one run, or the shards of one experiment together.

.lock                 held by a run of the whole experiment, and by the shard that measures
.lock.shard-3-of-16   held by a shard while it runs
.lock.guard           held for a moment by a shard that starts, ends or writes a file that belongs to all of them
"""

import errno
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fluxlab.errors import UserError
from fluxlab.experiment.shards import Shard

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK, MARKER = ".lock", ".lock.marker"
_GUARD = ".lock.guard"
_PATIENCE = 60
"""Seconds that a shard waits for the guard, which is held for the time of a few file operations."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


def is_lock(name: str) -> bool:
    """Return whether a file of a run folder is a lock. The system locks `.lock`; `.lock.marker` locks by existing."""
    return name == LOCK or name.startswith(f"{LOCK}.")


def make_folder(path: Path) -> None:
    """Create a folder unless it exists. Raises `UserError` if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error


class FolderLock:
    """The lock that a run or a shard has on its folder. Made by `locked`.

    alone: whether no other shard was running in the folder when this one started.
    """

    def __init__(self, path: Path, shard: Shard | None, held: "BaseFileLock", alone: bool):
        self._path, self._shard, self.alone = path, shard, alone
        self._held: BaseFileLock | None = held

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Keep other shards from starting, from ending, and from writing files that belong to all of them."""
        with _guard(self._path) if self._shard else nullcontext():
            yield

    def take_over(self, complete: Callable[[], bool]) -> bool:
        """Turn the lock of a shard into that of a run, if no other shard is running and `complete()`.

        Otherwise the shard's lock is given back. Of several shards that end at the same time, the last one sees what
        the others have written, and that none of them is running.
        """
        if self._shard is None:
            return self._held is not None
        with self.guard():
            # `complete` looks at every image: only the last shard does, others would wait for the guard meanwhile
            last = not running_shards(self._path, self._shard) and complete()
            lock = None
            if last:
                with suppress(_TakenError):  # by a run that is about to see this shard, and to stop
                    lock = _acquire(self._path, LOCK)
            self._give_back()
            self._shard, self._held = None, lock
        return lock is not None

    def release(self) -> None:
        """Give the lock back, unless `take_over` did."""
        with self.guard():
            self._give_back()

    def _give_back(self) -> None:
        if self._held is not None:
            self._held.release()
        if self._shard:
            (self._path / _name(self._shard)).unlink(missing_ok=True)


@contextmanager
def locked(path: Path, shard: Shard | None = None) -> Iterator[FolderLock]:
    """Lock a folder while the block runs: for a run, or for a shard, next to which other shards may run.

    On a file system without locks, such as NFS without a lock daemon, marker files are the locks. A process on another
    machine cannot tell such a file from one that a killed process left behind. Raises `UserError` if another process
    has the lock, and if the folder cannot be written.
    """
    lock = _lock_of_shard(path, shard) if shard else _lock_of_run(path)
    try:
        yield lock
    finally:
        lock.release()


def _lock_of_run(path: Path) -> FolderLock:
    lock = _acquire(path, LOCK, say=True)
    running = running_shards(path)
    if running:
        lock.release()
        raise UserError(
            f"out={path}: shard {running[0]} is running in this folder; wait for it, or name another folder"
            f"{_if_killed(path, running[0])}"
        )
    return FolderLock(path, None, lock, True)


def _lock_of_shard(path: Path, shard: Shard) -> FolderLock:
    with _guard(path):
        running = running_shards(path)
        if shard in running:
            raise UserError(
                f"shard={shard}: is running in {path} already; each shard runs once{_if_killed(path, shard)}"
            )
        if running and running[0].count != shard.count:
            raise UserError(
                f"shard={shard}: {running[0]} is running in {path}, and the two would compute the same batches; "
                f"use shard=i/{running[0].count}{_if_killed(path, running[0])}"
            )
        lock = _acquire(path, _name(shard), say=True)
        try:
            _acquire(path, LOCK).release()
        except UserError:
            lock.release()
            raise
        return FolderLock(path, shard, lock, not running)


def running_shards(path: Path, but: Shard | None = None) -> list[Shard]:
    """Return the shards that are running in a folder, without `but`."""
    files = (re.match(r"\.lock\.shard-(\d+)-of-(\d+)", file.name) for file in path.glob(f"{LOCK}.shard-*"))
    numbers = sorted({(int(match[1]), int(match[2])) for match in files if match})
    shards = [Shard(index, count) for index, count in numbers]
    return [shard for shard in shards if shard != but and _is_taken(path, shard)]


def _is_taken(path: Path, shard: Shard) -> bool:
    try:
        _acquire(path, _name(shard)).release()
    except _TakenError:
        return True
    return False


def _if_killed(path: Path, shard: Shard) -> str:
    marker = path / _marker(_name(shard))
    return f"\nIf it was killed, delete {marker}." if marker.exists() else ""


def _name(shard: Shard) -> str:
    return f"{LOCK}.shard-{shard.index}-of-{shard.count}"


def _marker(name: str) -> str:
    return name + MARKER.removeprefix(LOCK)


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    lock = _acquire(path, _GUARD, _PATIENCE)
    try:
        yield
    finally:
        lock.release()


class _TakenError(UserError):
    """Another process has the lock."""


def _acquire(path: Path, name: str, timeout: float = 0, say: bool = False) -> "BaseFileLock":
    """Return a lock that this process has now. say: print that marker files are used, if they are."""
    from filelock import FileLock, SoftFileLock, Timeout

    try:
        lock = FileLock(path / name, timeout=timeout)
        lock.acquire()
        return lock
    except Timeout:
        raise _TakenError(
            f"out={path}: another process is running in this folder; wait for it, or name another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise _not_writable(path, error) from error
    marker = path / _marker(name)
    if say:
        print(f"{path}: this file system has no locks; {marker.name} marks the folder as used instead", file=sys.stderr)
    try:
        lock = SoftFileLock(marker, timeout=timeout)
        lock.acquire()
        return lock
    except Timeout:
        raise _TakenError(
            f"out={path}: another process is running in this folder, or one was killed in it.\n"
            f"If none is running, delete {marker}."
        ) from None
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(f"out={path}: cannot be written ({error.strerror or error}); name another folder")
