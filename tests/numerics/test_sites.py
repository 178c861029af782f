"""The sites of a block against forward hooks on Diffusers' modules, in one forward of a random checkpoint."""

import pytest
import torch
from einops import rearrange

from fluxlab.checkpoints import load_transformer
from fluxlab.families import family_of
from fluxlab.model.rope import rotary_table
from fluxlab.model.sites import OF_HEADS, SITES, Observed, Site, unrotate
from tests import families, tiny, tiny2

TEXT, GRID, BATCH = 7, (3, 4), 2


@pytest.fixture(scope="module", params=families.NAMES)
def theirs(request):
    if request.param == "flux1":
        return tiny.diffusers_pipeline(guidance=False).transformer.double()
    return tiny2.diffusers_transformer(guidance=False).double()


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer")
    theirs.save_pretrained(folder)
    return load_transformer(folder).double()


@pytest.fixture(scope="module")
def blocks(ours) -> int:
    return ours.params.depth + ours.params.depth_single_blocks


@pytest.fixture(scope="module")
def inputs(ours):
    """Image, text, times, and what FLUX.1 has besides: the pooled text."""
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    p = ours.params
    x, txt = draw(BATCH, 12, p.in_channels), draw(BATCH, TEXT, p.context_in_dim)
    pooled = [draw(BATCH, p.vec_in_dim)] if family_of(p).name == "flux1" else []
    return x, txt, torch.tensor([0.7, 0.3], dtype=torch.float64), *pooled


def ids_of(ours):
    """Ids of text and image, without a batch axis."""
    family = family_of(ours.params)
    return tuple(part.double() for part in family.ids(TEXT, [GRID]))


def table(ours):
    return rotary_table(torch.cat(ids_of(ours))[None], ours.params.axes_dim, ours.params.theta)


def joined(parts):
    """Return text and image as one sequence. FLUX.2's single blocks take and return it as such."""
    parts = parts if isinstance(parts, tuple) else (parts,)
    return torch.cat([part for part in parts if part is not None], 1)


class Hooks:
    """Every site of Diffusers' blocks, by (block, name), from forward hooks; queries and keys are not rotated."""

    def __init__(self, model):
        self.found, self.parts = {}, {}
        for n, block in enumerate(model.transformer_blocks):
            block.register_forward_pre_hook(self.arguments(n), with_kwargs=True)
            block.register_forward_hook(lambda m, i, out, n=n: self.put(n, "residual", joined(out)))
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
            block.register_forward_hook(lambda m, i, out, n=n: self.put(n, "residual", joined(out)))
            modules = {"queries": block.attn.norm_q, "keys": block.attn.norm_k}
            if hasattr(block.attn, "to_qkv_mlp_proj"):  # FLUX.2: one projection for attention and MLP
                width, modules["mlp"] = block.attn.inner_dim, block.attn.mlp_act_fn
                block.attn.to_qkv_mlp_proj.register_forward_hook(
                    lambda m, i, out, n=n, d=width: self.put(n, "values", out[..., 2 * d : 3 * d])
                )
                block.attn.to_out.register_forward_pre_hook(
                    lambda m, x, n=n, d=width: self.put(n, "attention", x[0][..., :d])
                )
            else:
                modules |= {"values": block.attn.to_v, "attention": block.attn, "mlp": block.act_mlp}
            for name, module in modules.items():
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
            self.found[block, "input"] = joined((kwargs["encoder_hidden_states"], kwargs["hidden_states"]))

        return hook


@pytest.fixture(scope="module")
def hooked(theirs, ours, inputs):
    x, txt, t, *pooled = inputs
    hooks, (txt_ids, img_ids) = Hooks(theirs), ids_of(ours)
    with torch.no_grad():
        out = theirs(
            hidden_states=x,
            encoder_hidden_states=txt,
            timestep=t,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
            **({"pooled_projections": pooled[0]} if pooled else {}),
        )[0]
    return hooks.found, out


def forward(ours, inputs, sites=None):
    x, txt, t, *pooled = inputs
    with torch.no_grad():
        return ours(x, None, txt, None, t, *pooled, rotary=table(ours), sites=sites)


@pytest.fixture(scope="module")
def observed(ours, inputs, blocks):
    found = {}
    sites = [Observed(lambda name, x, n=n: found.update({(n, name): x.clone()})) for n in range(blocks)]
    return found, forward(ours, inputs, sites)


@pytest.mark.parametrize("name", SITES)
def test_against_hooks(name, blocks, ours, hooked, observed):
    for block in range(blocks):
        found, expected = observed[0][block, name], hooked[0][block, name]
        if name in ("queries", "keys"):
            found = unrotate(found, table(ours))
        assert found.shape == expected.shape
        # Diffusers computes the sinusoids of the timestep in fp32
        assert (found - expected).abs().max() <= 1e-5 * expected.std(), block


def test_all_sites_in_order(observed, blocks):
    assert list(observed[0]) == [(block, name) for block in range(blocks) for name in SITES]


def test_observing_changes_no_bit(ours, inputs, observed, blocks):
    plain = forward(ours, inputs)
    assert torch.equal(plain, observed[1])
    assert torch.equal(plain, forward(ours, inputs, [Site() if n % 2 else None for n in range(blocks)]))


@pytest.mark.parametrize("name", SITES)
def test_a_change_reaches_the_output(name, ours, inputs, blocks):
    class Doubled(Site):
        def __call__(self, at, x):
            return 2 * x if at == name else x

    for block in range(blocks):
        sites = [Doubled() if n == block else None for n in range(blocks)]
        assert (forward(ours, inputs, sites) - forward(ours, inputs)).abs().max() > 1e-6
