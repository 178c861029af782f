"""T5 one block at a time, for devices that cannot hold it: FLUX.1's has 9.5 GB in bf16, in 24 blocks."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

if TYPE_CHECKING:
    from transformers import T5EncoderModel

    from fluxlab.model.t5 import T5Encoder

Use = Callable[[nn.Module], None]


@torch.inference_mode()
def blockwise_states(
    t5: "T5Encoder | T5EncoderModel",
    prompts: Sequence[Int[Tensor, "1 l"]],
    device: torch.device,
    before: Use | None = None,
    after: Use | None = None,
) -> list[Float[Tensor, "1 l t"]]:
    """Return T5's last layer for the tokens of each prompt, on `device`, while T5 itself stays where it is.

    A block is copied to the device, and all prompts go through it, one at a time: the bits are those of `t5(ids)` on
    the device. before, after: called with every module that has weights, before it is copied and after its last use.
    """
    stack = t5.encoder

    def run(module: nn.Module, calls: Sequence[tuple]) -> list:
        if before:
            before(module)
        weights = {name: weight.to(device) for name, weight in module.state_dict(keep_vars=True).items()}
        results = [functional_call(module, weights, arguments) for arguments in calls]
        if after:
            after(module)
        return results

    # the embedding is a table: its rows are picked where it is
    states = [t5.shared(ids.to(t5.shared.weight.device)).to(device) for ids in prompts]
    biases: list[Tensor | None] = [None] * len(states)
    for block in stack.block:
        # of the arguments (states, attention mask, position bias), only the first block computes the bias
        outputs = run(block, [(x, None, bias) for x, bias in zip(states, biases, strict=True)])
        states, biases = [output[0] for output in outputs], [output[1] for output in outputs]
    return run(stack.final_layer_norm, [(x,) for x in states])
