"""What to do to position ids and where: ops, edits and programs (docs/programs.md). Contains no networks."""

from fluxlab.positions import (
    activation_ops,
    attention_ops,
    frequency_ops,
    latent_ops,
    ops,
    placement_ops,
    region_ops,
    score_ops,
    window_ops,
)
from fluxlab.positions.actions import Action, actions
from fluxlab.positions.compiled import Compiled, Placement
from fluxlab.positions.compiling import compile_programs
from fluxlab.positions.interventions import (
    Interventions,
    compile_interventions,
    has_interventions,
    sources_of,
    with_sources,
)
from fluxlab.positions.markdown import ops_table, where_table
from fluxlab.positions.notes import Note, lint
from fluxlab.positions.picked import measuring_steps
from fluxlab.positions.program import Edit, Program
from fluxlab.positions.program_tables import tables
from fluxlab.positions.region_ops import region_prompts, without_regions
from fluxlab.positions.registry import OPS, Op, load_plugins, loaded_plugins, op
from fluxlab.positions.shift_invariance import noise_floor, shifted
from fluxlab.positions.size_ops import split_resample
from fluxlab.positions.waves import Spectrum, Waves
from fluxlab.select.layout import IMAGE, REFERENCE, TEXT, Context, Layout, Scope
from fluxlab.select.words import Prompt, find_word

__all__ = [
    "IMAGE",
    "OPS",
    "REFERENCE",
    "TEXT",
    "Action",
    "Compiled",
    "Context",
    "Edit",
    "Interventions",
    "Layout",
    "Note",
    "Op",
    "Placement",
    "Program",
    "Prompt",
    "Scope",
    "Spectrum",
    "Waves",
    "actions",
    "activation_ops",
    "attention_ops",
    "compile_interventions",
    "compile_programs",
    "find_word",
    "frequency_ops",
    "has_interventions",
    "latent_ops",
    "lint",
    "load_plugins",
    "loaded_plugins",
    "measuring_steps",
    "noise_floor",
    "op",
    "ops",
    "ops_table",
    "placement_ops",
    "region_ops",
    "region_prompts",
    "score_ops",
    "shifted",
    "sources_of",
    "split_resample",
    "tables",
    "where_table",
    "window_ops",
    "with_sources",
    "without_regions",
]
