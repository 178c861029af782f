"""`python -m fluxlab.attribution +exp=<name> objective=<name>`: attribution over the cells of one variant.

One backward for each cell. Arrays of finished cells are kept, so that the same command continues.
"""

import csv
import hashlib
import io
import json
import re
import shlex
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.compose import command_line, compose, flags
from fluxlab.config import model_row, with_loras
from fluxlab.errors import NonFiniteError, UserError, nearest
from fluxlab.settings import Sampling

if TYPE_CHECKING:
    from fluxlab.experiment.spec import Experiment
    from fluxlab.learning.objectives import Place
    from fluxlab.probes import Captured

_SamplingConfig = make_dataclass(
    "_SamplingConfig", [(f.name, f.type, field(default=f.default)) for f in fields(Sampling)]
)
TABLE, FIGURE = "attribution.csv", "attribution.png"


@dataclass
class AttributionConfig(_SamplingConfig):
    """The schema of `configs/attribution.yaml`. The settings of `Sampling` are keys too."""

    model: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    name: str = "???"
    caption: str = ""
    variants: dict[str, Any] = field(default_factory=dict)
    baseline: str = "baseline"
    variant: str | None = None
    source: str | None = None
    patches: list[str] = field(default_factory=list)
    ablate: int = 0
    prompts: list[str] = field(default_factory=list)
    prompts_file: str | None = None
    held_out: list[str] = field(default_factory=list)
    seeds: Any = 1
    plugins: list[str] = field(default_factory=list)
    lora: Any = None
    threads: int | None = None
    out: str | None = None
    cache: str | None = None
    plan: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code, as `fluxlab.run.main` does."""
    return command_line(arguments, _main, "interrupted; the same command continues with the next cell")


def _main(arguments: list[str]) -> None:
    asked = flags(arguments)
    if asked.help or not asked.overrides:
        print(_USAGE)
        return
    if not any(re.match(r"\+{1,2}exp=", word) for word in asked.overrides):
        raise UserError(f"{' '.join(asked.overrides)}: no experiment named; add +exp=<name>")
    config = ("attribution", AttributionConfig, "attribution_schema", asked.overrides, asked.config_dir)
    if asked.cfg:
        print(compose(*config, show=True), end="")
        return
    attribute(compose(*config), f"python -m fluxlab.attribution {shlex.join(arguments)}")


def read(config: AttributionConfig) -> tuple["Experiment", dict[str, Any], str]:
    """Return the experiment, the objective and a digest. Raises UserError naming the key and what is expected."""
    from fluxlab.api import make_experiment
    from fluxlab.checkpoints.stored import is_local
    from fluxlab.experiment.prompts import read_prompts
    from fluxlab.learning.objectives import check_prompts, read_objective
    from fluxlab.model.sites import SITES
    from fluxlab.positions import load_plugins

    load_plugins(config.plugins)
    objective = read_objective(config.objective)
    for key in ("variant", "source"):
        name = getattr(config, key)
        if name is not None and name not in config.variants:
            names = ", ".join(config.variants)
            raise UserError(f"{key}={name}: no such variant, there are {names}{nearest(name, config.variants)}")
    for site in config.patches:
        if site not in SITES:
            raise UserError(f"patches: {site!r}, expected some of {', '.join(SITES)}{nearest(site, SITES)}")
    if bool(config.patches) != bool(config.source):
        given, lacks = ("patches", "source=<variant>") if config.patches else ("source", "patches=[keys, values]")
        raise UserError(f"{given}: add {lacks}; a patch takes the activations of a site from another variant")
    if config.ablate < 0 or (config.ablate and config.patches):
        wanted = "leave out patches, which are no bands" if config.patches else "expected at least 0"
        raise UserError(f"ablate={config.ablate}: {wanted}")
    row = with_loras(model_row(config.model, f"model {config.model.get('name', '')}".strip()), config.lora)
    prompts = read_prompts(Path(config.prompts_file)) if config.prompts_file else config.prompts
    check_prompts(objective, prompts)
    experiment = make_experiment(
        prompts,
        config.variants,
        config.seeds,
        model=row,
        sampling=Sampling(**{f.name: getattr(config, f.name) for f in fields(Sampling)}),
        name=config.name,
        caption=config.caption,
        baseline=config.baseline,
        identify=not config.plan or is_local(row),
        cache=config.cache,
    )
    asked = [experiment.digest, objective, config.variant, config.source, list(config.patches), config.ablate]
    return experiment, objective, hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def attribute(config: AttributionConfig, command: str) -> None:
    """Compute what is missing of an attribution and write its table and figure, or print the plan."""
    from fluxlab.checkpoints import check_device, default_device, dtype_of
    from fluxlab.conditioning import Texts
    from fluxlab.engines.inline import threads
    from fluxlab.experiment.settings import resolve, threads_of
    from fluxlab.learning.attributed import draw, table
    from fluxlab.learning.folder import begin, cell_file
    from fluxlab.learning.objectives import Place, make_objective
    from fluxlab.loading import load_row
    from fluxlab.probes import is_complete, load, write
    from fluxlab.progress import Progress
    from fluxlab.training.state import locked

    e, asked, digest = read(config)
    variant = config.variant or e.baseline
    out = Path(config.out).expanduser() if config.out else Path("runs", e.name, f"attribution-{digest}")
    places = [Place(prompt, seed) for prompt in e.prompts for seed in e.seeds]
    device, dtype = check_device(e.device or default_device()), dtype_of(e.dtype, e.model)
    if config.plan:
        return print(_plan(config, e, asked, device, dtype, len(places), out))
    with locked(out), threads(threads_of(str(device), None, config.threads)):
        texts = Texts(e.prompts, e.max_sequence_length, e.truncate, e.unknown_words)
        pipe = load_row(e.model, dtype, device, texts, cache=config.cache)
        used = resolve(e, pipe, None, None, config.threads)
        begin(out, _record(config, e, asked, digest, command, used.record()))
        settings = used.sampling
        objective = make_objective(asked, pipe, e.prompts, places, settings, e.variants[variant])
        print(f"{e.name}: {objective.title} of {variant}, {len(places)} cells → {out}", flush=True)
        found = []
        with Progress("attribution", len(places), every=5, unit="cell") as progress:
            for n, place in enumerate(places):
                file = cell_file(out, n)
                if not is_complete(file):
                    write(file, one(config, e, pipe, variant, objective, place, settings))
                found.append(load(file))
                progress(n + 1)
    rows = table(found, places)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    from fluxlab.drawing.style import write_figure
    from fluxlab.files import write_atomic

    write_atomic(out / TABLE, text.getvalue())
    write_figure(draw(found, objective.title), out / FIGURE)
    for row in sorted(rows, key=lambda row: -abs(row["effect"]))[:5]:
        where = "  ".join(f"{key} {row[key]}" for key in ("array", "block", "head", "axis") if row[key] != "")
        print(f"{where}  {row['effect']:.4g} [{row['low']:.4g}, {row['high']:.4g}]")
    print(f"{out / TABLE}  {out / FIGURE}")


def _record(
    config: AttributionConfig, e: "Experiment", objective: dict[str, Any], digest: str, command: str, used: Any
) -> dict[str, Any]:
    """Return what `attribution.yaml` says. used: the settings as plain values."""
    from fluxlab.experiment.versions import versions

    return {
        "name": e.name,
        "caption": e.caption,
        "command": command,
        "digest": digest,
        "objective": objective,
        "variant": config.variant or e.baseline,
        "source": config.source,
        "patches": list(config.patches),
        "ablate": config.ablate,
        "held_out": list(config.held_out),
        "request": e.request(),
        "settings": used,
        "versions": versions(),
    }


def one(
    config: AttributionConfig,
    e: "Experiment",
    pipe: Any,
    variant: str,
    objective: Any,
    place: "Place",
    settings: Sampling,
) -> dict[str, "Captured"]:
    """Return the arrays of one cell: `gains`, or one for each site of `patches`; for `ablate` see `bands.ablated`."""
    import numpy as np

    from fluxlab.attribution import of_gains, of_patches
    from fluxlab.learning.bands import ablated

    program = e.variants[variant]
    if config.patches:
        given = {"what": config.patches, "programs": (e.variants[config.source], program), "settings": settings}
        pair = [place, place]
        found = of_patches(pipe, [p.prompt for p in pair], [p.seed for p in pair], objective.score(pair), **given)
    else:
        batch = pipe, [place.prompt], [place.seed], objective.score([place])
        how = {"program": program, "settings": settings}
        found = {"gains": of_gains(*batch, **how)}
        if config.ablate:
            found |= ablated(*batch, found["gains"], config.ablate, **how)
    if not all(np.isfinite(array.values).all() for array in found.values()):
        raise NonFiniteError(f"prompt {place.prompt!r}, seed {place.seed}: a derivative is not finite")
    return found


def _plan(
    config: AttributionConfig,
    e: "Experiment",
    objective: dict[str, Any],
    device: Any,
    dtype: Any,
    cells: int,
    out: Path,
) -> str:
    """Return what an attribution would do: sites, forwards and memory."""
    from fluxlab.attribution import labels_of_pairs
    from fluxlab.learning.bands import bands, chosen
    from fluxlab.learning.objectives import SAMPLED
    from fluxlab.learning.plan import forwards, memory_lines
    from fluxlab.model.sites import OF_HEADS

    batch, settings = 2 if config.patches else 1, replace(e.sampling, dtype=None, device=None)
    # 0 GB: activations are always computed again
    pipe, settings, lines = memory_lines(e.model, dtype, device, settings, batch, objective["name"], 0.0)
    p = pipe.transformer.params
    blocks = p.depth + p.depth_single_blocks
    per_block = p.num_heads * sum(p.axes_dim) // 2
    if config.patches:
        per_block = sum(p.num_heads if site in OF_HEADS else 1 for site in config.patches)
    evaluations = int(objective.get("images") == SAMPLED)
    if config.ablate:
        every = bands(*labels_of_pairs(p.axes_dim, p.theta), blocks, p.num_heads)
        evaluations += 1 + len(chosen(every, config.ablate))
    return "\n".join(
        [
            f"{e.name}: {e.caption}".removesuffix(": "),
            f"folder     {out}",
            *lines,
            f"sites      {settings.steps * blocks * per_block:,} a cell: {settings.steps} steps × {blocks} blocks × "
            f"{per_block:,}; {cells} cells",
            f"work       {forwards(cells * batch, settings.steps, evaluations, 1)}",
        ]
    )


_USAGE = """python -m fluxlab.attribution +exp=<name> objective=<name> [key=value …]

The derivative of a score by every (step, block, head, frequency) of the rotary tables, in one backward for each cell:
  python -m fluxlab.attribution +exp=hello objective=denoising steps=4 dtype=float32
With patches=[keys, values] source=<variant>: the first-order effect of taking each activation from another variant.
With ablate=200: also the measured effect of leaving out each band of one axis in one head, or 200 of them at random.
Keys: configs/attribution.yaml lists all; plan=true prints the number of sites and the memory.
The same command again continues with the next cell."""
