"""The page, with NiceGUI: what the controls hold, when images are drawn, and where answers are shown."""

import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nicegui import app, run, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fluxlab.errors import NonFiniteError, UserError
from fluxlab.play import edits
from fluxlab.play.answers import Answers
from fluxlab.play.session import Drawn, draw
from fluxlab.play.writing import EditState, experiment_yaml, program_of

if TYPE_CHECKING:
    from fluxlab.pipeline import Pipeline

PROMPT = "A cat holding a sign that says hello world"
SIZES = {1: "model's own", 1.5: "× 1.5", 2: "× 2"}
QUIET = 0.35  # seconds without a change before images are drawn

STYLE = """
body { background: #fafafa; }
.sides { display: flex; flex-wrap: wrap; gap: 1.5rem; width: 100%; max-width: 1500px; margin: 0 auto; }
.controls { flex: 1 1 330px; max-width: 440px; min-width: 0; }
.answers { flex: 3 1 560px; min-width: 0; }
@media (max-width: 800px) { .controls, .answers { flex: 1 1 100%; max-width: 100%; } }
.panel { background: white; border: 1px solid #ddd; border-radius: 6px; padding: .75rem 1rem; width: 100%; }
.panel h2 { font-size: 1rem; line-height: 1.4; font-weight: 600; margin: 0 0 .4rem; }
.pair { display: flex; gap: 1rem; width: 100%; }
.pair figure { flex: 1 1 0; margin: 0; min-width: 0; }
.pair img { width: 100%; max-width: 384px; image-rendering: pixelated; display: block; }
.explained { display: flex; flex-wrap: wrap; gap: .75rem; }
.explained > .panel { flex: 1 1 300px; width: auto; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: .6rem 1rem; }
.maps figure { margin: 0; display: grid; grid-template-columns: 1fr 1fr; gap: 0 3px; max-width: 260px; }
.maps figcaption { grid-column: 1 / 3; font-size: .85rem; overflow-wrap: anywhere; }
.maps img { width: 100%; image-rendering: pixelated; }
.hint { margin: -.35rem 0 0 .2rem; }
.positions img { width: 100%; max-width: 640px; }
.stale { opacity: .3; }
.alert { color: #8a1c00; background: #fff1ec; border: 1px solid #e7b3a3; border-radius: 6px; padding: .5rem .75rem;
  width: 100%; white-space: pre-wrap; overflow-wrap: anywhere; }
.small { font-size: .8rem; color: #555; line-height: 1.35; overflow-wrap: anywhere; }
.yaml-text { font: .8rem/1.5 monospace; white-space: pre; overflow-x: auto; }
"""


@dataclass
class State:
    """What one visitor has chosen. changed: when, by `time.monotonic`; None if images show it."""

    prompt: str = PROMPT
    seed: int | None = 0
    steps: int | None = 1
    enlarge: float = 1
    live: bool = True
    edits: list[EditState] = field(default_factory=list)
    changed: float | None = 0.0

    def touch(self) -> None:
        self.changed = time.monotonic()


def serve(pipe: "Pipeline", host: str, port: int, model: str) -> None:
    """Serve the page until the process is interrupted. model: the words that name the model in a command."""
    one_at_a_time = threading.Lock()

    def computed(*arguments: Any) -> Drawn:
        with one_at_a_time:
            return draw(pipe, *arguments)

    # a page of another site must not reach this one under a name of its own (DNS rebinding)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost"])
    ui.run(
        lambda: build(pipe, computed, model),
        host=host,
        port=port,
        title="fluxlab playground",
        reload=False,
        show=False,
        show_welcome_message=False,
        reconnect_timeout=30,  # seconds; a busy machine answers late
    )


def build(pipe: "Pipeline", computed: Any, model: str) -> None:
    """Build the page of one visitor. computed: `session.draw` of this pipeline."""
    p = pipe.transformer.params
    blocks = p.depth + p.depth_single_blocks
    state = State(steps=pipe.steps, edits=[edits.new("scale")])
    ui.add_css(STYLE)
    with ui.element("main").classes("sides"):
        with ui.column().classes("controls gap-3"):
            ui.html("<h1 style='font-size:1.3rem;line-height:1.3;margin:0'>fluxlab playground</h1>", sanitize=False)
            size = " × ".join(map(str, pipe.size))
            ui.label(
                f"{model}: {size} px, {p.depth} double and {p.depth_single_blocks} single blocks, {pipe.device}"
            ).classes("small")
            button = _settings(state, pipe.steps, blocks)
        with ui.column().classes("answers gap-3"):
            answers = Answers()

    async def tick() -> None:
        """Draw when nothing has changed for a while. The timer waits for it, so the latest state is drawn next."""
        if state.changed is None or time.monotonic() - state.changed < QUIET:
            return
        state.changed = None
        button.props("loading")
        try:
            program = program_of(state.edits, _steps(state), blocks)
            chosen = {"prompts": [state.prompt], "seeds": [_seed(state)], "steps": state.steps}
            if state.enlarge != 1:
                chosen["enlarge"] = state.enlarge
            enlarge = None if state.enlarge == 1 else state.enlarge
            drawn = await run.io_bound(computed, state.prompt, _seed(state), program, state.steps, enlarge)
            if drawn is not None:  # the server is not ending
                answers.show(drawn, experiment_yaml(program, chosen, model))
        except (UserError, NonFiniteError) as error:
            answers.fail(str(error))
        except Exception as error:
            traceback.print_exc()
            answers.fail(f"An error inside fluxlab or an op: {type(error).__name__}. Its traceback is in the terminal.")
        finally:
            button.props(remove="loading")

    ui.timer(0.1, tick)


def _steps(state: State) -> int:
    if state.steps is None or state.steps < 1:
        raise UserError("steps: expected a whole number, 1 or more")
    return state.steps


def _seed(state: State) -> int:
    if state.seed is None or state.seed < 0:
        raise UserError("seed: expected a whole number, 0 or more")
    return state.seed


def _settings(state: State, steps: int, blocks: int) -> ui.button:
    """Add the controls. Returns the button that draws."""

    def changed() -> None:
        if state.live:
            state.touch()

    def set_value(key: str, value: Any) -> None:
        setattr(state, key, value)
        changed()

    ui.textarea("prompt", value=state.prompt, on_change=lambda e: set_value("prompt", e.value or "")).props(
        "autogrow outlined dense rows=1"
    ).classes("w-full")
    with ui.row().classes("w-full no-wrap gap-2"):
        number = "outlined dense"
        ui.number("seed", value=0, min=0, precision=0, on_change=lambda e: set_value("seed", whole(e.value))).props(
            number
        ).classes("flex-1")

        def set_steps(value: Any) -> None:
            state.steps = whole(value)
            for edit in state.edits:
                edit.steps = None  # they were steps of another schedule
            area.refresh()
            changed()

        ui.number("steps", value=steps, min=1, precision=0, on_change=lambda e: set_steps(e.value)).props(
            number
        ).classes("flex-1")
        ui.select(SIZES, value=1, label="size", on_change=lambda e: set_value("enlarge", e.value)).props(
            number
        ).classes("flex-1")

    @ui.refreshable
    def area() -> None:
        for i in range(len(state.edits)):
            edits.card(state.edits, i, state.steps or 1, blocks, changed, area.refresh)

    with ui.column().classes("w-full gap-3"):
        area()

    def add() -> None:
        state.edits.append(edits.new("scale"))
        area.refresh()
        changed()

    with ui.row().classes("items-center gap-3"):
        ui.button("add an edit", icon="add", on_click=add).props("outline no-caps dense padding='4px 10px'")
        button = ui.button("draw", on_click=state.touch).props("no-caps dense padding='4px 14px'")
        ui.checkbox("after each change", value=True, on_change=lambda e: setattr(state, "live", e.value)).props("dense")
    return button


def whole(value: Any) -> int | None:
    """Return the whole number of a field, None if it is empty."""
    return None if value is None else int(value)
