"""With what a store was made."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import fluxlab


def versions() -> dict[str, str]:
    """Versions of everything that pixels or numbers may depend on, and the commit where this is a checkout."""
    import torch

    packages = ("torch", "transformers", "numpy", "pillow", "scikit-image")
    return {
        "fluxlab": fluxlab.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def commit() -> str:
    """The checkout's commit, with `+` where files differ from it; "none" outside a checkout."""
    root = Path(fluxlab.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "none"
    try:
        head, status = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return "none"
    return head.strip() + ("+" if status.strip() else "")
