"""A language model one layer at a time, for devices that cannot hold it: FLUX.2 [klein]'s Qwen3 4B has 8 GB in bf16."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Use = Callable[[nn.Module], None]


@contextmanager
def layer_by_layer(decoder: nn.Module, device: torch.device, before: Use, after: Use) -> Iterator[None]:
    """Within this context, a layer's weights are on `device` while it is computed, and where they were otherwise.

    decoder: of transformers, with `layers` and `norm`. Its embeddings stay where they are. The bits are those of a
    decoder that is on the device as a whole. before, after: called with every layer, before it is copied and after it
    is used.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []

    def enter(layer: nn.Module, *_) -> None:
        before(layer)
        for module in layer.modules():
            for name, weight in module._parameters.items():
                if weight is not None and weight.device != device:
                    kept.append((module, name, weight))
                    module._parameters[name] = nn.Parameter(weight.to(device), requires_grad=False)

    def leave(layer: nn.Module, *_) -> None:
        while kept:
            module, name, weight = kept.pop()
            module._parameters[name] = weight
        after(layer)

    parts = [*decoder.layers, decoder.norm]
    hooks = [part.register_forward_pre_hook(enter) for part in parts]
    hooks += [part.register_forward_hook(leave, always_call=True) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
