"""The sizes that a plan is made from, as the headers of a model's files give them."""

from collections.abc import Mapping

import torch

from fluxlab.checkpoints.networks import TRANSFORMER
from fluxlab.checkpoints.read import OpenWeights, open_weights
from fluxlab.checkpoints.stored import Stored, local
from fluxlab.config import ModelRow
from fluxlab.memory.plan import ModelSizes
from fluxlab.memory.source import WeightSource, is_mapped


def open_row(row: ModelRow, dtype: torch.dtype | None, device: torch.device) -> OpenWeights:
    """Open the transformer of a row that is on this machine. Only headers are read."""
    path = local(row.path, "transformer", row.variant)
    return open_weights(TRANSFORMER, path, dtype=dtype, device=device, variant=row.variant, unread=True)


def sizes_of(row: ModelRow, parts: Mapping[str, Stored], dtype: torch.dtype | None, device: torch.device) -> ModelSizes:
    """Return the sizes of a model as its files give them. parts: of `checkpoints.stored`."""
    opened = open_row(row, dtype, device) if parts["transformer"].files else None
    return model_sizes(parts, dtype, opened, bool(row.lora))


def model_sizes(
    parts: Mapping[str, Stored], dtype: torch.dtype | None, opened: OpenWeights | None, loras: bool = False
) -> ModelSizes:
    """Return the sizes of a model. parts: of `checkpoints.stored`. opened: None for one that is still to be fetched.

    loras: whether LoRAs are added to the transformer. On a CPU they are added once to weights that are mapped.
    """
    transformer, autoencoder = parts["transformer"], parts["autoencoder"]
    encoders = [part for name, part in parts.items() if name not in ("transformer", "autoencoder")]
    largest = max(encoders, key=lambda part: part.parameters.total())
    computed = opened.target.dtype if opened else dtype or transformer.dtype
    stored, blocks, mapped = computed, None, False
    if opened is not None:
        source = WeightSource(opened.net, opened.recipe, opened.shapes, opened.model.params)
        stored = source.units[0].weights[0].dtype if source.blocks else computed
        blocks, mapped = source.stored_blocks, is_mapped(opened)
        if any(weight.dtype != computed for unit in source.units[: source.blocks] for weight in unit.weights):
            stored = next(w.dtype for u in source.units[: source.blocks] for w in u.weights if w.dtype != computed)
    return ModelSizes(
        transformer.params,
        autoencoder.params,
        computed,
        stored,
        dtype or autoencoder.dtype,
        text_bytes=sum(part.bytes_as(dtype) for part in encoders),
        text_layer_bytes=largest.layer * (dtype or largest.dtype).itemsize,
        stored_blocks=blocks,
        mapped=mapped,
        changed=loras and not mapped,
    )
