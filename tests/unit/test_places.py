"""`sine_cosine`: a table of positions added to the hidden states, as SD3 has it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxlab import batching
from fluxlab.errors import UserError
from fluxlab.model.sites import Site
from fluxlab.positions import Layout, Program, compile_interventions
from fluxlab.positions.places import sine_cosine_table
from tests import families

GRID, TEXT = (2, 3), 16
TABLE = {"op": "sine_cosine", "blocks": 0}
UNROTATED = {"op": "drop", "tokens": "all"}


@pytest.fixture(scope="module", params=families.NAMES)
def pipe(request):
    return families.load(request.param)


def by_hand(positions, width: int, base: float = 10000.0) -> np.ndarray:
    """Channel by channel, after Vaswani et al. (arXiv 1706.03762, 3.5), sines and cosines apart as in SD3."""
    quarter = width // 4
    table = np.zeros((len(positions), width))
    for n, (row, col) in enumerate(positions):
        for half, place in enumerate((col, row)):
            for i in range(quarter):
                angle = place / base ** (2 * i / (width / 2))
                table[n, half * 2 * quarter + i] = math.sin(angle)
                table[n, half * 2 * quarter + quarter + i] = math.cos(angle)
    return table


places = st.lists(st.tuples(*[st.floats(-50, 50)] * 2), min_size=1, max_size=4)


@given(places, st.integers(1, 9), st.floats(2, 1e5))
def test_the_table_is_that_of_the_formula(positions, quarters, base):
    table = sine_cosine_table(torch.tensor(positions, dtype=torch.float64), 4 * quarters, base)
    assert np.abs(table.numpy() - by_hand(positions, 4 * quarters, base)).max() < 1e-12


def test_the_table_of_a_grid_is_that_of_diffusers():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    rows, cols = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    table = sine_cosine_table(torch.stack((rows.flatten(), cols.flatten()), 1), 24)
    theirs = get_2d_sincos_pos_embed(24, 5, base_size=5, output_type="pt")
    assert (table - theirs).abs().max() < 1e-6


class Kept(Site):
    """Keeps what a block is given."""

    def __init__(self, inner: Site):
        self.inner, self.before, self.after = inner, None, None

    def __call__(self, name, x):
        if name != "input":
            return self.inner(name, x)
        self.before, self.after = x.clone(), self.inner(name, x)
        return self.after


def added(pipe, *programs) -> torch.Tensor:
    """Return what is added to the input of the first block, `(programs, tokens, width)`."""
    p = pipe.transformer.params
    layout = Layout(TEXT, GRID)
    run = batching.context(p, layout, (1.0, 0.5, 0.0), None, torch.device("cpu"), torch.float32, (4, 4), TEXT)
    programs = [Program.from_config(program) for program in programs]
    site = compile_interventions(programs, run, len(programs)).at(0, 1.0, [(None, None)] * run.blocks)[0]
    x = torch.randn(1, layout.tokens, p.hidden_size, generator=torch.Generator().manual_seed(0))
    x = x.repeat(len(programs), 1, 1)
    return site("input", x.clone()) - x


def test_it_is_added_to_image_tokens_where_the_edits_before_leave_them(pipe):
    width = pipe.transformer.params.hidden_size
    moves = {"a": {"op": "scale", "factor": 0.5}, "b": {"op": "offset", "by": [9, 1, -2], "strength": 0.5}}
    change = added(pipe, {"t": TABLE}, moves | {"t": TABLE}, {"t": TABLE} | moves, {"t": {**TABLE, "factor": 3}})
    grid = np.array([(row, col) for row in range(GRID[0]) for col in range(GRID[1])], float)
    wanted = [by_hand(grid, width), by_hand(grid * 0.5 + [0.5, -1], width), by_hand(grid, width)]
    wanted.append(3 * wanted[0])
    assert (change[:, :TEXT] == 0).all()
    assert np.abs(change[:, TEXT:].numpy() - np.array(wanted)).max() < 1e-5


def test_an_edit_that_acts_elsewhere_does_not_move_the_table(pipe):
    later = {"m": {"op": "scale", "factor": 2, "steps": [1]}, "t": TABLE}
    other = {"m": {"op": "scale", "factor": 2, "blocks": 1}, "t": TABLE}
    change = added(pipe, {"t": TABLE}, later, other)
    assert torch.equal(change[0], change[1])
    assert torch.equal(change[0], change[2])


def test_without_rotation_the_table_is_all_that_gives_places(pipe):
    """Without it, the velocity does not change if tokens exchange their places."""
    few = {"steps": 1, "height": 16, "width": 16, "max_sequence_length": TEXT, "output": "latent"}
    few |= {"latents": pipe.generate("a red cat", 0, **few)}
    count = few["latents"].shape[1]
    order = torch.arange(count).flip(0)
    for program, same in (({"u": UNROTATED}, True), ({"u": UNROTATED, "t": TABLE}, False)):
        one = pipe.generate("a red cat", programs=program, **few)
        two = pipe.generate("a red cat", programs=program, **few | {"latents": few["latents"][:, order]})
        assert ((one[:, order] - two).abs().max() < 1e-4 * one.std()) == same


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"t": {**TABLE, "base": 1}}, "t.base: 1, expected a number above 1"),
        ({"t": {**TABLE, "what": "keys"}}, "t.what: 'keys', expected a site: input, residual"),
        ({"t": {**TABLE, "heads": 0}}, "t.heads: [0], but input has no heads; leave it out"),
        ({"m": {"op": "zero", "side": "keys"}, "t": TABLE}, "m.side: hidden states have one position"),
        ({"m": {"op": "zero", "heads": 0}, "t": TABLE}, "m.heads: hidden states have one position"),
    ],
)
def test_what_it_cannot_do_names_the_key(pipe, edits, message):
    with pytest.raises(UserError) as caught:
        added(pipe, edits)
    assert message in str(caught.value)


def test_a_width_that_four_does_not_divide_names_the_edit():
    from fluxlab.positions.places import Places

    with pytest.raises(UserError, match=r"p\.t: hidden states are 6 wide"):
        Places(torch.zeros(1, 2), "p.t").table(6, 1e4, torch.zeros(1))
