"""What to do to position ids and where: ops, edits and programs (docs/programs.md). Contains no networks."""

from fluxlab.positions import attention_ops, frequency_ops, ops
from fluxlab.positions.compiled import Compiled, Placement, compile_programs
from fluxlab.positions.markdown import ops_table, where_table
from fluxlab.positions.notes import Note, lint
from fluxlab.positions.program import Edit, Program
from fluxlab.positions.program_tables import tables
from fluxlab.positions.registry import OPS, Op, load_plugins, loaded_plugins, op
from fluxlab.positions.shift_invariance import noise_floor, shifted
from fluxlab.positions.waves import Spectrum, Waves
from fluxlab.select.layout import IMAGE, REFERENCE, TEXT, Context, Layout, Scope
from fluxlab.select.words import Prompt, find_word

__all__ = [
    "IMAGE",
    "OPS",
    "REFERENCE",
    "TEXT",
    "Compiled",
    "Context",
    "Edit",
    "Layout",
    "Note",
    "Op",
    "Placement",
    "Program",
    "Prompt",
    "Scope",
    "Spectrum",
    "Waves",
    "attention_ops",
    "compile_programs",
    "find_word",
    "frequency_ops",
    "lint",
    "load_plugins",
    "loaded_plugins",
    "noise_floor",
    "op",
    "ops",
    "ops_table",
    "shifted",
    "tables",
    "where_table",
]
