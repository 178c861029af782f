"""A whole model in torch.compile, without inductor. `tests/versions.sh` runs it with other PyTorch versions."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.numerics.test_graph_pass import MODELS, forward_of
from tests.unit.test_flux import unchecked  # noqa: F401 (a fixture)


@pytest.mark.parametrize("family", MODELS)
@torch.inference_mode()
def test_compiled_code_leaves_out_what_nobody_reads(family, unchecked):  # noqa: F811
    """In the last block: text tokens beyond their queries, keys and values, unless something observes the block."""
    torch._dynamo.reset()
    model, inputs = forward_of(MODELS[family], torch.float32, 1)

    def weights_of_all_tokens(function, **given) -> set[tuple[int, ...]]:
        """Return the shapes of the weights by which all 41 tokens are multiplied."""
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as events:
            function(*inputs, **given)
        shapes = [event.input_shapes[:2] for event in events.events() if event.name == "fluxlab::linear"]
        return {tuple(weight) for x, weight in shapes if x[1:-1] == [41]}

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert weights_of_all_tokens(compiled) == {(96, 32)}
    assert len(weights_of_all_tokens(compiled, mask=torch.zeros(1, 1, 41, 41))) == 4
    assert (compiled(*inputs) - model(*inputs)).abs().max() < 1e-4
    torch._dynamo.reset()
