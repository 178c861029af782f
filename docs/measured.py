"""The generated tables whose numbers are results: of the embedded model's card, and of `docs/results.py`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "fluxlab" / "assets" / "tiny" / "embedded.json"
EMBEDDED2 = ROOT / "fluxlab" / "assets" / "tiny2" / "embedded.json"
EARLIER = ROOT / "docs" / "earlier_weights.json"
RESULTS = ROOT / "docs" / "results.json"

ANSWER_COLUMNS = {
    "object": "object found",
    "shape": "right shape",
    "word": "word right",
    "size": "object's size, px",
    "ssim": "SSIM to baseline",
}
ROW_TITLES = {
    "as trained": "unchanged (baseline)",
    "all zero": "all ids 0",
    "× 0.5": "ids × 0.5",
    "× 2": "ids × 2",
    "× 1.2": "ids × 1.2",
    "axis 0 = 1": "axis 0 set to 1",
    "noise floor": "*control: noise floor*",
    "another seed": "*control: another seed*",
}
ENTERED = {"place": 0, "letters": 2, "colour": 4}
"""The block of the embedded model through whose text → image attention an attribute enters the image."""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, one line per row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def answer() -> str:
    """The article's edits of img_ids on the embedded model, with the two controls, from `embedded.json`."""
    from fluxlab.training.card import shown

    results = json.loads(EMBEDDED.read_text())
    rows = [
        [ROW_TITLES[name], *(shown(scores[column], column) for column in ANSWER_COLUMNS), article(results, name)]
        for name, scores in {**results["edits"], **results["controls"]}.items()
    ]
    return markdown(["edit of `img_ids`", *ANSWER_COLUMNS.values(), "the article, FLUX.1 schnell"], rows)


def weights() -> str:
    """The embedded model's earlier and present weights: signs, and what the article's edits do."""
    from fluxlab.training.card import shown

    earlier, present = json.loads(EARLIER.read_text()), json.loads(EMBEDDED.read_text())
    now = {**present["edits"], **present["controls"]}
    columns = {"shape": "right shape", "word": "word right", "ssim": "SSIM to baseline"}
    heads = [f"{title}, {when}" for title in columns.values() for when in (earlier["weights"], present["weights"])]
    rows = [
        [ROW_TITLES[name], *(shown(scores[column], column) for column in columns for scores in (before, now[name]))]
        for name, before in earlier["edits"].items()
    ]
    return markdown(["edit of `img_ids`", *heads], rows)


def families() -> str:
    """The article's edits on the embedded FLUX.1 and the embedded FLUX.2, from the cards of both."""
    from fluxlab.training.card import shown

    cards = {name: json.loads(file.read_text()) for name, file in (("tiny", EMBEDDED), ("tiny2", EMBEDDED2))}
    scores = {name: {**card["edits"], **card["controls"]} for name, card in cards.items()}
    columns = {name: ANSWER_COLUMNS[name] for name in ("object", "shape", "ssim")}
    rows = [
        [ROW_TITLES[edit], *(shown(scores[name][edit][column], column) for column in columns for name in cards)]
        for edit in ROW_TITLES
    ]
    return markdown(["edit of `img_ids`", *(f"{title}, {name}" for title in columns.values() for name in cards)], rows)


def text_order() -> str:
    """What `+exp=text_order` shows on the embedded FLUX.2."""
    runs = json.loads(RESULTS.read_text())["text_order"]
    rows = [
        [ROW_TITLES.get(name, f"`{name}`"), *(_interval(row.get(m)) for m in TEXT_ORDER)] for name, row in runs.items()
    ]
    return markdown(["text ids", "SSIM to baseline", "place", "colour", "shape", "letters"], rows)


def conventions() -> str:
    """The small models of `+train=convention*`: the share of images that are right under each edit, and the SSIM."""
    from experiments.conventions import NAMES

    models = of_conventions()["models"]
    first = next(iter(models.values()))["edits"]
    rows = []
    for edit in first:
        title = f"*control: {edit}*" if edit in ("noise floor", "another seed") else edit
        shares = [measured_share(model["edits"][edit]["right"]) for model in models.values()]
        rows.append([title, *shares, *(f"{model['edits'][edit]['ssim'][0]:.2f}" for model in models.values())])
    heads = [f"{what}, {NAMES[name]}" for what in ("right", "SSIM") for name in models]
    return markdown(["edit of `img_ids`", *heads], rows)


def measured_share(ends: Sequence[float]) -> str:
    """Return `91 % [86, 95]`."""
    mean, low, high = (100 * end for end in ends)
    return f"{mean:.0f} % [{low:.0f}, {high:.0f}]"


TEXT_ORDER = ("ssim", "place", "colour", "shape", "letters")


def _interval(row: dict[str, Any] | None) -> str:
    return f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if row and row["n"] else "–"


IDEAS = {
    "dose": "dose_response",
    "edits": "dose_edits",
    "steps": "step_roles",
    "moved": "relocation",
    "learned": "learn_relocation",
    "methods": "methods",
    "doubled": "methods_2x",
    "atlas": "atlas",
    "inpaint": "inpaint",
    "upscale": "upscale",
    "upscale_beyond": "upscale_beyond",
}
"""The names of runs in `ideas.md.j2`."""


def findings() -> str:
    """What the results show: `findings.md.j2` with the numbers of `embedded.json` and `results.json`."""
    from jinja2 import Environment, StrictUndefined

    page = Environment(undefined=StrictUndefined)
    page.filters["percent"] = lambda score: f"{100 * score[0]:.0f} %"
    page.filters["number"] = lambda score, digits: f"{score[0]:.{digits}f}"
    page.filters["share"] = lambda row: f"{100 * row['mean']:.0f} %"
    page.filters["interval"] = lambda row: f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    return page.from_string((ROOT / "docs" / "findings.md.j2").read_text()).render(quoted()).strip()


def ideas() -> str:
    """What the experiments on the article's ideas show: `ideas.md.j2` with the numbers of `results.json`."""
    from jinja2 import Environment, StrictUndefined

    page, runs = Environment(undefined=StrictUndefined), json.loads(RESULTS.read_text())
    page.filters["fixed"] = lambda value, digits: f"{value:.{digits}f}"
    page.filters["percent"] = lambda row: f"{100 * row['mean']:.0f} % [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
    page.filters["points"] = lambda row: page.filters["percent"](row).replace(" %", " points")
    page.filters["without"] = lambda row: f"{100 * (1 - row['mean']):.0f} %"
    page.filters["ends"] = lambda ends, digits: "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*ends, d=digits)
    page.filters["interval"] = lambda row, digits=2: (
        f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
    )
    page.filters["share"] = measured_share
    page.filters["gain"] = lambda row, digits: page.filters["interval"](
        {end: row[f"paired_{end}"] for end in ("mean", "low", "high")}, digits
    )
    page.filters["difference"] = lambda row, digits: page.filters["interval"](
        {"mean": -row["paired_mean"], "low": -row["paired_high"], "high": -row["paired_low"]}, digits
    )
    rows = {name: runs[run] for name, run in IDEAS.items()}
    rows["conventions"] = of_conventions()["models"]
    return page.from_string((ROOT / "docs" / "ideas.md.j2").read_text()).render(rows).strip()


def of_conventions() -> dict[str, Any]:
    """The numbers of `benchmarks/conventions.py`."""
    return json.loads((ROOT / "docs" / "conventions.json").read_text())


def quoted() -> dict[str, Any]:
    """The rows that the findings quote, by the names they have in `findings.md.j2`."""
    results, runs = json.loads(EMBEDDED.read_text()), json.loads(RESULTS.read_text())
    names = ("base", "zero", "half", "double", "stretch", "axis0", "floor", "seed")
    rows = {**results["edits"], **results["controls"]}
    windows = {name: runs["step_window"][f"quarter_{i}"] for name, i in (("early", 1), ("late", 4))}
    return {name: rows[title] for name, title in zip(names, ROW_TITLES, strict=True)} | windows


def trace() -> str:
    """The transfers of `+exp=trace` in single blocks, next to FreeFlux's probe of the same blocks."""
    runs = json.loads(RESULTS.read_text())
    shown = lambda row, digits=2: f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"  # noqa: E731
    rows = []
    for n in range(sum(name.startswith("none_") for name in runs["freeflux_probe"])):
        parts = [runs["trace"][f"{origin} → image, block {n}"] for origin in ("text", "image")]
        kind = "double" if n < 2 else "single"
        probed = shown(runs["freeflux_probe"][f"none_{n}"]["psnr"], 1)
        rows.append([f"{n}, {kind}", *(shown(part[a]) for part in parts for a in ENTERED), probed])
    heads = [f"{origin} → image: {a}" for origin in ("text", "image") for a in ("place", "word", "colour")]
    return markdown(["block", *heads, "PSNR without rotation of keys, dB"], rows)


def article(results: dict[str, Any], edit: str) -> str:
    """What the article reports for an edit, or an empty cell."""
    return "" if edit == "as trained" else results["sentences"].get(edit, "")
