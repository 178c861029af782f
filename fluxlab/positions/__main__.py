"""`python -m fluxlab.positions PROGRAM`: what a program is, what it does to positions, and pictures of it. No model."""

import argparse
import io
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fluxlab.compose import guarded
from fluxlab.drawing import token_layout as plot
from fluxlab.errors import UserError, show
from fluxlab.positions.program import Program
from fluxlab.positions.registry import load_plugins

EPILOG = """examples:
  python -m fluxlab.positions '{a: {op: scale, factor: 2}}' -o layout.png
  python -m fluxlab.positions configs/op/rotate.yaml --kernel kernel.pdf --grid 64x64
  python -m fluxlab.positions '{a: {op: relocate, tokens: {words: [hello world]}, to: [4, 4]}}' \\
      --prompt 'A cat holding a sign that says hello world' -o layout.svg

Without -o and --kernel nothing is written. Sizes not given are FLUX.1's."""


def main(arguments: list[str] | None = None) -> int:
    """0 when done, 2 for what the user can mend (one to three lines on stderr), 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: run(_parser().parse_args(arguments)), "interrupted")


def run(options: argparse.Namespace) -> None:
    """Say what the program does, and write the figures that were asked for."""
    for file in filter(None, (options.out, options.kernel)):
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
        double=options.double,
        single=options.single,
        heads=options.heads,
        steps=options.steps,
    )
    view = plot.view(program, context, step=options.step, block=options.block, side=options.side, head=options.head)
    print(program.describe())
    print(f"digest {program.digest}")
    if view.told:
        print(", ".join(view.told.values()))
    for name, _, start, stop in plot.kinds(context.layout):
        print(f"{name}: {plot.summary(view.after[start:stop])}")
    for file, draw in ((options.out, plot.draw_layout), (options.kernel, plot.draw_kernel)):
        if file:
            print(f"wrote {plot.write_figure(draw(view), file)}")


def read_program(given: str) -> Program:
    """A program from YAML, or from a YAML file: `@file`, or a path that exists or ends in .yaml or .yml.

    A file may also hold a single edit, as those under `configs/op` do. Raises `UserError` naming what cannot be read.
    """
    file = given[1:] if given.startswith("@") else given
    is_file = given.startswith("@") or given.endswith((".yaml", ".yml")) or os.path.isfile(given)
    where = file if is_file else "program"
    try:
        text = Path(file).read_text(encoding="utf-8") if is_file else given
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{file}: cannot be read ({reason}), expected a YAML file with a program") from None
    try:
        found = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{where}: {show(text)}, not YAML that can be read: {reason}") from None
    if not text.strip() or not isinstance(found, dict) or found == {text.strip(): None}:
        raise UserError(f"{where}: {show(text)}, expected a mapping of edits such as {{a: {{op: scale, factor: 2}}}}")
    if is_file and isinstance(found.get("op"), str):
        found = {Path(file).stem: found}
    try:
        return Program.from_config(found)
    except UserError as error:
        raise UserError(f"{where}: {error}" if is_file else str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fluxlab.positions",
        description="What a program is, what it does to positions, and pictures of it. Needs no model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = _refuse
    parser.add_argument("program", metavar="PROGRAM", help="YAML, or a YAML file: @FILE or a path; {} is the identity")
    flux = plot.FLUX
    for flags, kind, default, metavar, said in (
        (("-o", "--out"), str, None, "FILE", "write where the tokens stand: .png, .pdf or .svg"),
        (("--kernel",), str, None, "FILE", "write how q·k falls off with distance"),
        (("--grid",), _grid, (16, 16), "ROWSxCOLS", "image tokens (16x16)"),
        (("--text",), _count, 24, "N", "text tokens (24)"),
        (("--prompt",), str, None, "TEXT", "for edits that name words: one text token a word, unlike T5"),
        (("--step",), _count, None, "N", "which step to show, from 0 (the first where the program acts)"),
        (("--block",), _count, None, "N", "which block, from 0 through all (the first where it acts)"),
        (("--head",), _count, None, "N", "which head, from 0 (the first where it acts)"),
        (("--side",), str, None, "SIDE", "queries or keys (the first where it acts)"),
        (("--steps",), _count, 28, "N", "steps of the run, evenly spread (28)"),
        (("--double",), _count, flux.depth, "N", f"double blocks ({flux.depth})"),
        (("--single",), _count, flux.depth_single_blocks, "N", f"single blocks ({flux.depth_single_blocks})"),
        (("--heads",), _count, flux.num_heads, "N", f"heads ({flux.num_heads})"),
        (("--axes-dim",), _axes, flux.axes_dim, "N,N,N", "width of index, row, col (16,56,56)"),
        (("--theta",), float, flux.theta, "X", f"base of the frequencies ({flux.theta})"),
    ):
        parser.add_argument(*flags, type=kind, default=default, metavar=metavar, help=said)
    parser.add_argument(
        "--reference", type=_grid, action="append", default=[], metavar="ROWSxCOLS", help="a reference image's tokens"
    )
    parser.add_argument(
        "--plugins", action="append", default=[], metavar="MODULE", help="a module with ops of your own"
    )
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 0 to 9999")
    return int(text)


def _grid(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,3})x(\d{1,3})", text)
    if not found or not all(1 <= int(n) <= 256 for n in found.groups()):
        raise argparse.ArgumentTypeError(f"{text!r}, expected ROWSxCOLS such as 16x16, at most 256x256")
    return int(found[1]), int(found[2])


def _axes(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected widths such as 16,56,56")
    return tuple(int(part) for part in text.split(","))


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}\npython -m fluxlab.positions --help lists what there is")


if __name__ == "__main__":
    sys.exit(main())
