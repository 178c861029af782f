"""The part of the page that shows images, positions, word maps and YAML."""

import base64
import io
from typing import TYPE_CHECKING

from nicegui import ui

from fluxlab.play.session import Drawn

if TYPE_CHECKING:
    from PIL.Image import Image


class Answers:
    """The elements that change with each answer. Built empty, in the current place of the page."""

    def __init__(self):
        self.alert = ui.label().classes("alert").props("role=alert")
        self.alert.visible = False
        self.body = ui.column().classes("w-full gap-3")
        with self.body:
            with ui.element("section").classes("panel"):
                with ui.element("div").classes("pair"):
                    self.images = [_figure(name) for name in ("before", "after")]
                self.notes = ui.column().classes("gap-0 mt-2")
            with ui.element("div").classes("explained"):
                with ui.element("section").classes("panel positions"):
                    _title("Positions of the tokens")
                    self.positions = _picture("positions of the tokens, before and after")
                with ui.element("section").classes("panel"):
                    _title("Attention to each word, before and after")
                    self.maps = ui.element("div").classes("maps")
            with ui.element("section").classes("panel yaml"):
                with ui.row().classes("w-full items-center justify-between"):
                    _title("As an experiment")
                    ui.button("copy", icon="content_copy", on_click=self.copy).props("flat dense no-caps")
                self.text = ui.label().classes("yaml-text")
        self.content = ""

    def copy(self) -> None:
        """Copy the experiment to the clipboard."""
        ui.clipboard.write(self.content)
        ui.notify("Copied", position="bottom")

    def fail(self, message: str) -> None:
        """Show a message. What was drawn before is dimmed, since it does not answer what is asked now."""
        self.alert.text, self.alert.visible = message, True
        self.body.classes("stale")

    def show(self, drawn: Drawn, experiment: str) -> None:
        """Show an answer, and the experiment in YAML that it is the answer to."""
        self.content = self.text.text = experiment
        self.alert.visible = False
        self.body.classes(remove="stale")
        for picture, image in zip(self.images, (drawn.before, drawn.after), strict=True):
            _set(picture, image_url(image))
        _set(self.positions, url(drawn.positions))
        self.notes.clear()
        with self.notes:
            for note in drawn.notes:
                ui.label(f"Note: {note}").classes("small")
            ui.label(f"{drawn.seconds:.1f} s").classes("small seconds")
        self.maps.clear()
        with self.maps:
            if drawn.maps_note:
                ui.label(f"No maps here. {drawn.maps_note}").classes("small")
            for one in drawn.maps:
                with ui.element("figure"):
                    with ui.element("figcaption"):
                        ui.label(one.word)
                    for name, image in (("before", one.before), ("after", one.after)):
                        _set(_picture(f"{one.word}, {name}"), image_url(image))


def url(content: bytes) -> str:
    """Return a PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def image_url(image: "Image") -> str:
    """Return an image as a data URL."""
    content = io.BytesIO()
    image.save(content, format="png")
    return url(content.getvalue())


def _title(text: str) -> None:
    with ui.element("h2"):
        ui.label(text)


def _figure(name: str) -> ui.element:
    with ui.element("figure"):
        _title(name)
        return _picture(name)


def _picture(alt: str) -> ui.element:
    picture = ui.element("img")
    picture.props["alt"] = alt
    return picture


def _set(picture: ui.element, source: str) -> None:
    picture.props["src"] = source
    picture.update()
