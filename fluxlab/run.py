"""`python -m fluxlab.run +exp=<name> [overrides]`: compose the configs, check them, run."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxlab.compose import compose, guarded
from fluxlab.config import ModelRow, config_folder, model_row


@dataclass
class RunConfig:
    """The schema: a key that is not here, or a value of another type, is an error."""

    model: dict[str, Any] = field(default_factory=dict)
    name: str = "???"
    caption: str = ""
    prompts: list[str] = field(default_factory=list)
    seeds: Any = 1
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    device: str | None = None
    dtype: str | None = None
    out: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """0 when done, 2 for what the user can mend, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not any(argument.startswith("+exp=") for argument in arguments):
        if set(arguments) - {"-h", "--help"}:  # a forgotten + must not look like a run that is done
            print(f"{' '.join(arguments)}: no experiment named; add +exp=<name>", file=sys.stderr)
            return 2
        print(_usage())
        return 0

    def work() -> None:
        config = compose("config", RunConfig, "schema", arguments)
        row = model_row(config.model, f"model {config.model.get('name', '')}".strip())
        run(config, row, seed_list(config.seeds))

    return guarded(work, "interrupted; finished images are kept")


def seed_list(seeds: Any) -> list[int]:
    """`4` means seeds 0 … 3, `[3, 5]` those two. Raises `ValueError` for anything else."""
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return list(range(seeds))
    if isinstance(seeds, list) and seeds and all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        return seeds
    raise ValueError(f"seeds={seeds}: expected a count such as 4, or a list such as [3,5]")


def run(config: RunConfig, row: ModelRow, seeds: list[int]) -> None:
    """Generate every prompt × seed and write PNG files, each as soon as it is there."""
    import torch

    from fluxlab.loading import load_row

    if not config.prompts:
        raise ValueError("prompts=[]: at least one prompt is needed")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_row(row, dtype=_dtype(config.dtype), device=device)
    out = Path(config.out or f"runs/{config.name}")
    out.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(config.prompts):
        for seed in seeds:
            (image,) = pipe.generate(
                prompt, seed, height=config.height, width=config.width, steps=config.steps, guidance=config.guidance
            )
            file = out / f"{i}-{seed}.png"
            partial = file.with_suffix(".part")
            image.save(partial, format="png")
            os.replace(partial, file)
            print(f"{file}  seed {seed}  {prompt}", flush=True)


def _dtype(name: str | None):
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise ValueError(f"dtype={name}: expected {', '.join(known)} or null (as stored)")
    return known[name] if name else None


def _usage() -> str:
    from omegaconf import OmegaConf

    files = sorted((config_folder() / "exp").glob("*.yaml"))
    lines = [f"  {file.stem:<16}{OmegaConf.load(file).get('caption', '')}" for file in files]
    return "\n".join(
        [
            "python -m fluxlab.run +exp=<name> [key=value …]",
            "",
            "Experiments:",
            *lines,
            "",
            "Keys: see configs/config.yaml",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
