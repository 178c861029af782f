"""The sites of a block against forward hooks on Diffusers' modules, in one forward of a random checkpoint."""

import pytest
import torch
from einops import rearrange

from fluxlab.checkpoints import load_transformer
from fluxlab.model.rope import rotary_table
from fluxlab.model.sites import OF_HEADS, SITES, Observed, Site, unrotate
from fluxlab.sampling import image_ids, text_ids
from tests import tiny

TEXT, GRID, DOUBLE, BLOCKS, BATCH = 7, (3, 4), 2, 4, 2


@pytest.fixture(scope="module")
def theirs():
    return tiny.diffusers_pipeline(guidance=False).transformer.double()


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer")
    theirs.save_pretrained(folder)
    return load_transformer(folder).double()


@pytest.fixture(scope="module")
def inputs(ours):
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    p = ours.params
    x, txt, y = draw(BATCH, 12, p.in_channels), draw(BATCH, TEXT, p.context_in_dim), draw(BATCH, p.vec_in_dim)
    return x, txt, y, torch.tensor([0.7, 0.3], dtype=torch.float64)


def table(ours):
    ids = torch.cat((text_ids(1, TEXT), image_ids(1, *GRID)), 1).double()
    return rotary_table(ids, ours.params.axes_dim, ours.params.theta)


class Hooks:
    """Every site of Diffusers' blocks, by (block, name), from forward hooks; queries and keys are not rotated."""

    def __init__(self, model):
        self.found, self.parts = {}, {}
        for n, block in enumerate(model.transformer_blocks):
            block.register_forward_pre_hook(self.arguments(n), with_kwargs=True)
            block.register_forward_hook(lambda m, i, out, n=n: self.put(n, "residual", torch.cat(out, 1)))
            for name, text, image in (
                ("queries", block.attn.norm_added_q, block.attn.norm_q),
                ("keys", block.attn.norm_added_k, block.attn.norm_k),
                ("values", block.attn.add_v_proj, block.attn.to_v),
                ("mlp", block.ff_context, block.ff),
            ):
                for part, module in enumerate((text, image)):
                    module.register_forward_hook(self.half(n, name, part))
            block.attn.to_add_out.register_forward_pre_hook(
                lambda m, x, n=n: self.half(n, "attention", 0)(m, None, x[0])
            )
            block.attn.to_out[0].register_forward_pre_hook(
                lambda m, x, n=n: self.half(n, "attention", 1)(m, None, x[0])
            )
        for n, block in enumerate(model.single_transformer_blocks, len(model.transformer_blocks)):
            block.register_forward_pre_hook(self.arguments(n), with_kwargs=True)
            block.register_forward_hook(lambda m, i, out, n=n: self.put(n, "residual", torch.cat(out, 1)))
            for name, module in (
                ("queries", block.attn.norm_q),
                ("keys", block.attn.norm_k),
                ("values", block.attn.to_v),
                ("attention", block.attn),
                ("mlp", block.act_mlp),
            ):
                module.register_forward_hook(lambda m, i, out, n=n, name=name: self.put(n, name, out))

    def put(self, block, name, x):
        if name in OF_HEADS:
            x = rearrange(x, "B N (H d) -> B H N d", H=2) if x.ndim == 3 else x.transpose(1, 2)
        self.found[block, name] = x

    def half(self, block, name, part):
        def hook(module, inputs, out):
            self.parts[block, name, part] = out
            if {(block, name, 0), (block, name, 1)} <= set(self.parts):
                self.put(block, name, torch.cat([self.parts[block, name, half] for half in (0, 1)], 1))

        return hook

    def arguments(self, block):
        def hook(module, args, kwargs):
            self.found[block, "input"] = torch.cat((kwargs["encoder_hidden_states"], kwargs["hidden_states"]), 1)

        return hook


@pytest.fixture(scope="module")
def hooked(theirs, inputs):
    x, txt, y, t = inputs
    hooks = Hooks(theirs)
    with torch.no_grad():
        out = theirs(
            hidden_states=x,
            encoder_hidden_states=txt,
            pooled_projections=y,
            timestep=t,
            img_ids=image_ids(1, *GRID)[0].double(),
            txt_ids=text_ids(1, TEXT)[0].double(),
            return_dict=False,
        )[0]
    return hooks.found, out


def forward(ours, inputs, sites=None):
    x, txt, y, t = inputs
    with torch.no_grad():
        return ours(x, None, txt, None, t, y, rotary=table(ours), sites=sites)


@pytest.fixture(scope="module")
def observed(ours, inputs):
    found = {}
    sites = [Observed(lambda name, x, n=n: found.update({(n, name): x.clone()})) for n in range(BLOCKS)]
    return found, forward(ours, inputs, sites)


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_against_hooks(name, block, ours, hooked, observed):
    found, expected = observed[0][block, name], hooked[0][block, name]
    if name in ("queries", "keys"):
        found = unrotate(found, table(ours))
    assert found.shape == expected.shape
    # Diffusers computes the sinusoids of the timestep in fp32
    assert (found - expected).abs().max() <= 1e-5 * expected.std()


def test_all_sites_in_order(observed):
    assert list(observed[0]) == [(block, name) for block in range(BLOCKS) for name in SITES]


def test_observing_changes_no_bit(ours, inputs, observed):
    plain = forward(ours, inputs)
    assert torch.equal(plain, observed[1])
    assert torch.equal(plain, forward(ours, inputs, [Site(), None, Site(), None]))


@pytest.mark.parametrize("name", SITES)
def test_a_change_reaches_the_output(name, ours, inputs):
    class Doubled(Site):
        def __call__(self, at, x):
            return 2 * x if at == name else x

    for block in range(BLOCKS):
        sites = [Doubled() if n == block else None for n in range(BLOCKS)]
        assert (forward(ours, inputs, sites) - forward(ours, inputs)).abs().max() > 1e-6
