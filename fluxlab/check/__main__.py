"""`python -m fluxlab.check model=<name>`: whether a model's files are whole, and it computes what FLUX should."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fluxlab.compose import compose, flags, guarded
from fluxlab.config import model_names, model_row
from fluxlab.errors import UserError

T = TypeVar("T")


@dataclass
class CheckConfig:
    """The schema of the command line."""

    defaults: list[Any] = field(default_factory=lambda: [{"model": "local"}, "_self_"])
    model: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """0 when every check is ok, 2 for the first that fails, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: _main(arguments), "interrupted")


def _main(arguments: list[str]) -> None:
    asked = flags(arguments)
    if asked.multirun or asked.shell_completion:
        raise UserError("-m, -sc: one model at a time is checked, see --help")
    if asked.help or not asked.overrides:
        print(_USAGE.format(names=", ".join(model_names())))
    elif asked.cfg:
        print(compose("check", CheckConfig, "check", asked.overrides, asked.config_dir, show=True), end="")
    else:
        run(compose("check", CheckConfig, "check", asked.overrides, asked.config_dir))


_USAGE = """python -m fluxlab.check model=<name> [device=cuda] [dtype=bfloat16]

Checks a model on this machine, a line a check: files, sizes, loading, text encoders, one step, that position ids act
and that only their differences do, the autoencoder; and says how long a picture takes. Nothing is written, but for a
hub id that is fetched. Exits 0 when all is ok, 2 with what failed and what to do.

  model    {names}; or model=local model.path=<folder, file or hub id>
           (a single file: also model.autoencoder=<ae.safetensors> model.text=<Diffusers folder or hub id>)
  device   null: a GPU where there is one
  dtype    float32, bfloat16, float16; null: as stored"""


def run(config: CheckConfig) -> None:
    """Check after check; raises `UserError` with the name of the first that fails, and what to do."""
    import torch

    from fluxlab.check import computed, held
    from fluxlab.checkpoints import check_device
    from fluxlab.experiment.spec import DTYPES

    if config.dtype not in (None, *DTYPES):
        raise UserError(f"dtype={config.dtype}: expected {', '.join(DTYPES)} or null (as stored)")
    dtype = getattr(torch, config.dtype) if config.dtype else None
    device = check_device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    row = model_row(config.model, f"model {config.model.get('name', '')}".strip())
    found, parts = _checked("files", lambda: held.files(row))
    _checked("sha256", lambda: held.hashes(found.path, [file for part in parts.values() for file in part.files]))
    pipe = _checked("loading", lambda: held.loading(row, dtype, device))
    for name in ("transformer", "autoencoder"):
        _checked(name, lambda name=name: held.counts(getattr(pipe, name), parts[name]))
    _checked("text", lambda: computed.text_encoders(pipe, parts))
    start, velocity = computed.probe(pipe)
    untouched, seconds = _checked("step", lambda: computed.one_step(start, velocity))
    floor = _checked("shift", lambda: computed.shifting(start, velocity, untouched, pipe.dtype))
    _checked("ids", lambda: computed.zeroing(velocity, untouched, floor))
    _checked("pictures", lambda: computed.pictures(pipe, start.shape[1]))
    _checked("speed", lambda: computed.speed(pipe, start.shape[1], seconds))


def _checked(name: str, check: Callable[[], tuple[str, T]]) -> T:
    """Run a check and print its line: what it says. Returns what else it gives."""
    import torch

    try:
        said, value = check()
    except (MemoryError, RuntimeError) as error:
        lack = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not lack:
            raise
        raise UserError(
            f"failed  {name}: out of memory ({str(error)[:120].splitlines()[0]})\n"
            "Close what else runs there, or try dtype=bfloat16, or device=cpu."
        ) from error
    except (UserError, OSError) as error:
        raise UserError(f"failed  {name}: {error}") from error
    print(f"ok  {name:<12}{said}", flush=True)
    return value


if __name__ == "__main__":
    sys.exit(main())
