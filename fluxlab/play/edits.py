"""The card of one edit: its op, a control for each argument, and where it acts."""

from collections.abc import Callable

from nicegui import ui

from fluxlab.errors import UserError
from fluxlab.play.controls import Control, argument_controls, where_controls, written
from fluxlab.play.writing import EditState, read_value
from fluxlab.positions import OPS

Changed = Callable[[], None]


def new(op: str) -> EditState:
    """Return an edit with the start values of its op."""
    return EditState(op, {one.key: one.start for one in (*argument_controls(OPS[op]), *where_controls(OPS[op]))})


def card(edits: list[EditState], i: int, steps: int, blocks: int, changed: Changed, refresh: Changed) -> None:
    """Add the card of edit i. refresh: builds all cards again."""
    edit, op = edits[i], OPS[edits[i].op]

    def choose(name: str) -> None:
        edits[i] = new(name)
        refresh()
        changed()

    def remove() -> None:
        del edits[i]
        refresh()
        changed()

    with ui.column().classes("panel gap-2"):
        with ui.row().classes("w-full no-wrap items-center gap-1"):
            select = ui.select(sorted(OPS), value=edit.op, label="op", on_change=lambda e: choose(e.value))
            select.props("outlined dense options-dense").classes("flex-1")
            ui.button(icon="close", on_click=remove).props(f'flat dense round aria-label="remove {edit.op}"')
        ui.label(op.summary.replace("`", "")).classes("small")
        for one in argument_controls(op):
            field(edit, one, changed)
        if not op.where:
            return
        if "steps" in op.where:
            edit.steps = window("steps", edit.steps, steps, lambda ends: setattr(edit, "steps", ends), changed)
        if "blocks" in op.where:
            edit.blocks = window("blocks", edit.blocks, blocks, lambda ends: setattr(edit, "blocks", ends), changed)
        with (
            ui.expansion("where else: " + ", ".join(one.key for one in where_controls(op)))
            .classes("w-full")
            .props("dense dense-toggle header-class='q-px-none small'")
        ):
            for one in where_controls(op):
                field(edit, one, changed)


def field(edit: EditState, one: Control, changed: Changed) -> None:
    """Add a field for the value of a key in YAML, or a list to choose from; and a slider if it takes numbers."""

    def store(text: str | None) -> None:
        edit.values[one.key] = text or ""
        changed()

    if one.words:
        value = edit.values[one.key]
        options = {**({} if one.required else {"": "default"}), **{word: word for word in one.words}}
        ui.select(options, value=value if value in options else one.words[0], label=one.key).props(
            "outlined dense options-dense"
        ).classes("w-full").on_value_change(lambda e: store(e.value))
        return
    slider = None

    def typed(text: str | None) -> None:
        number = _number(text or "")
        if slider is not None and number is not None and one.slider.low <= number <= one.slider.high:
            slider.value = number
        store(text)

    text = ui.input(one.key, value=edit.values[one.key], on_change=lambda e: typed(e.value))
    text.props("outlined dense").classes("w-full")
    if one.hint:
        ui.label(one.hint).classes("small hint")
    if one.suggestions:
        text.set_autocomplete(list(one.suggestions))
    number = _number(edit.values[one.key])
    if one.slider is None or (number is None and one.start):  # what it starts with is not a number
        return
    start = min(max(1.0 if number is None else number, one.slider.low), one.slider.high)
    slider = ui.slider(min=one.slider.low, max=one.slider.high, step=one.slider.step, value=start)
    slider.props(f'dense aria-label="{one.key}"').classes("w-full px-2")
    # only what is dragged reaches the text: a value that is typed keeps its spelling
    slider.on("update:model-value", lambda e: text.set_value(written(round(float(e.args), 6))), throttle=0.1)


def _number(text: str) -> float | None:
    """Return the number that a value is, None if it is something else."""
    try:
        value = read_value(text, "")
    except UserError:
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def window(
    name: str,
    chosen: tuple[int, int] | None,
    count: int,
    store: Callable[[tuple[int, int]], None],
    changed: Changed,
) -> tuple[int, int]:
    """Add a slider with two ends over `count` steps or blocks. Returns the ends that it shows."""
    first, last = chosen or (0, count - 1)

    def words(low: int, high: int) -> str:
        return (
            f"{name}: all {count}" if (low, high) == (0, count - 1) else f"{name}: {low} to {high} of 0 to {count - 1}"
        )

    label = ui.label(words(first, last)).classes("small")

    def moved(value: dict[str, float]) -> None:
        low, high = int(value["min"]), int(value["max"])
        label.text = words(low, high)
        store((low, high))
        changed()

    ends = ui.range(
        min=0, max=max(count - 1, 1), step=1, value={"min": first, "max": last}, on_change=lambda e: moved(e.value)
    )
    ends.props(f'dense snap aria-label="{name}"').classes("w-full px-2")
    ends.set_enabled(count > 1)
    return first, last
