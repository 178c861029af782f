"""What makes the image of a cell: sampling from the prompt, or a task that works on a given image.

A task is a method of `Pipeline` with its arguments. A variant's program is what the method takes as `programs`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fluxlab.editing.inpaint import check_arguments as check_inpaint
from fluxlab.editing.upscale import check_arguments as check_upscale
from fluxlab.errors import UserError, join, nearest, show
from fluxlab.experiment.inputs import Inputs
from fluxlab.positions import Program
from fluxlab.settings import check_count

GENERATE = "generate"
"""The task of a variant without one: the image is sampled from the prompt."""

KEY = "task"
"""The key of a variant that sets its task, next to the edits of its program."""

OF = ("image", "filled", "enlarged", "target")
"""What `decode` encodes and decodes: the image, with its mask filled from the border, enlarged to the size of the run
by the bicubic filter, or the target."""

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "inpaint": ("path", "attention", "iterations"),
    "upscale": ("factor", "method", "until", "known", "path", "attention", "iterations", "source_programs"),
    "decode": ("of",),
    "resize": (),
}
"""The arguments that each task takes, with the defaults of the method of `Pipeline`."""


@dataclass(frozen=True)
class Task:
    """A task and its arguments, `source_programs` as a `Program`."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def values(self) -> dict[str, Any]:
        """Return it as plain values for YAML."""
        plain = {k: v.to_config() if isinstance(v, Program) else v for k, v in self.arguments}
        return {"name": self.name, **plain}

    def describe(self) -> str:
        """Return it in one line, such as `inpaint(path=inverted)`."""
        shown = {k: v.describe() if isinstance(v, Program) else v for k, v in self.arguments}
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in shown.items())})" if shown else self.name

    @property
    def digest(self) -> list[Any]:
        """What a cell's key has of it."""
        return [self.name, {k: v.digest if isinstance(v, Program) else v for k, v in self.arguments}]

    @property
    def parts(self) -> tuple[str, ...]:
        """The inputs that the task works on."""
        if self.name == "decode":
            return {"filled": ("image", "mask"), "target": ("target",)}.get(self.of, ("image",))
        return ("image", "mask") if self.name == "inpaint" else ("image",)

    @property
    def of(self) -> str:
        """What `decode` decodes."""
        return dict(self.arguments).get("of", "image")

    @property
    def samples(self) -> bool:
        """Whether anything is sampled."""
        return self.name not in ("decode", "resize")

    @property
    def source_programs(self) -> Program | None:
        """The program of the inversion, if it has one of its own."""
        return dict(self.arguments).get("source_programs")

    @property
    def depends_on_training(self) -> bool:
        """Whether the image depends on the model's own size, as that of a program may."""
        own = self.source_programs
        by_size = self.name == "upscale" and dict(self.arguments).get("method") is None
        return by_size or (own is not None and own.depends_on_training)

    @property
    def inverts(self) -> bool:
        """Whether the image is inverted first, which takes forwards of its own."""
        given = dict(self.arguments)
        if self.name == "upscale" and given.get("path") is None:
            return given.get("method") != "resized"
        return given.get("path") == "inverted"

    @property
    def factor(self) -> int:
        """How many times as large as the given image the result is."""
        return dict(self.arguments).get("factor", 2) if self.name == "upscale" else 1


def read_task(value: Any, where: str) -> Task | None:
    """Return a task of a config, `{name: inpaint, path: inverted}` or its name; None for "generate".

    Raises `UserError` naming the key for an unknown task or argument, and for values that do not fit.
    """
    values = {"name": value} if isinstance(value, str) else value
    if not isinstance(values, Mapping):
        raise UserError(f"{where}={show(value)}: expected a task, such as {{name: inpaint}}")
    names = (GENERATE, *ARGUMENTS)
    given = {key: v for key, v in values.items() if key != "name" and v is not None}
    name = values.get("name", GENERATE)
    if name not in names:
        raise UserError(f"{join(where, 'name')}={show(name)}: expected {', '.join(names)}{nearest(str(name), names)}")
    allowed = ARGUMENTS.get(name, ())
    for key in given:
        if key not in allowed:
            expected = f"takes {', '.join(allowed)}{nearest(str(key), allowed)}" if allowed else "takes no arguments"
            raise UserError(f"{join(where, str(key))}: {name} {expected}")
    if "source_programs" in given:
        path = join(where, "source_programs")
        given["source_programs"] = Program.from_config(given["source_programs"], path)
    if name == GENERATE:
        return None
    try:
        _check(name, given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    task = Task(name, tuple(sorted(given.items())))
    for key in ("iterations", "source_programs"):
        if key in given and not task.inverts:
            raise UserError(
                f"{join(where, key)}: has no effect without an inversion; leave it out, or set path: inverted"
            )
    return task


def _check(name: str, given: Mapping[str, Any]) -> None:
    """Raise `UserError` for arguments that a task does not take together."""
    plain = {key: value for key, value in given.items() if key != "source_programs"}
    if name == "decode":
        if (of := plain.get("of", "image")) not in OF:
            raise UserError(f"of={show(of)}: expected {', '.join(OF)}")
        return
    check_count("iterations", plain.get("iterations"))
    checks: dict[str, Callable[..., None]] = {"inpaint": check_inpaint, "upscale": check_upscale}
    if name in checks:
        checks[name](**plain)


def split_tasks(variants: Mapping[str, Any], task: Any) -> tuple[dict[str, Any], dict[str, Task]]:
    """Return the variants without their key `task`, and the task of each variant that has one.

    task: of all variants. A variant's own changes its arguments, or replaces it if it has another name.
    """
    common = {"name": GENERATE} if task is None else {"name": task} if isinstance(task, str) else task
    if not isinstance(common, Mapping):
        raise UserError(f"{KEY}={show(task)}: expected a task, such as inpaint or {{name: inpaint}}")
    programs, tasks = {}, {}
    for name, program in variants.items():
        own: Any = {}
        if isinstance(program, Mapping) and KEY in program:
            own = program[KEY]
            program = {key: edit for key, edit in program.items() if key != KEY}
            own = {"name": own} if isinstance(own, str) else own
            if not isinstance(own, Mapping):
                raise UserError(f"variants.{name}.{KEY}={show(own)}: expected arguments of a task, or its name")
        programs[name] = program
        asked = own if own.get("name", common.get("name")) != common.get("name") else {**common, **own}
        found = read_task(asked, f"variants.{name}.{KEY}" if own else KEY)
        if found is not None:
            tasks[name] = found
    return programs, tasks


def check_tasks(tasks: Mapping[str, Task], inputs: Sequence[Inputs]) -> None:
    """Raise `UserError` if a task lacks an image, and for images that no task works on."""
    if inputs and not tasks:
        raise UserError("image: no variant has a task that works on it; add task=inpaint, upscale or decode")
    for name, task in tasks.items():
        for part in task.parts:
            if not inputs or any(getattr(one, part) is None for one in inputs):
                raise UserError(f"variants.{name}: {task.describe()} needs {part}=<file>, or scenes that have one")


def check_sizes(tasks: Mapping[str, Task], inputs: Sequence[Inputs], size: tuple[int, int]) -> None:
    """Raise `UserError` for inputs that do not have the size of what they are compared with.

    size: (height, width) of the results in pixels.
    """
    own = [task for task in tasks.values() if task.name == "decode" and task.of != "enlarged"]
    expected = {part: size for task in own for part in task.parts if part != "mask"} | {"mask": size, "target": size}
    for one in inputs:
        for part, (height, width) in expected.items():
            file = getattr(one, part)
            if file is not None and file.size != (height, width):
                have = f"{file.size[0]} × {file.size[1]} pixels"
                raise UserError(
                    f"{part}: {file.path} has {have}, but the images of the run have {height} × {width} pixels; "
                    "use a file of the same size"
                )


def size_of(tasks: Mapping[str, Task], inputs: Sequence[Inputs]) -> tuple[int, int]:
    """Return the height and width of the results in pixels. Raises `UserError` for inputs of different sizes."""
    factors = {task.factor for task in tasks.values() if task.samples} or {1}
    sizes = {one.image.size for one in inputs}
    if len(factors) > 1 or len(sizes) > 1:
        listed = [f"{h} × {w}" for h, w in sorted(sizes)] if len(sizes) > 1 else sorted(map(str, factors))
        what = "image: files of" if len(sizes) > 1 else "task: results that are larger than the image by"
        raise UserError(f"{what} {', '.join(listed)}; all images of a run have one size")
    (factor,), ((height, width),) = factors, sizes
    return factor * height, factor * width
