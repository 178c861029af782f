"""Checkpoints of a training run: one safetensors file each, with other values as JSON in its header.

Random draws are functions of (seed, step), so that tensors and the step suffice for an exact resume.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fluxlab.errors import UserError
from fluxlab.files import sync


def write_tensors(file: Path, tensors: dict[str, Tensor], notes: dict) -> None:
    """Write a file atomically: if the process or machine stops, the old file remains."""
    partial = file.with_name(f".{file.name}.part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, {"notes": json.dumps(notes)})
    with open(partial, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(partial, file)
    sync(file.parent)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors and notes that `write_tensors` wrote. Raises UserError for a file that cannot be read."""
    try:
        with safe_open(file, "pt") as handle:
            names = list(handle.keys())
            return {name: handle.get_tensor(name) for name in names}, json.loads(handle.metadata()["notes"])
    except Exception as error:  # safetensors raises its own, and a bare Exception for some files
        raise UserError(f"{file}: not a checkpoint of a training run ({error}); delete it to start over") from error


def parameter_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Return each parameter by name, once: T5 has two names for its embedding."""
    return {prefix + name: parameter for name, parameter in module.named_parameters()}


@torch.no_grad()
def load_parameters(prefix: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the result of `parameter_tensors`. Raises UserError for tensors of another recipe."""
    own = dict(module.named_parameters())
    given = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    wrong = sorted(set(own) ^ set(given)) or [name for name in own if own[name].shape != given[name].shape]
    if wrong:
        raise UserError(
            f"the checkpoint belongs to another recipe ({wrong[0]} differs): set another out= or delete its folder"
        )
    for name, parameter in own.items():
        parameter.copy_(given[name])


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the state of optimizers under flat names, `opt.<optimizer>.<parameter>.<key>`."""
    return {
        f"opt.{i}.{index}.{key}": value
        for i, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizers(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Load the result of `optimizer_tensors`. Learning rates are set at each step and are not part of it."""
    for i, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        whole["state"] = {}
        for name, value in tensors.items():
            kind, which, *rest = name.split(".")
            if kind == "opt" and int(which) == i:
                whole["state"].setdefault(int(rest[0]), {})[rest[1]] = value
        optimizer.load_state_dict(whole)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. Raises UserError if another training process holds it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"out={folder}: another process uses this folder; wait for it or set out=") from None
    try:
        yield
    finally:
        lock.release()
