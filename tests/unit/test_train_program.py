"""A recipe's program: it changes what is learned, as the same edit of a finished model would change its images."""

import copy
import json

import pytest
import torch

from fluxlab import scenes
from fluxlab.errors import UserError
from fluxlab.model import Rotary, rotary_table
from fluxlab.positions import Program
from fluxlab.positions.places import sine_cosine_table
from fluxlab.train import main
from fluxlab.training.nets import new_nets, table_for, tokens_of
from fluxlab.training.pool import draw_chunk
from fluxlab.training.program import convention_for, read_program
from fluxlab.training.recipe import Recipe
from fluxlab.training.transformer import flow_loss, optimizers
from fluxlab.training.update import update_for

GRID, LENGTH, BATCH = (3, 4), 6, 3
RECIPE = Recipe(
    hidden_size=64,
    depth=1,
    depth_single_blocks=1,
    t5_width=32,
    clip_width=32,
    text_layers=1,
    max_sequence_length=LENGTH,
)
PROGRAMS = {
    "index": {"a": {"op": "offset", "by": [1, 0, 0]}},
    "text_line": {"a": {"op": "text_line", "axis": "index"}},
    "sine_cosine": {"a": {"op": "sine_cosine", "blocks": 0}, "b": {"op": "drop", "tokens": "all"}},
}
MASKED = {"a": {"op": "mask", "from": "text", "to": "image"}, "b": {"op": "scale", "factor": 2, "blocks": 1}}


@pytest.fixture(scope="module")
def start():
    """Networks whose output depends on all their parts: new ones have zeros in the last layer."""
    nets, text = new_nets(RECIPE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in nets.transformer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    x = [torch.randn(BATCH, GRID[0] * GRID[1], 32, generator=generator) for _ in range(2)]
    batch = {"x0": x[0], "noise": x[1], "t": torch.tensor([0.2, 0.5, 0.9]), "weights": torch.ones(x[0].shape[:2])}
    return nets, batch | tokens_of(text, ["a red fox on the left", "a cat", ""], LENGTH)


def convention(nets, config):
    return convention_for(read_program(config), nets.transformer.params, LENGTH, GRID, "cpu")


def test_the_loss_is_that_of_ids_and_hidden_states_changed_by_hand(start):
    nets, batch = start
    p, dim = nets.transformer.params, LENGTH + GRID[0] * GRID[1]
    image = [(0.0, r, c) for r in range(GRID[0]) for c in range(GRID[1])]
    text = torch.zeros(LENGTH, 3)
    by_hand = {
        "index": torch.cat((text, torch.tensor(image) + torch.tensor([1.0, 0, 0]))),
        "text_line": torch.cat((text + torch.arange(LENGTH)[:, None] * torch.tensor([1.0, 0, 0]), torch.tensor(image))),
        "sine_cosine": torch.zeros(dim, 3),
    }
    table = sine_cosine_table(torch.tensor(image)[:, 1:], p.hidden_size).float()
    losses = {"none": flow_loss(nets, batch, table_for(p, LENGTH, GRID))[0].item()}
    for name, ids in by_hand.items():
        hook = nets.transformer.img_in.register_forward_hook(
            lambda module, given, out, name=name: out + table if name == "sine_cosine" else out
        )
        wanted = flow_loss(nets, batch, rotary_table(ids[None], p.axes_dim, p.theta))[0].item()
        hook.remove()
        losses[name] = flow_loss(nets, batch, convention(nets, PROGRAMS[name]))[0].item()
        assert losses[name] == pytest.approx(wanted, rel=1e-6)
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses)


@pytest.mark.parametrize("config", [*PROGRAMS.values(), MASKED])
def test_two_steps_with_a_program_give_other_weights(start, config):
    first, batch = start
    ends = []
    for given in ({}, {}, config):
        nets = copy.deepcopy(first)
        rates = {"muon_lr": 1e-3, "adam_lr": 1e-3, "text_lr": 1e-3}
        table = convention(nets, given) if given else table_for(nets.transformer.params, LENGTH, GRID)
        parameters = list(nets.parameters())
        update = update_for("cpu")(
            lambda batch, size, nets=nets, table=table: flow_loss(nets, batch, table),
            parameters,
            [p.detach().clone() for p in parameters],
            optimizers(nets, **rates),
            1.0,
        )
        for _ in range(2):
            assert update(GRID, batch, 1.0, 0.5)[0].isfinite()
        ends.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_an_empty_program_is_the_model_s_own_table(start):
    nets, _ = start
    own, made = table_for(nets.transformer.params, LENGTH, GRID), convention(nets, {})
    assert isinstance(made.rotary, Rotary)
    assert all(map(torch.equal, own, made.rotary))
    assert made.mask is None
    assert made.sites(2) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"a": {"op": "scael", "factor": 2}}, "program.a.op: 'scael'"),
        ({"a": {"op": "scale", "factor": "x"}}, "program.a.factor: 'x'"),
        ({"a": {"op": "zero", "steps": [0]}}, "program.a.steps: a training step has no place in a schedule"),
        ({"a": {"op": "zero", "strength": {"from": 1, "to": 0}}}, "program.a.strength: a training step has no place"),
        ({"a": {"op": "zero", "tokens": {"words": "fox"}}}, "program.a: names words"),
        ({"a": {"op": "dype"}}, "program.a.op: dype depends on the noise level"),
        ({"a": {"op": "inject", "source": "half", "what": "keys"}}, "program.a.op: inject, expected an op that"),
        ({"a": {"op": "resample"}}, "program.a.op: resample, expected an op that"),
    ],
)
def test_a_program_that_training_cannot_have_names_the_key(config, message):
    with pytest.raises(UserError) as caught:
        read_program(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["program={a: {op: scael}}"], "program.a.op: 'scael'"),
        (["program={a: {op: zero}}", "teacher=tiny"], "leave out program or teacher=tiny"),
        (["size=[32,36,3]"], "size=[32, 36, 3]: expected [height, width], both multiples of 4 from 32 to 80"),
        (["size=[32,32]", "things=false"], "multiples of 4 from 48 to 80"),
        (["two_words=0.5"], "two_words=0.5: with things=true there are no signs"),
    ],
)
def test_a_wrong_recipe_ends_in_one_line_and_exit_code_2(capsys, words, message):
    assert main(["+train=convention", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "configs/train" not in said


def test_a_wrong_program_in_a_file_names_the_file(capsys, monkeypatch):
    from fluxlab.training import program

    def wrong(config, path="program"):
        raise UserError(f"{path}.a.op: 'scael'")

    monkeypatch.setattr(program, "read_program", wrong)
    assert main(["+train=convention_index"]) == 2
    assert "configs/train/convention_index.yaml: program.a.op: 'scael'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", *(f"_{name}" for name in PROGRAMS)])
def test_the_recipes_differ_in_their_program_only(name):
    from fluxlab.train import _read

    base, recipe = _read(["+train=convention"]), _read([f"+train=convention{name}"])
    assert Program.from_config(recipe.program) == Program.from_config(PROGRAMS.get(name[1:]))
    recipe.program, recipe.name = base.program, base.name
    assert json.dumps(vars(recipe), default=vars) == json.dumps(vars(base), default=vars)


def test_scenes_of_things_have_one_thing_and_no_sign():
    drawn, images = draw_chunk(0, (32, 32), 0, 40, 0.0, False, things=True)
    assert images.shape == (40, 32, 32, 3)
    for scene in drawn:
        (thing,) = scene.things
        assert scene.sign is None
        assert scenes.place_of(thing.row, thing.col, scene.size) == thing.place
        assert thing.size in (12, 14)
    with pytest.raises(UserError, match="multiples of 4 from 32 to 80"):
        scenes.sample_thing(None, (28, 32))
