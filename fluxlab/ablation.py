"""`python -m fluxlab.ablation FOLDER [FOLDER …]`: write an experiment without what attributions found.

Each FOLDER is that of a finished `python -m fluxlab.attribution`, with another objective. The experiment has variants
without the first k (block, head, frequency) of each, and without k at random, on the held-out prompts of the first and
on other seeds. It is written into the first folder, as `exp/<name>_ablation.yaml` for `python -m fluxlab.run`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fluxlab.compose import guarded
from fluxlab.errors import UserError
from fluxlab.settings import Sampling

if TYPE_CHECKING:
    from fluxlab.learning import Attribution

FIRST, RANDOM = (2, 4, 8, 16, 32), 4


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for an error that the user can fix; 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: run(_parser().parse_args(arguments)), "interrupted")


def run(options: argparse.Namespace) -> None:
    """Write the experiment and print the command that runs it."""
    import yaml

    from fluxlab.experiment.costs import number
    from fluxlab.files import write_atomic
    from fluxlab.learning import read_attribution

    found = [read_attribution(folder) for folder in options.folders]
    counts = _counts(options.first)
    if options.random < 0:
        raise UserError(f"--random {options.random}: expected at least 0")
    check(found, counts)
    content, record = experiment(found, counts, options.random), found[0].record
    folder = options.folders[0]
    file = folder / "exp" / f"{content['name']}.yaml"
    words = ["--config-dir", str(folder), f"+exp={content['name']}", f"model={record['request']['model']['name']}"]
    command = f"python -m fluxlab.run {shlex.join(words)}"
    lines = ["# @package _global_", f"# {command}", "# Other keys of the model, such as model.path, are those of:"]
    lines += [f"#   {one.record['command']}" for one in found]
    file.parent.mkdir(exist_ok=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    write_atomic(file, "\n".join(lines) + "\n" + text)
    counts_of = {"variant": content["variants"], "prompt": content["prompts"], "seed": content["seeds"]}
    print(f"{file}: {' × '.join(number(len(values), word) for word, values in counts_of.items())}")
    print(command)


def check(found: "Sequence[Attribution]", counts: Sequence[int]) -> None:
    """Raise UserError for attributions that do not go together, and for more sites than there are."""
    from fluxlab.learning.ranking import program_of

    first = found[0]
    if len({one.objective for one in found}) < len(found):
        raise UserError(f"{first.path} and others: of the same objective, {first.objective}; variants are named by it")
    for one in found:
        gains = one.array("gains").values[0]
        if program_of(one) != program_of(first):
            raise UserError(f"{one.path}: its variant has another program than that of {first.path}; name equal ones")
        for key in ("model_digest", "steps", "height", "width"):
            if one.record["settings"][key] != first.record["settings"][key]:
                raise UserError(f"{one.path}: not the {key} of {first.path}; name two of equal models and sizes")
        if counts[-1] > gains.size:
            raise UserError(f"--first {counts[-1]}: the model has {gains.size} (block, head, frequency)")


def experiment(found: "Sequence[Attribution]", counts: Sequence[int], random: int) -> dict[str, Any]:
    """Return the keys of the experiment: held-out prompts, and as many seeds, from the next one."""
    from fluxlab.learning.ranking import variants

    record = found[0].record
    request, seeds = record["request"], record["request"]["seeds"]
    unset = {f.name: f.default for f in fields(Sampling)}
    given = {key: request[key] for key, value in unset.items() if request.get(key, value) != value}
    names = ", ".join(one.objective for one in found)
    return {
        "name": f"{request['name']}_ablation",
        "caption": f"without the first k (block, head, frequency) for {names}, and without k at random",
        "prompts": record["held_out"] or request["prompts"],
        "seeds": [max(seeds) + 1 + n for n in range(len(seeds))],
        **given,
        **({"lora": request["model"]["lora"]} if request["model"].get("lora") else {}),
        "variants": dict(variants(found, counts, random)),
    }


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise UserError(f"--first {text}: expected whole numbers from 1, such as 2,4,8")
    return counts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fluxlab.ablation", description=__doc__, allow_abbrev=False)
    parser.error = _refuse
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of python -m fluxlab.attribution")
    first = ",".join(map(str, FIRST))
    parser.add_argument("--first", default=first, metavar="K,K", help=f"numbers k; default: {first}")
    text = f"choices of k at random; default: {RANDOM}"
    parser.add_argument("--random", type=int, default=RANDOM, metavar="N", help=text)
    return parser


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}\npython -m fluxlab.ablation --help lists the arguments")


if __name__ == "__main__":
    sys.exit(main())
