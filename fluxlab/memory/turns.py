"""Batches that take turns at the blocks, so that a streamed block is loaded once for all of them."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class _Stopped(BaseException):
    """Ends a task because another one failed. Not an `Exception`, so that no task catches it."""


class Turns:
    """Runs tasks that go through the blocks of one model again and again. At any time one of them runs.

    Each task has a thread, because sampling is a loop that stops in the middle of a forward. At a block a task waits
    until all others have come to it, too, or to a later one: blocks are visited in order, as an elevator visits
    floors. A task may do as many forwards as it likes.
    """

    def __init__(self, blocks: int):
        self._blocks = blocks
        self._position = 0
        self._at: dict[int, int] = {}  # the block at which each waiting task is
        self._go: list[threading.Event] = []
        self._unstarted: list[int] = []
        self._left = 0
        self._number = threading.local()
        self._done = threading.Event()
        self._errors: list[BaseException] = []
        self._stopped = False

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of all tasks, in order. Raises the first error, after the other tasks have stopped."""
        results: list[T | None] = [None] * len(tasks)

        def work(i: int) -> None:
            self._number.value = i
            self._go[i].wait()
            self._go[i].clear()
            try:
                if not self._stopped:
                    results[i] = tasks[i]()
            except _Stopped:
                pass
            except BaseException as error:
                self._errors.append(error)
                self._stopped = True
            finally:
                self._left -= 1
                self._pass_on()

        self._go = [threading.Event() for _ in tasks]
        self._unstarted = list(range(len(tasks)))
        self._left = len(tasks)
        threads = [threading.Thread(target=work, args=(i,), name=f"batch-{i}") for i in range(len(tasks))]
        for thread in threads:
            thread.start()
        try:
            self._pass_on()
            self._done.wait()
        except BaseException:  # Ctrl-C reaches this thread: the tasks stop at their next block
            self._stopped = True
            raise
        finally:
            for thread in threads:
                thread.join()
        if self._errors:
            raise self._errors[0]
        return results

    def arrive(self, block: int) -> None:
        """Wait until it is this task's turn to compute `block`. Returns at once in a thread that is not a task's."""
        me = getattr(self._number, "value", None)
        if me is None:
            return
        self._at[me] = block
        self._pass_on()
        self._go[me].wait()
        self._go[me].clear()
        if self._stopped:
            raise _Stopped

    def awaited(self, block: int) -> bool:
        """Return whether another task waits for `block`."""
        return not self._stopped and block in self._at.values()

    def _pass_on(self) -> None:
        """Wake the task whose block comes next. Only the running task calls this, before it waits or ends."""
        if self._unstarted:
            self._go[self._unstarted.pop(0)].set()
        elif self._at:
            task = min(self._at, key=lambda i: ((self._at[i] - self._position) % self._blocks, i))
            self._position = self._at.pop(task)
            self._go[task].set()
        elif self._left == 0:
            self._done.set()
