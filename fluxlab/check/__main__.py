"""`python -m fluxlab.check model=<name>`: check a model's files, and that it computes what FLUX should."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fluxlab.check.results import Result
from fluxlab.compose import compose, flags, guarded
from fluxlab.config import model_names, model_row
from fluxlab.errors import UserError


@dataclass
class CheckConfig:
    """The schema of the command line."""

    defaults: list[Any] = field(default_factory=lambda: [{"model": "local"}, "_self_"])
    model: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if no check fails (warnings included), 2 after the first that fails, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: _main(arguments), "interrupted")


def _main(arguments: list[str]) -> None:
    options = flags(arguments)
    if options.multirun or options.shell_completion:
        raise UserError("-m, -sc: one model at a time is checked, see --help")
    if options.help or not options.overrides:
        print(_USAGE.format(names=", ".join(model_names())))
    elif options.cfg:
        print(compose("check", CheckConfig, "check", options.overrides, options.config_dir, show=True), end="")
    else:
        run(compose("check", CheckConfig, "check", options.overrides, options.config_dir))


_USAGE = """python -m fluxlab.check model=<name> [device=cuda] [dtype=bfloat16]

Checks a model on this machine and prints one line per check: files, sizes, loading (weights must be finite), text
encoders, one step, that position ids act and that only their differences do, the autoencoder, and how long an image
takes. Nothing is written, except that a hub id is fetched. Exits with 0 if nothing fails, warnings included, and with
2 for what failed, with what to do.

  model    {names}; or model=local model.path=<folder, file or hub id>
           (a single file: also model.autoencoder=<ae.safetensors> model.text=<Diffusers folder or hub id>)
  device   null: a GPU if there is one
  dtype    float32, bfloat16, float16; null: that of the model's row, else as stored"""


def run(config: CheckConfig) -> None:
    """Run check after check. Raises `UserError` with the name of the first that fails, and what to do."""
    from fluxlab.check import computed, weights
    from fluxlab.checkpoints import check_device, default_device, dtype_of
    from fluxlab.settings import DTYPES

    if config.dtype not in (None, *DTYPES):
        raise UserError(f"dtype={config.dtype}: expected {', '.join(DTYPES)} or null (the model's own)")
    row = model_row(config.model, f"model {config.model.get('name', '')}".strip())
    dtype, device = dtype_of(config.dtype, row), check_device(config.device or default_device())
    warnings: list[str] = []

    def checked(name: str, check: Callable[[], Result]) -> Any:
        return _checked(name, check, warnings)

    found, parts = checked("files", lambda: weights.files(row))
    checked("sha256", lambda: weights.hashes(found.path, [file for part in parts.values() for file in part.files]))
    pipe = checked("loading", lambda: weights.loading(row, dtype, device))
    for name in ("transformer", "autoencoder"):
        checked(name, lambda name=name: weights.counts(getattr(pipe, name), parts[name]))
    checked("text", lambda: computed.text_encoders(pipe, parts))
    noise, velocity = computed.start(pipe)
    baseline, seconds = checked("step", lambda: computed.one_step(noise, velocity))
    floor = checked("shift", lambda: computed.shifting(noise, velocity, baseline, pipe.dtype))
    checked("ids", lambda: computed.zeroing(velocity, baseline, floor))
    checked("images", lambda: computed.images(pipe, noise.shape[1]))
    checked("speed", lambda: computed.speed(pipe, noise.shape[1], seconds))
    if warnings:
        print(
            f"{len(warnings)} warning{'s' * (len(warnings) != 1)} ({', '.join(warnings)}): everything runs, "
            "but the weights do not look trained, so images will show nothing recognisable"
        )


def _checked(name: str, check: Callable[[], Result], warnings: list[str]) -> Any:
    """Run a check and print its line. Returns its value, and adds its name to `warnings` if it warns."""
    import torch

    try:
        result = check()
    except (MemoryError, RuntimeError) as error:
        lack = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not lack:
            raise
        raise UserError(
            f"failed  {name}: out of memory ({str(error)[:120].splitlines()[0]})\n"
            "Close other programs that use it, or try dtype=bfloat16, or device=cpu."
        ) from error
    except (UserError, OSError) as error:
        raise UserError(f"failed  {name}: {error}") from error
    print(f"{'warning' if result.warning else 'ok'}  {name:<12}{result.text}", flush=True)
    if result.warning:
        warnings.append(name)
    return result.value


if __name__ == "__main__":
    sys.exit(main())
