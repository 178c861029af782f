"""`python -m fluxlab.positions PROGRAM`: print and draw what a program does to positions. Needs no model."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

import yaml
from omegaconf._utils import get_yaml_loader

from fluxlab.compose import guarded
from fluxlab.drawing import position_plot as plot
from fluxlab.errors import UserError, show
from fluxlab.positions.notes import lint
from fluxlab.positions.program import Program
from fluxlab.positions.registry import load_plugins

EPILOG = """examples:
  python -m fluxlab.positions '{a: {op: scale, factor: 2}}' -o positions.png
  python -m fluxlab.positions configs/op/rotate.yaml --similarity similarity.pdf --grid 64x64
  python -m fluxlab.positions '{a: {op: relocate, tokens: {words: [hello world]}, to: [4, 4]}}' \\
      --prompt 'A cat holding a sign that says hello world' -o positions.svg

Without -o and --similarity nothing is written. The default sizes are FLUX.1's."""


def main(arguments: list[str] | None = None) -> int:
    """Return 0 on success, 2 for an error that the user can fix (one to three lines on stderr), 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: run(_parser().parse_args(arguments)), "interrupted")


def run(options: argparse.Namespace) -> None:
    """Print what the program does, and write the figures that `options` names."""
    for file in filter(None, (options.out, options.similarity)):
        plot.check_ending(file)
    load_plugins(options.plugins, "--plugins")
    program = read_program(options.program)
    context = plot.sequence(
        grid=options.grid,
        text=options.text,
        references=options.reference,
        prompt=options.prompt,
        axes_dim=options.axes_dim,
        theta=options.theta,
        trained=options.trained,
        double=options.double,
        single=options.single,
        heads=options.heads,
        steps=options.steps,
    )
    state = plot.program_at_step(
        program, context, step=options.step, block=options.block, side=options.side, head=options.head
    )
    print(program.describe())
    print(f"digest {program.digest}")
    if state.labels:
        print(", ".join(state.labels.values()))
    for name, _, start, stop in plot.token_groups(context.layout):
        print(f"{name}: {plot.summary(state.after[start:stop])}")
    for note in lint(program, context):
        print(f"note: {note}")
    for file, draw in ((options.out, plot.draw_positions), (options.similarity, plot.draw_similarity)):
        if file:
            print(f"wrote {plot.write_figure(draw(state), file)}")


def read_program(source: str) -> Program:
    """Return a program from YAML, or from a YAML file: `@file`, or a path that exists or ends in .yaml or .yml.

    A file may also contain a single edit, as those under `configs/op` do. Raises UserError for what cannot be read.
    """
    file = source[1:] if source.startswith("@") else source
    is_file = source.startswith("@") or source.endswith((".yaml", ".yml")) or _exists(source)
    where = show(file)[1:-1] if is_file else "program"
    try:
        text = Path(file).read_text(encoding="utf-8-sig") if is_file else source
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: cannot be read ({reason}), expected a YAML file with a program") from None
    try:
        config = yaml.load(text, Loader=get_yaml_loader())  # as OmegaConf reads it, with ${…} left as text
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        at = f"line {line + 1}: " if is_file and line is not None else ""
        raise UserError(f"{where}: {at}{show(text)}, not YAML that can be read: {reason}") from None
    if not text.strip() or not isinstance(config, dict) or config == {text.strip(): None}:
        raise UserError(f"{where}: {show(text)}, expected a mapping of edits such as {{a: {{op: scale, factor: 2}}}}")
    if is_file and isinstance(config.get("op"), str):
        config = {Path(file).stem: config}
    try:
        return Program.from_config(config)
    except UserError as error:
        raise UserError(f"{where}: {error}" if is_file else str(error)) from None


def _exists(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a null byte
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fluxlab.positions",
        description="Print and draw what a program does to positions. Needs no model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = _refuse
    parser.add_argument("program", metavar="PROGRAM", help="YAML, or a YAML file: @FILE or a path; {} is the identity")
    flux = plot.FLUX
    for flags, parse, default, metavar, text in (
        (("-o", "--out"), str, None, "FILE", "write a plot of the positions: .png, .pdf or .svg"),
        (
            ("--similarity", "--kernel"),
            str,
            None,
            "FILE",
            "write RoPE similarity against distance (--kernel: old name)",
        ),
        (("--grid",), _grid, (16, 16), "ROWSxCOLS", "image tokens (16x16)"),
        (("--text",), _count, 24, "N", "text tokens (24)"),
        (("--prompt",), str, None, "TEXT", "for edits that name words: one text token per word, unlike T5"),
        (("--step",), _count, None, "N", "the step to show, from 0 (default: the first where the program acts)"),
        (("--block",), _count, None, "N", "the block, counted through all (default: the first where it acts)"),
        (("--head",), _count, None, "N", "the head, from 0 (default: the first where it acts)"),
        (("--side",), str, None, "SIDE", "queries or keys (default: the first where it acts)"),
        (("--steps",), _count, 28, "N", "steps of the schedule, evenly spaced (28)"),
        (("--double",), _count, flux.depth, "N", f"double blocks ({flux.depth})"),
        (("--single",), _count, flux.depth_single_blocks, "N", f"single blocks ({flux.depth_single_blocks})"),
        (("--heads",), _count, flux.num_heads, "N", f"heads ({flux.num_heads})"),
        (("--axes-dim",), _axes, flux.axes_dim, "N,N,N", "width of index, row, col (16,56,56)"),
        (("--trained",), _grid, (64, 64), "ROWSxCOLS", "image tokens that the model was trained on (64x64)"),
        (("--theta",), float, flux.theta, "X", f"base of the frequencies ({flux.theta})"),
    ):
        parser.add_argument(*flags, type=parse, default=default, metavar=metavar, help=text)
    parser.add_argument(
        "--reference", type=_grid, action="append", default=[], metavar="ROWSxCOLS", help="a reference image's tokens"
    )
    parser.add_argument("--plugins", action="append", default=[], metavar="MODULE", help="a module with your own ops")
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,4}", text):
        raise argparse.ArgumentTypeError(f"{show(text)}, expected a whole number from 0 to 9999")
    return int(text)


def _grid(text: str) -> tuple[int, int]:
    sizes = re.fullmatch(r"(\d{1,3})x(\d{1,3})", text)
    if not sizes or not all(1 <= int(n) <= 256 for n in sizes.groups()):
        raise argparse.ArgumentTypeError(f"{show(text)}, expected ROWSxCOLS such as 16x16, at most 256x256")
    return int(sizes[1]), int(sizes[2])


def _axes(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        raise argparse.ArgumentTypeError(f"{show(text)}, expected widths such as 16,56,56")
    return tuple(int(part) for part in text.split(","))


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}\nsee python -m fluxlab.positions --help")


if __name__ == "__main__":
    sys.exit(main())
