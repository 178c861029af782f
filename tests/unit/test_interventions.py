"""`inject` and `ablate` as users write them: in `generate` and in an experiment, with right and wrong arguments."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

import fluxlab
from fluxlab.config import config_folder
from fluxlab.errors import UserError
from fluxlab.experiment.cells import batches, cells, references
from fluxlab.experiment.sources import numbered, with_sources_of
from fluxlab.positions import Program, compile_interventions, compile_programs, lint
from fluxlab.positions.activation_ops import inject
from fluxlab.positions.at_step import sequence
from fluxlab.positions.patching import Action, Patch
from fluxlab.probes import Probe
from tests import families
from tests.stores import settings

TEXT, PROMPTS = 24, ("a red cat holding a sign", "the blue fox on the left")
KEYS = {"op": "inject", "source": 0, "what": ["keys", "values"]}


@pytest.fixture(scope="module", params=families.NAMES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    return families.load(family)


def latents(pipe, *programs, prompts=PROMPTS, seeds=3, size=(16, 24), **more):
    more = {"steps": 2, "max_sequence_length": TEXT, "output": "latent", **more}
    return pipe.generate(
        list(prompts), seeds, programs=[p and {"a": p} for p in programs], height=size[0], width=size[1], **more
    )


def test_everything_from_a_cell_is_that_cell(pipe):
    x = latents(pipe, None, {"op": "inject", "source": 0, "what": "all"})
    assert (x[1] - x[0]).abs().max() <= 1e-5 * x[0].std()
    assert (latents(pipe, None, None)[1] - x[0]).abs().max() > 1e-2 * x[0].std()


def test_the_residual_of_a_cell_with_another_program_is_that_cell(pipe):
    half = {"op": "scale", "factor": 0.5}
    x = latents(pipe, half, {"op": "inject", "source": 0, "what": "residual"}, prompts=PROMPTS[:1])
    assert (x[1] - x[0]).abs().max() <= 1e-5 * x[0].std()


@pytest.mark.parametrize(
    "nothing",
    [{"strength": 0}, {"strength": {"from": 0, "to": 0}}, {"what": "velocity", "strength": 0}],
)
def test_nothing_from_a_cell_changes_no_bit(pipe, nothing):
    assert torch.equal(latents(pipe, None, {**KEYS, **nothing}), latents(pipe, None, None))


def test_the_source_and_other_samples_do_not_change(pipe):
    prompts = (*PROMPTS, PROMPTS[0])
    x = latents(pipe, None, {**KEYS, "mode": "append"}, None, prompts=prompts, seeds=[1, 2, 3])
    plain = latents(pipe, None, None, None, prompts=prompts, seeds=[1, 2, 3])
    for i in (0, 2):
        assert (x[i] - plain[i]).abs().max() <= 1e-5 * plain.std()
    assert (x[1] - plain[1]).abs().max() > 1e-4 * plain.std()


def test_appending_a_copy_of_the_own_keys_changes_rounding_only(pipe):
    """Each key twice: the softmax halves every weight."""
    x = latents(pipe, None, {**KEYS, "mode": "append"}, prompts=PROMPTS[:1])
    assert (x[1] - x[0]).abs().max() <= 1e-4 * x.std()


def test_keys_before_rotation_turn_at_their_new_place(pipe):
    """With equal ids, before and after are the same; when the target's ids are scaled they are not."""
    both = [latents(pipe, None, {**KEYS, "rotation": rotation}) for rotation in ("before", "after")]
    assert (both[0] - both[1]).abs().max() <= 1e-5 * both[0].std()
    scaled = {"s": {"op": "scale", "factor": 2}}
    far = []
    for rotation in ("before", "after"):
        program = Program.from_config({**scaled, "a": {**KEYS, "rotation": rotation}})
        far.append(
            pipe.generate(
                list(PROMPTS), 3, programs=[None, program], height=16, width=24, steps=2, output="latent",
                max_sequence_length=TEXT,
            )
        )  # fmt: skip
    assert (far[0] - far[1]).abs().max() > 1e-5


@pytest.mark.parametrize("mode", ["replace", "append"])
@pytest.mark.parametrize("rotation", ["before", "after"])
def test_next_to_keys_that_groups_of_queries_see_apart(pipe, rotation, mode):
    """Another sample's `seen_by` splits the attention of the whole batch; the edited sample keeps its image."""
    edit = {**KEYS, "rotation": rotation, "mode": mode}
    grouped = {"op": "zero", "side": "keys", "seen_by": "text"}
    prompts = (*PROMPTS, PROMPTS[0])
    with_groups = latents(pipe, None, edit, grouped, prompts=prompts)
    without = latents(pipe, None, edit, None, prompts=prompts)
    assert (with_groups[1] - without[1]).abs().max() <= 1e-4 * without.std()


def test_a_chain_takes_what_its_source_became(pipe):
    """The third takes from the second, which takes everything from the first, although it is listed first."""
    everything = {"op": "inject", "what": "all"}
    prompts = (*PROMPTS, "the dog")
    x = latents(pipe, {**everything, "source": 1}, {**everything, "source": 2}, None, prompts=prompts)
    assert (x[0] - x[2]).abs().max() <= 1e-5 * x.std()


def test_match_finds_a_shuffled_copy(pipe):
    """Hidden states of the image moved to other tokens: `match` finds them again."""
    torch.manual_seed(0)
    x = torch.randn(2, 10, 8)
    order = torch.randperm(10)
    x[1] = 3 * x[0][order]
    tokens = torch.arange(10)
    action = Action(None, {"map": "match"}, (), 1, 0, tokens, tokens, None, None, 1.0, "a")
    patch = Patch([action], (None, None))
    patch("input", x)
    assert torch.equal(patch._theirs[id(action)], order)


def test_stretch(pipe):
    edit = {**KEYS, "tokens": {"box": [0, 0, 4, 6]}, "from": {"box": [0, 0, 2, 3]}, "map": "stretch"}
    chosen = [n // 2 // 1 * 6 + m // 2 for n in range(4) for m in range(6)]
    given = {**KEYS, "tokens": "image", "from": "image", "map": chosen}
    assert torch.equal(latents(pipe, None, edit), latents(pipe, None, given))


def test_words_are_found_in_their_own_prompts(pipe, family):
    word = {"indices": [families.FIRST[family] + 2], "of": "text"}
    edit = {**KEYS, "tokens": {"words": ["fox"]}, "from": {"words": ["cat"]}}
    numbers = {**KEYS, "tokens": word, "from": word}
    assert torch.equal(latents(pipe, None, edit), latents(pipe, None, numbers))


def test_with_true_cfg_both_passes_are_patched(pipe):
    x = latents(pipe, None, {"op": "inject", "source": 0, "what": "all"}, true_cfg=3.0)
    assert (x[1] - x[0]).abs().max() <= 1e-4 * x[0].std()
    latents(pipe, None, {**KEYS, "tokens": {"words": ["fox"]}, "from": {"words": ["cat"]}}, true_cfg=3.0)


def test_a_probe_reads_attention_and_activations_after_the_edits(pipe):
    probe = Probe({"r": {"kind": "activation", "site": "residual"}, "m": {"kind": "map", "from": "all", "to": "all"}})
    plain = latents(pipe, None, {**KEYS, "mode": "append"})
    assert torch.equal(latents(pipe, None, {**KEYS, "mode": "append"}, probe=probe), plain)
    p = probe.arrays["m"].values
    assert np.allclose(p[0].sum(-1), 1, atol=1e-5)
    assert p[1].sum(-1).max() < 0.99  # the rest is on appended keys
    probe = Probe({"r": {"kind": "activation", "site": "residual"}})
    latents(pipe, None, {"op": "inject", "source": 0, "what": "residual", "blocks": 1}, probe=probe)
    r = probe.arrays["r"].values
    assert np.array_equal(r[0, :, 1], r[1, :, 1])
    assert not np.array_equal(r[0, :, 0], r[1, :, 0])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"op": "inject", "source": 0, "what": "key"}, "what: 'key', expected a site: input, .*; did you mean keys"),
        ({"op": "inject", "source": 0}, "what: missing, inject needs it"),
        ({"op": "inject", "what": "keys"}, "source: missing"),
        ({**KEYS, "source": 2}, "source: 2, expected a sample of this batch below 2"),
        ({**KEYS, "source": "baseline"}, "source: .*in generate.. give the number of a sample"),
        ({**KEYS, "source": {"variants": "a"}}, "unknown key of a source.*did you mean variant"),
        ({**KEYS, "what": "residual", "heads": 0}, r"heads: \[0\], but residual has no heads"),
        ({**KEYS, "what": "keys", "mode": "append"}, r"what: .*expected \[keys, values\] with mode: append"),
        ({**KEYS, "what": "residual", "seen_by": "text"}, "seen_by: only for keys and values"),
        ({**KEYS, "what": "values", "rotation": "before"}, "nothing is rotated"),
        (
            {**KEYS, "tokens": {"box": [0, 0, 2, 2]}, "from": {"box": [0, 0, 4, 4]}},
            "map: tokens selects 2 × 2 and from 4 × 4 tokens; add map: stretch, map: match, or a list",
        ),
        ({**KEYS, "tokens": {"box": [0, 0, 1, 4]}, "from": {"box": [0, 0, 4, 1]}}, "1 × 4 and from 4 × 1"),
        ({**KEYS, "from": "image", "tokens": "image", "map": [0, 1]}, "2 numbers, expected one for each of the 24"),
        ({**KEYS, "map": "near"}, "map: 'near', expected same, stretch, match or a list"),
        ({**KEYS, "tokens": "text", "from": "text", "map": "stretch"}, "stretch needs tokens and from that fill"),
        ({**KEYS, "blocks": 9}, "blocks: 9, expected a block below [45]"),
        ({"op": "ablate", "what": "keys"}, "what: 'keys', expected a site: attention, mlp, or all"),
        ({"op": "ablate", "what": "mlp", "seen_by": "text"}, "seen_by: a key of inject"),
        ({"op": "inject", "source": 0, "what": "velocity", "blocks": 1}, "velocity is the output of the whole model"),
    ],
)
def test_errors_are_one_line(pipe, edit, message):
    with pytest.raises(UserError, match=message) as error:
        latents(pipe, None, edit)
    assert len(str(error.value).splitlines()) == 1


def test_samples_that_take_from_each_other(pipe):
    with pytest.raises(UserError, match=r"source: samples .* inject into each other"):
        latents(pipe, {**KEYS, "source": 1}, {**KEYS, "source": 0})


# ---- in an experiment


HALF = {"a": {"op": "scale", "factor": 0.5}}
TAKES = {"a": {"op": "inject", "source": "half", "what": "residual"}}


def experiment(variants, prompts=("a red cat", "the blue fox"), seeds=(0, 1)):
    return fluxlab.make_experiment(list(prompts), variants, list(seeds), identify=False)


def test_a_cell_meets_its_source_in_every_batch():
    many = {f"v{i}": {"a": {**KEYS, "source": "baseline", "blocks": i}} for i in range(4)}
    asked = experiment({"half": HALF, "takes": TAKES, **many})
    for images in range(1, 12):
        how = settings(batch_tokens=280 * images, tokens=280)
        made = cells(asked, how)
        parts = batches(made, how)
        assert sorted(c.key for part in parts for c in part) == sorted({c.key for c in made})
        for part in parts:
            together = with_sources_of(part)
            assert len(together) <= max(images, 2)
            keys = [cell.key for cell in together]
            for cell, program in zip(together, numbered(together), strict=True):
                for edit, source in zip(program.edits, cell.sources, strict=False):
                    assert edit.op == "scale" or keys[edit.arguments["source"]["sample"]] == source.key


def test_batches_without_sources_are_as_before():
    asked, how = experiment({"half": HALF}), settings(batch_tokens=280 * 3, tokens=280)
    made = cells(asked, how)
    assert batches(made, how) == [made[:3], made[3:6], made[6:]]


def test_a_key_depends_on_what_the_source_does_and_not_on_its_name():
    how = settings(tokens=280)

    def key(source, variants):
        edit = {"a": {"op": "inject", "source": source, "what": "keys"}}
        made = cells(experiment({**variants, "takes": edit}), how)
        return next(cell.key for cell in made if cell.variant == "takes")

    half = key("half", {"half": HALF})
    assert half == key("renamed", {"renamed": HALF}) == key({"variant": "half"}, {"half": HALF})
    assert half != key("half", {"half": {"a": {"op": "scale", "factor": 0.6}}})
    assert half != key("baseline", {"half": HALF})
    assert half != key({"variant": "half", "seed": 1}, {"half": HALF})


def test_a_source_may_be_another_prompt_or_seed():
    asked = experiment({"takes": {"a": {**KEYS, "source": {"prompt": "the blue fox", "seed": 1}}}})
    made = [cell for cell in cells(asked, settings(tokens=280)) if cell.variant == "takes"]
    assert all((c.sources[0].variant, c.sources[0].prompt, c.sources[0].seed) == ("baseline", "the blue fox", 1)
               for c in made)  # fmt: skip
    assert references(asked, settings(tokens=280))


def test_a_source_may_be_the_next_prompt_and_seed():
    prompts, seeds = ("a red cat", "the dog", "the fox"), (5, 7, 9)

    def taking(source):
        made = cells(experiment({"takes": {"a": {**KEYS, "source": source}}}, prompts, seeds), settings(tokens=280))
        return [cell for cell in made if cell.variant == "takes"]

    made = taking({"prompt": {"next": 1}, "seed": {"next": -1}})
    found = {(cell.prompt, cell.seed): (cell.sources[0].prompt, cell.sources[0].seed) for cell in made}
    assert len(found) == 9
    assert found["a red cat", 7] == ("the dog", 5)
    assert found["the fox", 5] == ("a red cat", 9)
    named = {cell.key for cell in taking({"prompt": "the dog", "seed": 5})}
    assert [cell.seed for cell in made if cell.key in named] == [7]  # a key has the source, however it is written


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (
            {"a": {"e": {**KEYS, "source": {"prompt": {"next": 2}}}}},
            "source.prompt.next: 2 is the cell's own prompt: .* 2 in all",
        ),
        ({"a": {"e": {**KEYS, "source": {"seed": {"after": 1}}}}}, "source.seed: .*after.* expected {next: 1}"),
        ({"a": {"e": {**KEYS, "source": {"prompt": {"next": 0.5}}}}}, "prompt.next: 0.5, expected a whole number"),
        ({"a": {"e": {**KEYS, "source": "halv"}}, "half": HALF}, "variants.a.e.source: variant 'halv' .*mean half"),
        ({"a": {"e": {**KEYS, "source": {"prompt": "a dog"}}}}, "prompt 'a dog' is not in the experiment"),
        ({"a": {"e": {**KEYS, "source": {"seed": 7}}}}, "seed 7 is not in the experiment, expected 0, 1"),
        ({"a": {"e": {**KEYS, "source": 0}}}, "source: 0 is a sample of a batch, expected a variant"),
        (
            {"a": {"e": {**KEYS, "source": "b"}}, "b": {"e": {**KEYS, "source": "a"}}},
            "variants.b.e.source: a → b take from each other",
        ),
    ],
)
def test_wrong_sources(variants, message):
    with pytest.raises(UserError, match=message) as error:
        experiment(variants)
    assert len(str(error.value).splitlines()) == 1


def test_no_note_says_that_an_intervention_changes_nothing():
    program = Program.from_config({"a": {**KEYS, "source": "half"}, "b": {"op": "ablate", "what": "mlp"}})
    assert lint(program, sequence()) == []


PRESETS = [
    "freeflux_non_rigid",
    "freeflux_add_object",
    "freeflux_background",
    "addit",
    "characonsist",
    "personalize_anything",
    "stable_flow",
    "inject",
    "ablate",
]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_flux(name):
    text = (config_folder() / "op" / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 15
    edit = yaml.safe_load(text)
    edit |= {"source": 0} if "source" in edit else {}
    run = sequence()
    programs = [Program(), Program.from_config({"a": edit})]
    interventions = compile_interventions(programs, run, 2)
    tables = [(compile_programs([Program()], run).at(1.0).rotary,) * 2] * run.blocks
    assert interventions.at(0, 1.0, tables)


def test_appended_values_keep_their_length(pipe):
    """With keys of length 0, added keys all have score 0: their values count as they are."""
    appended = {**KEYS, "mode": "append", "factor": 0}
    x = latents(pipe, None, appended)
    assert (x[1] - latents(pipe, None, {**appended, "factor": 1})[1]).abs().max() > 1e-5
    given = {"source": {"sample": 0}, "what": ["keys", "values"], "map": "same", "rotation": "after"}
    given |= {"mode": "append", "factor": 0.0}
    action = Action(inject, given, ("keys", "values"), 1, 0, torch.arange(3), torch.arange(3), None, None, 1.0, "a")
    patch = Patch([action], (None, None))
    v = torch.randn(2, 1, 5, 4)
    patch("values", v)
    (view,) = patch._views.values()
    assert torch.equal(view.parts["values"], v[0][:, :3])


def test_programs_round_trip():
    program = Program.from_config({"a": {**KEYS, "source": {"prompt": "a", "seed": 1.0}, "from": "image", "factor": 2}})
    assert Program.from_config(yaml.safe_load(yaml.safe_dump(program.to_config()))).digest == program.digest
    assert Program.from_config(json.loads(json.dumps(TAKES))).describe().startswith("inject source variant half")
    assert "what" in Program.from_config({"a": {"op": "ablate", "what": "all"}}).to_config()["a"]


def test_a_run_stores_the_source_image_for_the_patched_cell(tmp_path):
    asked = fluxlab.make_experiment(
        "a red cat on the left", {"half": HALF, "takes": TAKES}, 2, sampling=fluxlab.Sampling(steps=2)
    )
    for tokens in (280, 280 * 8):
        run = fluxlab.run_experiment(asked, tmp_path / str(tokens), batch_tokens=tokens)
        for seed in (0, 1):
            pixels = [np.asarray(run.open(v, run.places[0][0], seed)).astype(int) for v in ("half", "takes")]
            assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert replace(asked).digest == asked.digest
