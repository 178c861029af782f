"""The versions that a store was made with."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import fluxlab


def versions() -> dict[str, str]:
    """Return the versions of everything that pixels or metrics may depend on, and the git commit of a checkout."""
    import torch

    packages = ("torch", "transformers", "numpy", "scipy", "pillow", "scikit-image")
    return {
        "fluxlab": fluxlab.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def commit() -> str:
    """Return the commit of the checkout, "<40 digits>-dirty" if tracked files are modified, or "none" without git.

    Print it whole: a shortened commit loses the mark.
    """
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
    return head.strip() + ("-dirty" if status.strip() else "")
