"""`python -m fluxlab.train +train=<name> [overrides]`: train an embedded model, or resume a training run."""

import sys
from dataclasses import replace
from pathlib import Path

from fluxlab.compose import compose, guarded
from fluxlab.config import config_folder
from fluxlab.errors import UserError
from fluxlab.training.recipe import Recipe, check


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 0 if done, 2 after a user error, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not any(argument.startswith("+train=") for argument in arguments):
        print(_usage())
        return 0

    def work() -> None:
        run(_read(arguments), arguments)

    return guarded(work, "interrupted; run the same command again to resume from the last checkpoint")


def run(recipe: Recipe, arguments: list[str]) -> None:
    """Train in the folder `out` (default `runs/train-<name>`) and write a Diffusers folder to `export` (default
    `<out>/pipeline`).
    """
    import torch

    from fluxlab.training.export import export, facts
    from fluxlab.training.stages import train
    from fluxlab.training.state import locked

    device = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}: PyTorch finds no CUDA device; leave device out or set device=cpu")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    folder = Path(recipe.out or f"runs/train-{recipe.name}")
    with locked(folder):
        if recipe.start and recipe.start.startswith("+train="):
            recipe = replace(recipe, start=str(_first(recipe, folder / "start")))
        pipe = train(recipe, folder, device)
        training = facts(recipe, folder, arguments)
        made = export(pipe, Path(recipe.export) if recipe.export else folder / "pipeline", training)
    print(f"{made}: a Diffusers folder; python -m fluxlab.run +exp=hello model=local model.path={made}")


def _read(arguments: list[str]) -> Recipe:
    from fluxlab.training.program import read_program

    recipe = compose("train_schema", Recipe, "train_schema", arguments)
    check(recipe)
    try:
        read_program(recipe.program)
    except UserError as error:
        name = next(word.partition("=")[2] for word in arguments if word.startswith("+train="))
        typed = any(word.lstrip("+").startswith("program") for word in arguments)
        raise UserError(str(error) if typed else f"configs/train/{name}.yaml: {error}") from None
    return recipe


def _first(recipe: Recipe, folder: Path) -> Path:
    """Run the recipe from which `recipe` starts, unless `folder` has its model already. Return the model's folder."""
    made = folder / "pipeline"
    if not (made / "manifest.json").is_file():  # written last
        same = {key: getattr(recipe, key) for key in ("device", "tracker", "threads", "workers")}
        words = [recipe.start, *(f"{key}={value}" for key, value in same.items() if value is not None)]
        run(replace(_read(words), out=str(folder)), words)
    return made


def _usage() -> str:
    lines, files = [], sorted((config_folder() / "train").glob("*.yaml"))
    width = max(len(file.stem) for file in files) + 2
    for file in files:
        said = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ") and "@package" not in line]
        lines.append(f"  {file.stem:<{width}}{said[0] if said else ''}")
    return "\n".join(["python -m fluxlab.train +train=<name> [key=value …]", "", "Recipes:", *lines])


if __name__ == "__main__":
    sys.exit(main())
