"""`python -m fluxlab.play`: a page in the browser with a prompt, edits as controls, and the image before and after."""

import socket
import sys
from dataclasses import dataclass, field
from typing import Any

from fluxlab.compose import command_line, compose, flags
from fluxlab.config import model_names, model_row
from fluxlab.errors import UserError

HOST = "127.0.0.1"


@dataclass
class PlayConfig:
    """The schema of the command line."""

    defaults: list[Any] = field(default_factory=lambda: [{"model": "tiny"}, "_self_"])
    model: dict[str, Any] = field(default_factory=dict)
    port: int = 8080
    device: str | None = None
    dtype: str | None = None
    plugins: list[Any] = field(default_factory=list)


_USAGE = """python -m fluxlab.play [model=tiny] [port=8080] [device=cuda] [dtype=bfloat16]

Shows a page at http://127.0.0.1:8080, which only this computer can open: a prompt, edits as controls, the image before
and after, positions, word maps, and the experiment as YAML. Needs pip install 'fluxlab[play]'. Ctrl-C ends it.

  model    {names}; or model=local model.path=<folder, file or hub id>
  port     0 takes a free one
  device   null: a GPU if there is one
  dtype    float32, bfloat16, float16; null: that of the model's row, else as stored
  plugins  modules with ops of your own: plugins=[my_ops]"""


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when the page is ended, 2 for an error that the user can fix, 130 when interrupted."""
    return command_line(arguments, _main, "stopped")


def _main(arguments: list[str]) -> None:
    options = flags(arguments)
    if options.multirun or options.shell_completion:
        raise UserError("-m, -sc: the playground shows one model, see --help")
    if options.help:
        print(_USAGE.format(names=", ".join(model_names())))
    elif options.cfg:
        print(compose("play", PlayConfig, "play", options.overrides, options.config_dir, show=True), end="")
    else:
        run(compose("play", PlayConfig, "play", options.overrides, options.config_dir), options.overrides)


def run(config: PlayConfig, words: list[str]) -> None:
    """Load the model and serve the page until interrupted. words: of the command line."""
    from fluxlab.positions import load_plugins
    from fluxlab.settings import DTYPES

    if config.dtype not in (None, *DTYPES):
        raise UserError(f"dtype={config.dtype}: expected {', '.join(DTYPES)} or null (the model's own)")
    port = free_port(config.port)
    try:
        import nicegui  # noqa: F401
    except ImportError:
        raise UserError("the playground needs NiceGUI: pip install 'fluxlab[play]'") from None
    load_plugins(config.plugins)
    row = model_row(config.model, f"model {config.model.get('name', '')}".strip())

    from fluxlab.checkpoints import dtype_of
    from fluxlab.loading import load_row
    from fluxlab.play.page import serve

    pipe = load_row(row, dtype_of(config.dtype, row), config.device)
    kept = [word for word in words if word.partition("=")[0].partition(".")[0] in ("model", "plugins")]
    print(f"{row.name} on {pipe.device}: open http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    serve(pipe, HOST, port, " ".join(kept) or f"model={row.name}")


def free_port(port: int) -> int:
    """Return the port, or for 0 one that is free. Raises `UserError` if it is in use or none."""
    if not 0 <= port < 2**16:
        raise UserError(f"port={port}: expected a number from 0 to 65535")
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port={port}: cannot be used ({error.strerror}); pass another one, or port=0") from None
        return tried.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
