"""Draw the packages of fluxlab and their imports: `python docs/architecture.py`.

Reads the source with grimp, and writes `architecture.json` (every import between packages) and `architecture.png`. The
picture leaves out an arrow that other arrows imply: where a imports b and b imports c, the arrow from a to c is not
drawn. `tests/unit/test_docs.py` fails while the committed files differ from the code.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "architecture.json"
PICTURE = ROOT / "docs" / "architecture.png"
ENTRY_POINTS = ("fluxlab.positions.__main__", "fluxlab.attribution.__main__")
"""Commands inside a package. They may import anything, because no module imports them."""

BOX_GAP, ARROW_GAP, HALF_BOX = 1.3, 0.75, 0.19
"""Distances in the picture, where levels are 1 apart."""

Imports = dict[str, list[str]]


def imports() -> Imports:
    """Return what each package or module directly under fluxlab imports from the others, by name."""
    import grimp

    graph = grimp.build_graph("fluxlab", exclude_type_checking_imports=True, cache_dir=None)
    for module in ENTRY_POINTS:
        graph.remove_module(module)
    names = sorted(graph.find_children("fluxlab"))

    def direct(importer: str, imported: str) -> bool:
        return importer != imported and graph.direct_import_exists(
            importer=importer, imported=imported, as_packages=True
        )

    return {short(a): [short(b) for b in names if direct(a, b)] for a in names}


def short(name: str) -> str:
    return name.removeprefix("fluxlab.")


def levels(imported: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the length of the longest chain of imports that starts at each package. Raises ValueError on a cycle."""
    found: dict[str, int] = {}

    def level(name: str, path: tuple[str, ...]) -> int:
        if name in path:
            raise ValueError("import cycle: " + " -> ".join((*path, name)))
        if name not in found:
            found[name] = max((level(other, (*path, name)) + 1 for other in imported[name]), default=0)
        return found[name]

    for name in imported:
        level(name, ())
    return found


def arrows(imported: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Return the imports that no chain of other imports implies."""
    below: dict[str, set[str]] = {}
    for name in sorted(imported, key=levels(imported).get):
        below[name] = {far for other in imported[name] for far in (other, *below[other])}
    return [(a, b) for a in imported for b in imported[a] if not any(b in below[c] for c in imported[a])]


def digest(imported: Mapping[str, Sequence[str]]) -> str:
    return hashlib.sha256(json.dumps(imported, sort_keys=True).encode()).hexdigest()


Node = str | tuple[str, str, int]
"""A package, or where the arrow between two packages crosses a level."""


def routes(imported: Mapping[str, Sequence[str]]) -> list[list[Node]]:
    """Return each drawn arrow as the nodes that it passes, one per level, from the importer down."""
    level = levels(imported)
    return [[a, *((a, b, row) for row in range(level[a] - 1, level[b], -1)), b] for a, b in arrows(imported)]


def columns(imported: Mapping[str, Sequence[str]]) -> dict[Node, float]:
    """Return the column of every node: near the nodes to which it is connected, at least one apart on a level."""
    level, lines = levels(imported), routes(imported)
    rows: dict[int, list[Node]] = {row: [] for row in range(max(level.values()) + 1)}
    near: dict[Node, list[Node]] = {name: [] for name in imported}
    for line in lines:
        for upper, lower in itertools.pairwise(line):
            near.setdefault(upper, []).append(lower)
            near.setdefault(lower, []).append(upper)
    for node in near:
        rows[level[node] if isinstance(node, str) else node[2]].append(node)
    column: dict[Node, float] = {node: float(i) for row in rows.values() for i, node in enumerate(row)}
    for _ in range(60):
        for row in rows.values():
            wanted = {node: _mean([column[other] for other in near[node]] or [column[node]]) for node in row}
            row.sort(key=lambda node: (wanted[node], str(node)))
            column |= _apart(row, wanted)
    return column


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)


def _apart(row: Sequence[Node], wanted: Mapping[Node, float]) -> dict[Node, float]:
    """Return columns in the order of the row, as close as possible to those wanted, with room between neighbours."""
    from scipy.optimize import isotonic_regression

    gaps = [BOX_GAP if isinstance(a, str) and isinstance(b, str) else ARROW_GAP for a, b in itertools.pairwise(row)]
    room = list(itertools.accumulate(gaps, initial=0.0))
    free = isotonic_regression([wanted[node] - start for node, start in zip(row, room, strict=True)]).x
    return {node: float(x) + start for node, x, start in zip(row, free, room, strict=True)}


def draw(imported: Mapping[str, Sequence[str]], file: Path) -> None:
    """Write the picture. Its metadata holds the digest of the imports that it shows."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    level, column = levels(imported), columns(imported)
    height = max(level.values()) + 1
    width = max(column.values()) - min(column.values()) + 1.4
    figure = Figure(figsize=(max(8, 0.65 * width), 0.62 * height))  # the longest name needs 0.9 inches
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(min(column.values()) - 0.7, max(column.values()) + 0.7), ylim=(-0.5, height - 0.5))
    box = {"boxstyle": "round,pad=0.35", "fc": "#eef4fb", "ec": "#0072B2", "lw": 0.8}
    for name in imported:
        axes.text(column[name], level[name], name, ha="center", va="center", fontsize=9, bbox=box, zorder=2)
    arrow = {"arrowstyle": "-|>", "mutation_scale": 7, "color": "0.45", "lw": 0.8, "zorder": 1}
    for line in routes(imported):
        points = [(column[node], level[node] if isinstance(node, str) else node[2]) for node in line]
        points[-1] = (points[-1][0], points[-1][1] + HALF_BOX)
        corners, codes = [points[0]], [Curve.MOVETO]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            corners += [(x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), (x1, y1)]
            codes += [Curve.CURVE4] * 3
        axes.add_patch(FancyArrowPatch(path=Curve(corners, codes), **arrow))
    figure.savefig(file, dpi=150, metadata={"Software": None, "Description": digest(imported)})


def main() -> int:
    imported = imports()
    DATA.write_text(json.dumps(imported, indent=1) + "\n")
    draw(imported, PICTURE)
    print(
        f"{len(imported)} packages, {sum(map(len, imported.values()))} imports, no cycle: {PICTURE.relative_to(ROOT)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
