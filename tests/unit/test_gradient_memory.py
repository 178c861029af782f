"""The memory plan of gradients: what it counts is what autograd keeps."""

import pytest
import torch

from fluxlab.families import FAMILIES
from fluxlab.memory.gradients import decoder_bytes, gradient_memory, keeps, saved_bytes
from fluxlab.model import AUTOENCODERS, TRANSFORMERS, TRANSFORMERS2, Flux, Flux2, Flux2Params, FluxParams
from fluxlab.model.rope import Rotary

SMALL = FluxParams(16, 16, 24, 32, 64, 4.0, 2, 2, 3, (4, 14, 14), 10000, True, False)
SMALL2 = Flux2Params(16, 16, 48, 64, 3.0, 2, 2, 3, (8, 8, 8, 8), 2000, False)


@pytest.mark.parametrize(("build", "params"), [(Flux, SMALL), (Flux2, SMALL2)])
def test_a_block_keeps_what_is_planned(build, params):
    """Counted on a real block, without the gains that attribution adds at the queries."""
    model = build(params).requires_grad_(False)
    block, modulations = model.single_blocks[0], model.modulations(torch.randn(2, 64))[2]
    table, x = Rotary(torch.ones(1, 1, 40, 16), torch.ones(1, 1, 40, 16)), torch.randn(2, 40, 64, requires_grad=True)
    outside = {t.untyped_storage().data_ptr() for t in (x, *table, *block.parameters())}
    found, held = {}, []

    def pack(t):
        held.append(t)
        if t.untyped_storage().data_ptr() not in outside:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x, modulations, (table, table), None)
    planned = saved_bytes(params, 2, 8, 32, torch.float32, False)
    queries = 2 * 40 * 64 * 4
    assert 0 <= planned - sum(found.values()) <= 2 * queries


def test_the_plan_of_flux_fits_a_card_that_holds_its_weights():
    p = TRANSFORMERS["schnell"]
    found = gradient_memory(p, 1, 256, 4096, 4, torch.bfloat16)
    assert found.states == 58 * 4352 * 3072 * 2
    assert found.latents == 5 * 4096 * 64 * 4
    assert 2e9 < found.checkpointed < 4e9 < 8e10 < found.whole
    assert keeps(found, None, 200)
    assert not keeps(found, int(80e9), None)
    assert gradient_memory(p, 1, 256, 4096, 4, torch.bfloat16, every_step=True).states == 4 * found.states


def test_the_plan_of_flux2_klein():
    p = TRANSFORMERS2["klein4b"]
    found = gradient_memory(p, 1, 512, 4096, 4, torch.bfloat16)
    assert found.states == 26 * 4608 * 3072 * 2
    assert found.latents == 5 * 4096 * 128 * 4
    assert 1e9 < found.checkpointed < 4e9 < found.whole
    families = ((FAMILIES[name], AUTOENCODERS[name]) for name in ("flux1", "flux2"))
    one, two = (decoder_bytes(*of, 1, 8, 8, torch.float32) for of in families)
    assert one < two < 1.05 * one  # a convolution more, over the same maps
