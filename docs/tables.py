"""Refresh the generated tables in README.md and docs/: `python docs/tables.py`.

A generated table stands between `<!-- table: NAME -->` and `<!-- end table -->`. Its rows come from the code, the
configs, or a file of results, so that they cannot drift apart from what they describe. `tests/unit/test_docs.py` fails
while a committed table differs from what this script writes.
"""

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `docs` and `fluxlab` are those of this checkout

from docs.measured import (  # noqa: E402, F401
    EMBEDDED,
    RESULTS,
    answer,
    conventions,
    families,
    findings,
    ideas,
    markdown,
    quoted,
    text_order,
    trace,
    weights,
)

BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def scale() -> str:
    """What large stores cost: milliseconds of CPU time per cell of every stage, and its peak of memory."""
    sizes = json.loads(sorted((ROOT / "benchmarks" / "results").glob("scale-*.json"))[-1].read_text())["cells"]
    stages = [name for name, values in sizes["1000"].items() if "seconds" in values]
    rows = []
    for stage in stages:
        taken = {int(cells): values[stage] for cells, values in sizes.items()}
        times = [f"{1000 * values['cpu'] / cells:.2f} ms" for cells, values in taken.items()]
        rows.append([stage, *times, *(f"{values['mb']} MB" for values in taken.values())])
    cells = [f"{int(count):,} cells" for count in sizes]
    return markdown(["stage", *cells, *(f"peak, {count}" for count in cells)], rows)


def experiments() -> str:
    """Every experiment of `configs/exp`: its caption, the number of images and the time its header states."""
    from fluxlab.experiment.each import expanded

    rows = []
    default = yaml.safe_load((ROOT / "configs" / "config.yaml").read_text())
    for file in sorted((ROOT / "configs" / "exp").glob("*.yaml")):
        text = file.read_text()
        own = yaml.safe_load(text)
        bases = [name for name in own.get("defaults", []) if isinstance(name, str) and name != "_self_"]
        config = default
        for layer in [*(yaml.safe_load((file.parent / f"{name}.yaml").read_text()) for name in bases), own]:
            config = config | layer
        names = expanded(config["variants"], 6)  # the blocks of the embedded model
        variants = len(names) + ("baseline" not in names)
        seeds = config["seeds"] if isinstance(config["seeds"], int) else len(config["seeds"])
        if config["variants"] == default["variants"]:
            variants = 1
        time = re.search(r"\babout (\d+ (?:s|min))\b", text)
        rows.append(
            [
                f"`{file.stem}`",
                config["caption"],
                str(variants * (len(config["prompts"]) or config["scenes"]["count"]) * seeds),
                time[1] if time else "seconds",
            ]
        )
    return markdown(["`+exp=`", "what it compares", "images", "time with `tiny`, 2 CPU cores"], rows)


def models() -> str:
    """Every file of `configs/model`."""
    rows = []
    for file in sorted((ROOT / "configs" / "model").glob("*.yaml")):
        text = file.read_text()
        config = yaml.safe_load(text)
        steps, size = config.get("steps"), config.get("size")
        about = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
        rows.append([f"`{file.stem}`", about, str(steps or "–"), " × ".join(map(str, size)) if size else "–"])
    return markdown(["`model=`", "what it is", "steps", "size, px"], rows)


def words() -> str:
    """The words that the embedded model knows, by their role in a caption."""
    from fluxlab import scenes
    from fluxlab.scenes.captions import PLACE_PHRASES

    roles = {
        "colour": scenes.COLOURS,
        "thing": scenes.THINGS,
        "place": PLACE_PHRASES.values(),
        "relation": scenes.RELATIONS,
        "word on a sign": scenes.WORDS,
    }
    return markdown(["part of a prompt", "words"], [[role, ", ".join(known)] for role, known in roles.items()])


def packages() -> str:
    """Every package and module directly under fluxlab, and the first sentence of its docstring; lower layers last."""
    from docs.architecture import imports, levels

    level = levels(imports())
    rows = []
    for name in sorted(level, key=lambda name: (-level[name], name)):
        folder = ROOT / "fluxlab" / name
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        rows.append([f"`{name}`", re.split(r"(?<=\.)\s|\n\n", text)[0].replace("\n", " ")])
    return markdown(["package", "what it does"], rows)


def ops_on_ids() -> str:
    """Every op that changes ids: arguments and the first line of its docstring."""
    from fluxlab.positions import ops_table

    return ops_table(["ids"])


def ops_on_attention() -> str:
    """Every op that changes attention itself: arguments and the first line of its docstring."""
    from fluxlab.positions import ops_table

    return ops_table(["attention", "scale", "rotation", "windows", "scores", "heads", "text"])


def ops_on_frequencies() -> str:
    """Every op that changes frequencies: arguments and the first line of its docstring."""
    from fluxlab.positions import ops_table

    return ops_table(["frequencies"])


def ops_on_activations() -> str:
    """Every op that changes activations: arguments and the first line of its docstring."""
    from fluxlab.positions import ops_table

    return ops_table(["activations"])


def ops_on_size() -> str:
    """Every op on the size at which an image is computed."""
    from fluxlab.positions import ops_table

    return ops_table(["size"])


def where() -> str:
    """Every key that says where an edit acts: default and what it accepts."""
    from fluxlab.positions import where_table

    return where_table()


def probes() -> str:
    """Every registered kind of request: what it computes, its arguments, and what it can be averaged over."""
    from fluxlab.probes import PROBES

    rows = []
    for name, kind in PROBES.items():
        arguments = [
            f"`{key}`" + ("" if key in kind.required or kind.defaults[key] is None else f" = {kind.defaults[key]}")
            for key in kind.parsers
        ]
        rows.append([f"`{name}`", kind.summary, ", ".join(arguments) or "none", ", ".join(kind.averages) or "none"])
    return markdown(["`kind`", "what it computes", "arguments", "`average`"], rows)


def metrics() -> str:
    """Every metric: unit, meaning, direction, and what it needs."""
    from fluxlab.measure import METRICS

    rows = []
    for name, entry in METRICS.items():
        needs = "`scenes: true`" if entry.needs == "scenes" else f"`{entry.needs}=`" if entry.needs else ""
        compares = "" if entry.alone else "yes"
        rows.append([f"`{name}`", entry.unit, entry.meaning, entry.better, compares, needs])
    return markdown(["column", "unit", "meaning", "better", "compares with the baseline", "needs"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "answer": answer,
    "weights": weights,
    "scale": scale,
    "findings": findings,
    "ideas": ideas,
    "families": families,
    "text-order": text_order,
    "conventions": conventions,
    "trace": trace,
    "experiments": experiments,
    "models": models,
    "words": words,
    "packages": packages,
    "ops-on-ids": ops_on_ids,
    "ops-on-attention": ops_on_attention,
    "ops-on-frequencies": ops_on_frequencies,
    "ops-on-size": ops_on_size,
    "ops-on-activations": ops_on_activations,
    "where": where,
    "probes": probes,
    "metrics": metrics,
}


def rendered(text: str) -> str:
    """Return a document's text with every generated table replaced by its current rows."""

    def replace(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise KeyError(f"table {match[2]!r}, expected one of {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return BLOCK.sub(replace, text)


def documents() -> list[Path]:
    """Return the Markdown files that may hold generated tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    for file in documents():
        before = file.read_text()
        after = rendered(before)
        if after != before:
            file.write_text(after)
            print(f"{file.relative_to(ROOT)}: refreshed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
