"""`engine=ray`: workers hold the model and compute batches, which this process hands out as they become free."""

import contextlib
import secrets
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fluxlab import stopping
from fluxlab.engines.cluster import Cluster, Handle
from fluxlab.engines.ray_worker import Answer, compared_versions
from fluxlab.errors import UserError, show
from fluxlab.experiment.cells import Batch, Settings
from fluxlab.experiment.engine import Done
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import Store
from fluxlab.experiment.work import is_done
from fluxlab.files import PARTIAL, write_atomic
from fluxlab.memory import Memory
from fluxlab.positions import loaded_plugins

LOOK = 0.5
"""Seconds between two looks at SIGTERM while no batch ends."""


class RayEngine:
    """See `fluxlab.experiment.engine.Engine`. settings: those of configs/engine/ray.yaml. cache: of `open_cache`.
    memory: where each worker keeps the weights.
    """

    def __init__(self, settings: Mapping[str, Any], cache: str | None = None, memory: Memory | None = None):
        self.settings, self.cache, self.memory = settings, cache, memory
        self.retries: int = settings.get("retries", 2)
        self.cluster: Cluster | None = None
        self.workers: list[Handle] = []

    def settle(
        self, experiment: Experiment, known: Settings | None, batch_tokens: int | None, threads: int | None
    ) -> Settings:
        """See `Engine.settle`. The first worker does it."""
        return self._ask(experiment, "settle", experiment, known, batch_tokens, threads)

    def check(self, experiment: Experiment, settings: Settings, fixed: bool) -> list[str]:
        """See `Engine.check`. The first worker does it."""
        return self._ask(experiment, "check", experiment, settings, fixed)

    def compute(
        self, experiment: Experiment, settings: Settings, store: Store, batches: Sequence[Batch]
    ) -> Iterator[Done]:
        """See `Engine.compute`. A worker that dies is replaced, and its batch is computed again.

        A batch that fails more than `retries` times is set aside, and its error is in `Done`.
        """
        self._start(experiment)
        token = store.path / f".engine.{secrets.token_hex(8)}{PARTIAL}"  # a worker that finds it writes to the store
        token.touch()
        try:
            begin = (experiment, settings, str(store.path.resolve()), token.name)
            yield from _Dispatch(self, experiment, begin, store, batches).run()
        finally:
            token.unlink(missing_ok=True)

    def close(self) -> None:
        """End the workers, and the Ray that was started for them."""
        for worker in self.workers:
            worker.end()
        self.workers = []
        if self.cluster:
            self.cluster.close()
            self.cluster = None

    def spawn(self) -> Handle:
        """Start a worker."""
        self.workers.append(self.cluster.spawn())
        return self.workers[-1]

    def accept(self, experiment: Experiment, worker: Handle, answer: Answer) -> None:
        """Raise `UserError` unless a worker has opened, with the model and the versions of this process."""
        if answer.kind != "ok":
            raise _not_loaded(worker, answer)
        found = dict(answer.value)
        worker.machine = found.pop("machine")
        for key, expected in {"model": experiment.model_digest, **compared_versions()}.items():
            if found[key] != expected:
                what = f"other files in {experiment.model.path}" if key == "model" else f"another {key}"
                raise UserError(
                    f"engine=ray: the worker on {worker.machine} has {what} than this process "
                    f"({found[key][:12]}, here {expected[:12]}); all workers need the same"
                )

    def _start(self, experiment: Experiment) -> None:
        if self.cluster is None:
            wanted = (self.settings.get(key) for key in ("address", "workers", "gpus_per_worker"))
            self.cluster = Cluster(*wanted, on_cpu=(experiment.device or "").startswith("cpu"))

    def _ask(self, experiment: Experiment, method: str, *arguments: Any) -> Any:
        """Return what the first worker answers. Raises `UserError` for whatever it could not do."""
        self._start(experiment)
        if not self.workers:
            worker = self.spawn()
            call = worker.call("open", loaded_plugins(), experiment.model, self.cache, self.memory)
            self.accept(experiment, worker, worker.answer(call))
        worker = self.workers[0]
        answer = worker.answer(worker.call(method, *arguments))
        if answer.kind == "ok":
            return answer.value
        raise _not_loaded(worker, answer)


@dataclass(frozen=True)
class _Call:
    """A call that a worker is busy with: open, begin or compute."""

    worker: Handle
    method: str
    batch: Batch | None = None


class _Dispatch:
    """The batches of one `compute`: those that wait, and the calls that workers are busy with."""

    def __init__(
        self,
        engine: RayEngine,
        experiment: Experiment,
        begin: tuple[Any, ...],
        store: Store,
        batches: Sequence[Batch],
    ):
        self.engine, self.experiment, self.begin, self.store = engine, experiment, begin, store
        self.waiting = deque(batches)
        self.busy: dict[Any, _Call] = {}
        self.free: list[Handle] = []
        self.failed: Counter[Batch] = Counter()
        self.lost = 0
        self.out_of_memory = ""

    def run(self) -> Iterator[Done]:
        """Yield every batch that ends. A free worker gets its next batch before that."""
        for worker in self.engine.workers:
            self._give(worker, "begin", *self.begin)
        self._hand_out()
        while self.busy and not self._only_loads():
            done = []
            for call in self.engine.cluster.wait(list(self.busy), LOOK):
                was = self.busy.pop(call)
                answer = was.worker.answer(call)
                self._place(was, answer)
                if was.batch:
                    done.append(self._outcome(was.batch, answer))
            self._hand_out()
            yield from filter(None, done)
        if self.out_of_memory:
            raise torch.OutOfMemoryError(self.out_of_memory)

    def _only_loads(self) -> bool:
        """Whether the run is to stop and no batch is at hand."""
        return stopping.asked() and not any(call.batch for call in self.busy.values())

    def _give(self, worker: Handle, method: str, *arguments: Any, batch: Batch | None = None) -> None:
        self.busy[worker.call(method, *arguments)] = _Call(worker, method, batch)

    def _hand_out(self) -> None:
        if stopping.asked() or self.out_of_memory:
            return
        while self.waiting and self.free:
            batch = self.waiting.popleft()
            self._give(self.free.pop(), "compute", batch, batch=batch)
        while len(self.engine.workers) < min(self.engine.cluster.workers, len(self.waiting)):
            self._give(
                self.engine.spawn(),
                "open",
                loaded_plugins(),
                self.experiment.model,
                self.engine.cache,
                self.engine.memory,
            )

    def _place(self, was: _Call, answer: Answer) -> None:
        """Give a worker that has answered what it does next, or leave it out if it has died."""
        if answer.kind == "died" or (answer.kind == "bug" and "CUDA" in answer.message):  # CUDA does not recover
            was.worker.end()
            self.engine.workers.remove(was.worker)
            self.lost = self.lost + 1 if was.method != "compute" else 0
            if self.lost > self.engine.retries and not stopping.asked():
                raise _not_loaded(was.worker, answer)
        elif was.method == "open":
            self.engine.accept(self.experiment, was.worker, answer)
            self._give(was.worker, "begin", *self.begin)
        elif was.method == "begin" and answer.kind != "ok":
            raise _not_loaded(was.worker, answer)
        else:
            self.free.append(was.worker)

    def _outcome(self, batch: Batch, answer: Answer) -> Done | None:
        """Return how a batch ended; None if it waits again, or is left to the next run."""
        if answer.kind == "ok":
            failures, files = answer.value
            self._write(files)
            return Done(batch, failures)
        if answer.kind == "user":
            raise UserError(answer.message)
        if answer.kind == "memory":
            self.out_of_memory = answer.message
        elif not stopping.asked():
            self.failed[batch] += 1
            if self.failed[batch] > self.engine.retries:
                return self._set_aside(batch, answer)
            self.waiting.append(batch)
        return None

    def _set_aside(self, batch: Batch, answer: Answer) -> Done:
        lacking = [cell for cell in batch.cells if not is_done(self.store, self.experiment, cell, batch.folder)]
        what = f"failed {self.failed[batch]} times: {answer.message}"
        lines = [f"{cell.variant}, prompt {show(cell.prompt)}, seed {cell.seed}: {what}" for cell in lacking]
        return Done(batch, lines, answer.details.rstrip())

    def _write(self, files: Mapping[str, bytes]) -> None:
        """Write files that a worker without the store has sent: arrays, then images, then the JSON of images."""
        for name, content in sorted(files.items(), key=lambda file: _ORDER.index(file[0].rpartition(".")[2])):
            target = self.store.path / name
            if not target.is_file() or target.read_bytes() != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(target, content)


_ORDER = ("safetensors", "png", "json")


def _not_loaded(worker: Handle, answer: Answer) -> UserError:
    """Return the error for a worker that could not import, load or check, in at most three lines."""
    where = f"the worker on {worker.machine}" if worker.machine else "a worker"
    if answer.kind == "user":
        return UserError(f"engine=ray, {where}: {answer.message}")
    problem = "ended before it had loaded the model" if answer.kind == "died" else "could not load the model"
    error = UserError(f"engine=ray: {where} {problem}\n{answer.message}")
    error.__cause__ = RuntimeError(answer.details)
    return error


@contextlib.contextmanager
def started(settings: Mapping[str, Any], cache: str | None = None, memory: Memory | None = None) -> Iterator[RayEngine]:
    """Yield the engine, and end its workers at the end of the block."""
    engine = RayEngine(settings, cache, memory)
    try:
        yield engine
    finally:
        engine.close()
