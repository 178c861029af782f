"""The published experiments: each composes, has a header, and its programs fit the embedded model and FLUX.1."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fluxlab import sampling, scenes
from fluxlab.compose import compose
from fluxlab.config import config_folder
from fluxlab.experiment.each import expanded
from fluxlab.model.varied import Varied
from fluxlab.positions import (
    Compiled,
    Context,
    Layout,
    Program,
    Prompt,
    compile_programs,
    has_interventions,
    split_resample,
)
from fluxlab.positions.picked import example
from fluxlab.positions.waves import unchanged
from fluxlab.run import RunConfig

OF_OTHERS = ("atlas", "attribution")
"""Experiments of `python -m fluxlab.attribution`; those of `python -m fluxlab.learn` begin with learn_."""

NAMES = sorted(
    file.stem
    for file in (config_folder() / "exp").glob("*.yaml")
    if not file.stem.startswith("learn_") and file.stem not in OF_OTHERS
)
PRESETS = [
    "extrapolate",
    "extrapolate_2x",
    "attention_sinks",
    "extrapolate_attention",
    "extrapolate_attention_2x",
    "infinity_rope",
    "mixed_resolution",
    "ropecraft",
    "untwisting_rope",
    "freeflux_probe",
    "frequencies",
    "layouts",
    "text_attention",
]
OF_TASKS = ("inpaint", "upscale", "upscale_beyond")  # their variants differ in tasks: test_tasks.py
STUDIES = [name for name in NAMES if name not in ("hello", *OF_TASKS)]
OF_FLUX2 = ("text_order",)  # its axis is not in FLUX.1; test_experiments.py runs it on tiny2
UNCHANGED = {("dose_response", "x1"), ("zero", "text")}  # controls with the ids of the baseline


def file_of(name: str) -> Path:
    return config_folder() / "exp" / f"{name}.yaml"


def composed(name: str, *overrides: str) -> RunConfig:
    return compose("config", RunConfig, "schema", [f"+exp={name}", "model=schnell", *overrides])


@cache
def experiment(name: str) -> RunConfig:
    return composed(name)


def programs(config: RunConfig) -> dict[str, Program]:
    variants = expanded(config.variants, 6)  # the blocks of the embedded model
    return {name: Program.from_config(edits, f"variants.{name}") for name, edits in variants.items()}


def varies(compiled: Compiled, sigma: float) -> bool:
    """Return whether scores are multiplied, or attention is averaged over windows."""
    rotary = compiled.at(sigma).rotary
    return isinstance(rotary, list) and any(isinstance(keys, Varied) for _, keys in rotary)


def resolved(config: RunConfig, context: Context) -> dict[str, Program]:
    """Return the programs, with random tokens in place of those that a probe picks."""
    return {name: example(program, context.layout) for name, program in programs(config).items()}


def count_images(config: RunConfig) -> int:
    return len(programs(config)) * len(config.prompts) * config.seeds


def contexts(prompt: str, enlarge: float = 1, references: int = 0) -> list[Context]:
    """Return contexts of the embedded model (20 steps) and of FLUX.1 schnell (57 blocks, 64 × 64 tokens, 4 steps).

    references: number of reference images, of 3/4 of the image's height and its width.
    """
    spans = tuple(match.span() for match in re.finditer(r"\w+", prompt))
    made = []
    for text, side, axes, double, single, heads, steps in (
        (24, 16, (8, 28, 28), 2, 4, 3, 20),
        (256, 64, (16, 56, 56), 19, 38, 24, 4),
    ):
        trained, side = (side, side), round(enlarge * side)
        grids = [(side, side), *[(side * 3 // 4, side)] * references]
        parts = [sampling.image_ids(1, *grid) + torch.tensor([k, 0, 0]) for k, grid in enumerate(grids)]
        ids = torch.cat((sampling.text_ids(1, text), *parts), 1)
        named = [Prompt(prompt, spans)]
        sigmas = [1 - i / steps for i in range(steps + 1)]
        layout = Layout(text, grids[0], tuple(grids[1:]))
        made.append(Context(ids, layout, axes, 10000, double, single, heads, sigmas, named, trained, text))
    return made


def test_the_published_experiments_exist():
    assert {
        "article",
        "attention",
        "axis0",
        "dose_response",
        "hello",
        "layer_probe",
        "offset",
        "scale",
        "step_window",
        "text_relocation",
        "zero",
    } <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_header_name_and_caption(name):
    config, lines = experiment(name), file_of(name).read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python -m fluxlab.run +exp={name} ")
    assert config.name == name
    assert 0 < len(config.caption) <= 80
    assert config.caption not in [experiment(other).caption for other in NAMES if other != name]
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", STUDIES)
def test_the_header_states_the_number_of_images(name):
    config, header = experiment(name), file_of(name).read_text().partition("\nname:")[0]
    assert lines_with(header, f"# {count_images(config)} images, about ") == 1
    assert lines_with(header, "# grid.png: ") == 1
    most = {"trace": 2880, "relocation": 4832}.get(name, 2880 if name.startswith("methods") else 100)
    assert 24 <= count_images(config) <= most
    assert all(scenes.parse(prompt).thing for prompt in config.prompts)  # what the embedded model was trained on
    assert len(set(config.prompts)) == len(config.prompts)


def lines_with(text: str, start: str) -> int:
    return sum(line.startswith(start) for line in text.splitlines())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_methods_are_short(name):
    assert len(file_of(name).read_text().splitlines()) <= 15


@pytest.mark.parametrize("name", STUDIES)
def test_variants_are_programs_that_differ(name):
    config = experiment(name)
    found = programs(config)
    assert next(iter(found)) == config.baseline == "baseline"
    assert found["baseline"] == Program()
    assert len({program.digest for program in found.values()}) == len(found) > 2
    for variant, program in found.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", variant), "must work as a key on the command line"
        assert Program.from_config(program.to_config()) == program


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in OF_FLUX2])
def test_programs_fit_both_models_and_move_something(name):
    config = experiment(name)
    for prompt in config.prompts:
        tiny, flux = contexts(prompt, config.enlarge or 1, len(config.references or ()))
        own = {side: compile_programs([Program()], tiny).side_table(1.0, side).cos for side in ("queries", "keys")}
        on_flux = resolved(config, flux)
        for variant, program in resolved(config, tiny).items():
            if prompt == config.prompts[0] or program.names_words:
                compile_programs([on_flux[variant]], flux)  # every step, block, word and place is there
            compiled = compile_programs([program], tiny)
            moved = (
                split_resample(program)[1] is not None
                or has_interventions(program)
                or any(
                    not torch.equal(compiled.ids(sigma, block, side), tiny.ids[0])
                    or not compiled.waves(sigma, block, side).equals(unchanged(tiny))
                    or compiled.at(sigma).mask is not None
                    or varies(compiled, sigma)
                    or not torch.equal(compiled.side_table(sigma, side, block, query=30).cos, own[side])
                    for sigma in tiny.sigmas[:-1:5]  # of each quarter
                    for block in range(tiny.blocks)
                    for side in ("queries", "keys")
                )
            )
            assert moved == (variant != "baseline" and (name, variant) not in UNCHANGED), variant


def test_the_article():
    config = experiment("article")
    assert config.prompts[0] == "A cat holding a sign that says hello world"
    tiny, _ = contexts(config.prompts[0])
    text, image = tiny.ids[0, :24], tiny.ids[0, 24:]
    expected = {
        "baseline": image,
        "zero": image * 0,
        "half": image * 0.5,
        "double": image * 2,
        "stretch": image * 1.2,
        "axis0": image + torch.tensor([1.0, 0, 0]),
    }
    found = programs(config)
    assert list(found) == list(expected)
    for name, program in found.items():
        assert torch.equal(compile_programs([program], tiny).ids(), torch.cat((text, expected[name]))), name


def test_factors_of_dose_response():
    found = experiment("dose_response").variants
    assert [found[name]["a"]["factor"] for name in found if name != "baseline"] == [i / 8 for i in range(25)]
    for name in set(found) - {"baseline"}:
        assert float(name.removeprefix("x").replace("_", ".")) == found[name]["a"]["factor"]


def test_variants_can_be_overridden():
    config = composed("dose_response", "variants.x0_125.a.factor=0.2", "~variants.x3", "+variants.b={a:{op:zero}}")
    assert config.variants["x0_125"]["a"]["factor"] == 0.2
    assert "x3" not in config.variants
    assert programs(config)["b"] == Program.from_config({"a": {"op": "zero"}})


def test_layer_probe_extends_to_every_block_of_flux():
    """The header has a shell line for it."""
    loop = re.search(r"\$\((for .*)\)$", file_of("layer_probe").read_text(), re.MULTILINE)[1]
    more = subprocess.run(["sh", "-c", loop], capture_output=True, text=True, check=True).stdout.split()
    found = programs(composed("layer_probe", *more))
    assert len(found) == 4 + 57
    for block in range(57):
        assert found[f"block_{block}"] == Program.from_config({"a": {"op": "zero", "side": "keys", "blocks": block}})
    tiny, flux = contexts("a cat")
    assert compile_programs([found["block_56"]], flux)
    with pytest.raises(ValueError, match=r"variants\.block_6\.a\.blocks: 6, expected a block below 6"):
        compile_programs([found["block_6"]], tiny)


@pytest.mark.parametrize("name", NAMES)
def test_files_contain_known_keys_only(name):
    assert set(OmegaConf.load(file_of(name))) <= {
        "defaults",
        "name",
        "caption",
        "prompts",
        "seeds",
        "variants",
        "enlarge",
        "references",
        "steps",
        "task",
        "scenes",
    }


def test_the_attention_experiment_captures_words():
    assert experiment("attention").capture["words"]["kind"] == "words"
    assert "words" not in composed("attention", "capture=none").capture
    assert all(is_held_out(prompt) for prompt in experiment("attention").prompts)


def is_held_out(prompt: str) -> bool:
    """Whether no training scene has the caption's combination."""
    wanted = scenes.parse(prompt)
    thing = scenes.Thing(wanted.thing, wanted.colour, wanted.place, 0, 0, 20)
    return scenes.held_out(scenes.Scene((64, 64), "mist", (thing,), None, scenes.Sign(wanted.sign, 0, 0, (0, 0, 0))))


def test_mixed_resolution_is_in_the_spacing_of_the_query():
    """CRPA: as any query sees it, a distance is that in the image over the spacing of the query's own grid."""
    image, small, text = (6, 8), (3, 4), 2
    parts = [sampling.text_ids(1, text), sampling.image_ids(1, *image), sampling.image_ids(1, *small)]
    parts[2][..., 0] = 1
    context = Context(torch.cat(parts, 1), Layout(text, image, (small,)), (4, 6, 6), 10000, 1, 1, 2, trained=image)
    compiled = compile_programs([programs(experiment("mixed_resolution"))["crpa"]], context)
    centres = [
        ((r + 0.5) * s, (c + 0.5) * s)
        for (rows, cols), s in ((image, 1), (small, 2))
        for r in range(rows)
        for c in range(cols)
    ]
    spacing = [1] * 48 + [2] * 12
    queries = compiled.ids(side="queries")
    for n in range(60):
        keys = compiled.ids(side="keys", query=text + n)
        expected = [((r - centres[n][0]) / spacing[n], (c - centres[n][1]) / spacing[n]) for r, c in centres]
        apart = keys[text:, 1:] - queries[text + n, 1:]
        assert torch.allclose(apart, torch.tensor(expected), atol=1e-5)
        assert not keys[:, 0].any()


def test_untwisting_gains():
    """hi + (lo - hi)·(i/(n - 1))² on rows and columns, lo on the index, of the reference's keys alone; 2602.05013."""
    _, flux = contexts("a red fox on the left holding a sign that says open cafe", references=1)
    compiled = compile_programs([programs(experiment("untwisting_rope"))["fading"]], flux)
    start = flux.layout.range(2)[0]
    for sigma in (1.0, 0.75, 0.25):
        keys, queries = (compiled.waves(sigma, side=side).gain for side in ("keys", "queries"))
        expected = []
        for axis, width in enumerate(flux.axes_dim):
            for i in range(width // 2):
                whole = 0.5 + (1.3 - 0.5) * (i / (width // 2 - 1)) ** 2 if axis else 1.3
                expected.append(1 + sigma * (whole - 1))  # strength 1 → 0
        assert (queries == 1).all()
        assert (keys[:start] == 1).all()
        assert (keys[start:] - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12
