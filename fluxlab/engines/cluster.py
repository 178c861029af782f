"""Ray, started on this machine for one run, or joined; and its actors, whose death is an answer like any other."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fluxlab.engines.ray_worker import Answer, Worker
from fluxlab.errors import UserError

OBJECT_STORE = 256 << 20
"""Bytes that Ray reserves for arguments and results. Images and arrays go through the run folder."""

_TOKEN = secrets.token_hex(32)
_ENVIRONMENT = {
    # read when Ray is imported: without clusters, a local Ray listens on 127.0.0.1 only
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # other users of this machine cannot send it anything
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": _TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Cluster:
    """A connection to Ray. `close` ends what it started.

    address: None starts a Ray of `workers` workers on this machine; `auto` or an address joins one. A Ray that this
    process has started already is used as it is. Raises `UserError` if Ray cannot be started or joined, and if it has
    fewer resources than the workers need.
    """

    def __init__(self, address: str | None, workers: int | None, gpus_per_worker: float | None, on_cpu: bool):
        self._stack = contextlib.ExitStack()
        try:
            self._start(address, workers)
            self._count(workers, gpus_per_worker, on_cpu)
        except BaseException:
            self.close()
            raise

    def _start(self, address: str | None, workers: int | None) -> None:
        if address is None:
            self._stack.enter_context(_environment(_ENVIRONMENT))
        import ray

        self.ray = ray
        if ray.is_initialized():
            return
        # logs and sockets: paths of sockets are limited to 107 characters, so that a long TMPDIR cannot be used
        folder = None
        common = {"log_to_driver": False, "logging_level": logging.ERROR}
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if address is None:
                folder = tempfile.mkdtemp(prefix="fluxlab-", dir="/tmp" if os.path.isdir("/tmp") else None)
                self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
                folder = os.path.join(folder, "ray")  # Ray lets everybody write there; only this user enters the parent
                cpus = max(workers or 1, os.cpu_count() or 1)
                local = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
                info = ray.init(address="local", _temp_dir=folder, **local, **common).address_info
                self._stack.callback(ray.shutdown)
                if not info["node_ip_address"].startswith("127."):
                    raise UserError(
                        "engine=ray: ray was imported before fluxlab.run_experiment and would listen on the network; "
                        "call ray.init yourself, or import ray later"
                    )
            else:
                ray.init(address=address, **common)
                self._stack.callback(ray.shutdown)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            if isinstance(error, UserError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            where = f"engine.address={address}: no Ray answers there" if address else "engine=ray: cannot be started"
            raise UserError(f"{where} ({reason})") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():  # Ray replaces them
                    signal.signal(number, handler)

    def _count(self, workers: int | None, gpus_per_worker: float | None, on_cpu: bool) -> None:
        """Settle how many workers there are and what each one needs."""
        has = self.ray.cluster_resources()
        gpus, cpus = has.get("GPU", 0), int(has.get("CPU", 0))
        self.gpus_per_worker = (0 if on_cpu or not gpus else 1) if gpus_per_worker is None else gpus_per_worker
        most = int(gpus / self.gpus_per_worker) if self.gpus_per_worker else cpus
        self.workers = workers or (most if self.gpus_per_worker else 1)
        if self.workers > most or not most:
            needs = f"{self.gpus_per_worker:g} GPUs" if self.gpus_per_worker else "a CPU"
            raise UserError(
                f"engine.workers={self.workers}: each needs {needs}, and Ray has {gpus:g} GPUs and {cpus} CPUs; "
                f"use at most {most} workers, or other engine.gpus_per_worker"
            )

    def spawn(self) -> "Handle":
        """Start a worker."""
        options = {"num_cpus": 1, "num_gpus": self.gpus_per_worker, "max_restarts": 0, "max_task_retries": 0}
        actor = self.ray.remote(**options)(Worker).remote(os.getcwd(), [path for path in sys.path if path])
        return Handle(self.ray, actor)

    def wait(self, calls: Sequence[Any], seconds: float) -> list[Any]:
        """Return the calls that have ended, after at most `seconds`."""
        return self.ray.wait(list(calls), num_returns=1, timeout=seconds)[0]

    def close(self) -> None:
        """End the Ray that was started, or leave the one that was joined."""
        self._stack.close()


class Handle:
    """A worker. machine: its name, once it has answered `open`."""

    def __init__(self, ray: Any, actor: Any):
        self._ray, self._actor, self.machine = ray, actor, ""

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of `Worker` and return the call, without waiting."""
        return getattr(self._actor, method).remote(*arguments)

    def answer(self, call: Any) -> Answer:
        """Return the answer of a call, waiting for it. Its kind is "died" if the worker did not live to answer."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(call)
        except errors.RayTaskError as error:  # the worker could not import what the call needs
            return Answer("died", message=_last_line(error), details=str(error))
        except (errors.RayActorError, errors.RaySystemError, errors.RayError) as error:
            return Answer("died", message=_last_line(error), details=str(error))

    def end(self) -> None:
        """End the worker at once."""
        with contextlib.suppress(Exception):  # it may have died already, or Ray may be shutting down
            self._ray.kill(self._actor)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line]
    return (named or lines or [type(error).__name__])[-1 if named else 0][:300]


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
