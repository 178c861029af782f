"""Describe an edit in words."""

from typing import TYPE_CHECKING, Any

from fluxlab.positions.registry import find_op
from fluxlab.select.picked import pick_of

if TYPE_CHECKING:
    from fluxlab.positions.edit import Edit


def describe_edit(edit: "Edit") -> str:
    """Return `scale factor 1.2 on image (row, col), steps 0–3, double blocks 0–18, keys, strength 1 → 0`."""
    config = edit.to_config()
    where = edit.where
    arguments = [
        f"{key} {_ranges(config[key]) if key == 'pairs' else _value(config[key])}"
        for key in edit.arguments
        if key in config
    ]
    parts = [" ".join([edit.op, ", ".join(arguments)]).strip()]
    if "tokens" in find_op(edit.op, "").where:
        parts[0] += f" on {_tokens(where['tokens'])}"
    if where["axes"] != "all":
        parts[0] += f" ({', '.join(where['axes'])})"
    if where["steps"] != "all":
        parts.append(_steps(where["steps"]))
    if where["blocks"] != "all":
        parts.append(_blocks(where["blocks"]))
    if where["heads"] != "all":
        parts.append(f"heads {_ranges(where['heads'])}")
    if where["side"] != "both":
        parts.append(where["side"])
    if where["seen_by"] != "all":
        parts.append(f"as {_tokens(where['seen_by'])} sees them")
    if where["strength"] != 1:
        parts.append(f"strength {_strength(where['strength'])}")
    return ", ".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        if any(key in value for key in ("words", "outside", "indices", "reference", "probe")) or (
            "mask" in value and "to" not in value
        ):
            return _tokens(value)
        return " ".join(part if key == "unit" else f"{key} {_value(part)}" for key, part in value.items())
    if isinstance(value, list):
        text = "[" + ", ".join(_value(part) for part in value) + "]"
        return text if len(text) <= 60 else f"{text[:28]} … {text[-28:]}"
    return "–" if value is None else str(value)


def _tokens(selection: str | dict | list) -> str:
    if isinstance(selection, list):
        return " + ".join(_tokens(part) for part in selection)
    if isinstance(selection, str):
        return selection
    if "words" in selection:
        return "words " + ", ".join(repr(word) for word in selection["words"])
    if "box" in selection:
        return f"box [{', '.join(f'{n:g}' for n in selection['box'])}] {selection['unit']}"
    if "mask" in selection:
        mask = selection["mask"]
        rows, cols = mask["size"] if isinstance(mask, dict) else (len(mask), len(mask[0]))
        return f"mask of {rows} × {cols}"
    if "outside" in selection:
        return f"image outside {_tokens(selection['outside'])}"
    if "probe" in selection:
        return _picked(selection)
    if "indices" in selection:
        return f"{selection['of']} tokens {_ranges(selection['indices'])}"
    return f"reference {selection['reference']}"


def _picked(selection: dict) -> str:
    pick, count = pick_of(selection)
    of = "" if selection["of"] == "all" else f"{selection['of']} "
    tokens = f"{of}token{'' if count == 1 else 's'}"
    if pick == "random":
        return f"{count} random {tokens} (seed {selection['seed']})"
    asked = "" if selection["from"] == "all" else f" from {selection['from']}"
    blocks = "" if selection["blocks"] == "all" else f" in {_blocks(selection['blocks'])}"
    return f"the {count} {tokens} with {'most' if pick == 'top' else 'least'} attention{asked}{blocks}"


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _steps(steps: list[int] | dict) -> str:
    if isinstance(steps, list):
        return f"steps {_ranges(steps)}"
    ((key, (low, high)),) = steps.items()
    return f"σ {low:g}–{high:g}" if key == "sigma" else f"steps {100 * low:g}–{100 * high:g} %"


def _blocks(blocks: dict) -> str:
    return " + ".join(
        f"{'' if key == 'through' else key + ' '}blocks{'' if numbers == 'all' else ' ' + _ranges(numbers)}"
        for key, numbers in blocks.items()
    )


def _strength(strength: float | list) -> str:
    if not isinstance(strength, list):
        return f"{strength:g}"
    if [sigma for sigma, _ in strength] == [1, 0]:
        return f"{strength[0][1]:g} → {strength[1][1]:g}"
    return ", ".join(f"{value:g} at σ {sigma:g}" for sigma, value in strength)
