"""Edits of activations against the same patches made by hand with PyTorch hooks on Diffusers' model."""

# ruff: noqa: F811 (fixtures of test_sites)

import math

import pytest
import torch
from einops import rearrange

from fluxlab import batching
from fluxlab.positions import Layout, Program, compile_interventions, compile_programs
from tests.numerics.test_sites import (  # noqa: F401
    GRID,
    TEXT,
    blocks,
    forward,
    ids_of,
    inputs,
    joined,
    ours,
    table,
    theirs,
)

FROM, TO, DOUBLE = 0, 1, 2
TOKENS = [1, 4, TEXT + 2, TEXT + 7, TEXT + 11]


def context(model, prompts=None):
    layout = Layout(TEXT, GRID)
    return batching.context(
        model.params, layout, (1.0, 0.5, 0.0), prompts, torch.device("cpu"), torch.float64, (64, 64), 512
    )


def sites(model, *programs, t=1.0):
    run, programs = context(model), [Program.from_config(program, "p") for program in programs]
    tables = compile_programs(programs, run).at(t).rotary
    count = model.params.depth + model.params.depth_single_blocks
    tables = tables if isinstance(tables, list) else [(tables, tables)] * count
    return compile_interventions(programs, run, len(programs)).at(0, t, tables), tables


def patched(model, inputs, *programs):
    x, txt, t, *pooled = inputs
    changed, tables = sites(model, *programs)
    with torch.no_grad():
        return model(x, None, txt, None, t, *pooled, rotary=tables, sites=changed)


def by_hooks(ours, theirs, inputs, block, change):
    """Return Diffusers' output with `change(name, joint)` at the sites of one block, text and image joined."""
    handles, model = [], theirs
    if block < DOUBLE:
        module = model.transformer_blocks[block]
        texts = {"queries": module.attn.norm_added_q, "keys": module.attn.norm_added_k}
        texts |= {"values": module.attn.add_v_proj, "mlp": module.ff_context}
        images = {"queries": module.attn.norm_q, "keys": module.attn.norm_k, "values": module.attn.to_v}
        images |= {"mlp": module.ff}
        whole = {}
    else:
        module = model.single_transformer_blocks[block - DOUBLE]
        texts = images = {}
        whole = {"queries": module.attn.norm_q, "keys": module.attn.norm_k}
        if not hasattr(module.attn, "to_qkv_mlp_proj"):
            whole |= {"values": module.attn.to_v, "attention": module.attn, "mlp": module.act_mlp}

    def heads_first(name, x):
        if name in ("queries", "keys"):
            return x.transpose(1, 2)
        return rearrange(x, "B N (H d) -> B H N d", H=2) if name in ("values", "attention") else x

    def back(name, x, like):
        if name in ("queries", "keys"):
            return x.transpose(1, 2)
        return rearrange(x, "B H N d -> B N (H d)") if name in ("values", "attention") else x

    def half(name, part):
        def hook(module, args, out):
            dim = 2 if name in ("queries", "keys", "values", "attention") else 1
            x = heads_first(name, out)
            length = TEXT if part == 0 else GRID[0] * GRID[1]
            total = list(x.shape)
            total[dim] = TEXT + GRID[0] * GRID[1]
            joint = x.new_zeros(total)
            joint.narrow(dim, 0 if part == 0 else TEXT, length).copy_(x)
            joint = change(name, joint)
            return back(name, joint.narrow(dim, 0 if part == 0 else TEXT, length), out)

        return hook

    for part, modules in enumerate((texts, images)):
        handles += [m.register_forward_hook(half(name, part)) for name, m in modules.items()]
    for name, m in whole.items():
        hook = lambda m, a, out, name=name: back(name, change(name, heads_first(name, out)), out)  # noqa: E731
        handles.append(m.register_forward_hook(hook))
    if block < DOUBLE:
        for part, m in enumerate((module.attn.to_add_out, module.attn.to_out[0])):
            hook = lambda m, args, part=part: (half("attention", part)(m, None, args[0]),)  # noqa: E731
            handles.append(m.register_forward_pre_hook(hook))

    def changed(name, x, columns):
        """Change some columns of a projection of FLUX.2's single blocks, which attention and MLP share."""
        x = x.clone()
        x[..., columns] = back(name, change(name, heads_first(name, x[..., columns])), x)
        return x

    if hasattr(module.attn, "to_qkv_mlp_proj"):
        d = module.attn.inner_dim
        own = lambda m, args, out: changed("values", out, slice(2 * d, 3 * d))  # noqa: E731
        both = lambda m, args: (changed("mlp", changed("attention", args[0], slice(d)), slice(d, None)),)  # noqa: E731
        handles.append(module.attn.to_qkv_mlp_proj.register_forward_hook(own))
        handles.append(module.attn.to_out.register_forward_pre_hook(both))

    def on_input(m, args, kwargs):
        text, image = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        joint = change("input", joined((text, image)))
        if text is None:
            return args, {**kwargs, "hidden_states": joint}
        return args, {**kwargs, "encoder_hidden_states": joint[:, :TEXT], "hidden_states": joint[:, TEXT:]}

    def on_output(m, args, out):
        joint = change("residual", joined(out))
        return joint.split((TEXT, GRID[0] * GRID[1]), 1) if isinstance(out, tuple) else joint

    handles += [module.register_forward_pre_hook(on_input, with_kwargs=True), module.register_forward_hook(on_output)]
    x, txt, t, *pooled = inputs
    txt_ids, img_ids = ids_of(ours)
    try:
        with torch.no_grad():
            return theirs(
                hidden_states=x,
                encoder_hidden_states=txt,
                timestep=t,
                img_ids=img_ids,
                txt_ids=txt_ids,
                return_dict=False,
                **({"pooled_projections": pooled[0]} if pooled else {}),
            )[0]
    finally:
        for handle in handles:
            handle.remove()


def check(found, expected, unchanged):
    assert (found - expected).abs().max() <= 1e-5 * expected.std()
    assert (expected[TO] - unchanged[TO]).abs().max() > 1e-4 * expected.std()  # so that the comparison can fail


INDICES = [{"indices": [1, 4], "of": "text"}, {"indices": [2, 7, 11]}]
SITES = ("input", "queries", "keys", "values", "attention", "mlp", "residual")


@pytest.mark.parametrize("name", SITES)
def test_inject_is_the_patch_by_hooks(name, blocks, ours, theirs, inputs):
    for block in range(blocks):
        check_injection(name, block, ours, theirs, inputs)


def check_injection(name, block, ours, theirs, inputs):
    edit = {"op": "inject", "source": FROM, "what": name, "blocks": block, "tokens": INDICES, "strength": 0.75}

    def change(at, x):
        if at == name:
            x = x.clone()
            x[TO][..., TOKENS, :] = 0.25 * x[TO][..., TOKENS, :] + 0.75 * x[FROM][..., TOKENS, :]
        return x

    found = patched(ours, inputs, None, {"a": edit})
    check(found, by_hooks(ours, theirs, inputs, block, change), forward(ours, inputs))


@pytest.mark.parametrize("block", [0, 3])
def test_inject_into_a_head_with_a_map(block, ours, theirs, inputs):
    edit = {"op": "inject", "source": FROM, "what": ["keys", "values"], "blocks": block, "heads": 1}
    edit |= {"tokens": {"box": [0, 0, 1, 4]}, "from": {"box": [2, 0, 3, 4]}, "map": [3, 1, 0, 2], "factor": 1.5}
    to, of = [TEXT + i for i in range(4)], [TEXT + 8 + i for i in (3, 1, 0, 2)]

    def change(at, x):
        if at in ("keys", "values"):
            x = x.clone()
            x[TO, 1, to] = 1.5 * x[FROM, 1, of]
        return x

    found = patched(ours, inputs, None, {"a": edit | {"rotation": "before"}})
    check(found, by_hooks(ours, theirs, inputs, block, change), forward(ours, inputs))


@pytest.mark.parametrize("to", ["zero", "mean"])
@pytest.mark.parametrize("name", ["attention", "mlp"])
@pytest.mark.parametrize("block", [1, 2])
def test_ablate_is_the_patch_by_hooks(name, block, to, ours, theirs, inputs):
    edit = {"op": "ablate", "what": name, "blocks": block, "tokens": "image", "to": to}

    def change(at, x):
        if at == name:
            x = x.clone()
            x[TO][..., TEXT:, :] = 0 if to == "zero" else x[TO][..., TEXT:, :].mean(-2, keepdim=True)
        return x

    found = patched(ours, inputs, None, {"a": edit})
    check(found, by_hooks(ours, theirs, inputs, block, change), forward(ours, inputs))


def test_ablate_a_head_by_its_mean_over_other_tokens(ours, theirs, inputs):
    edit = {"op": "ablate", "what": "attention", "blocks": 1, "heads": 0, "to": "mean", "over": "image"}
    edit |= {"tokens": {"indices": [0, 3]}}

    def change(at, x):
        if at == "attention":
            x = x.clone()
            if x[TO, 0, TEXT:].abs().sum() > 0:  # the half with the image
                x[TO, 0, [TEXT, TEXT + 3]] = x[TO, 0, TEXT:].mean(0)
        return x

    found = patched(ours, inputs, None, {"a": edit})
    check(found, by_hooks(ours, theirs, inputs, 1, change), forward(ours, inputs))


def dense(q, k, v, bias):
    return ((q @ k.mT / q.shape[-1] ** 0.5) + bias).softmax(-1) @ v


@pytest.mark.parametrize("strength", [1, 0.3])
@pytest.mark.parametrize("seen_by", ["all", "image"])
@pytest.mark.parametrize("mode", ["replace", "append"])
@pytest.mark.parametrize("heads", ["all", [1]])
def test_keys_and_values_for_some_queries(heads, mode, seen_by, strength, ours, inputs, one_thread):
    """Attention of block 2 with a dense softmax over the keys that each query should see."""
    edit = {"op": "inject", "source": FROM, "what": ["keys", "values"], "mode": mode, "blocks": 2, "tokens": "image"}
    edit |= {"seen_by": seen_by, "strength": strength, "heads": heads}
    (patch,) = [site for site in sites(ours, None, {"a": edit})[0] if site]
    draw = lambda: torch.randn(2, 2, TEXT + 12, 32, dtype=torch.float64)  # noqa: E731
    torch.manual_seed(0)
    q, k, v = draw(), draw(), draw()
    seen = []
    keys, values = patch("keys", k.clone()), patch("values", v.clone())
    found = patch.attend(q, keys, values, table(ours), None, seen.append)
    expected = dense(q, k, v, 0)
    for h in range(2):
        if heads != "all" and h not in heads:
            continue
        own_k, own_v, other_k, other_v = k[TO, h], v[TO, h], k[FROM, h, TEXT:], v[FROM, h, TEXT:]
        if mode == "append":
            bias = torch.zeros(TEXT + 24, dtype=torch.float64)
            bias[TEXT + 12 :] = math.log(strength)
            new = dense(q[TO, h], torch.cat((own_k, other_k)), torch.cat((own_v, other_v)), bias)
        else:
            new_k, new_v = own_k.clone(), own_v.clone()
            new_k[TEXT:] += strength * (other_k - own_k[TEXT:])
            new_v[TEXT:] += strength * (other_v - own_v[TEXT:])
            new = dense(q[TO, h], new_k, new_v, 0)
        rows = slice(None) if seen_by == "all" else slice(TEXT, None)
        expected[TO, h, rows] = new[rows]
    assert (found - expected).abs().max() <= 1e-12
    plain = dense(q, k, v, 0)
    if seen_by == "all":  # the source is computed as without the edit
        assert torch.equal(found[FROM], torch.nn.functional.scaled_dot_product_attention(q, k, v)[FROM])
    assert (expected[TO] - plain[TO]).abs().max() > 1e-3
    if patch._views:  # a probe sees the log-sum-exp over all keys
        rows = torch.cat([a.queries if a.queries is not None else torch.arange(TEXT + 12) for a in seen])
        assert sorted(rows.tolist()) == list(range(TEXT + 12))
        assert all(a.k.shape[2] == TEXT + 12 for a in seen)
