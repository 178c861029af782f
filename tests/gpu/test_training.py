"""Training steps on a GPU: a step replayed from a CUDA graph is the step that Python launches."""

import copy

import pytest
import torch

from fluxlab.training.nets import new_nets, table_for
from fluxlab.training.recipe import Recipe
from fluxlab.training.transformer import flow_loss, optimizers
from fluxlab.training.update import GraphedUpdate, Update

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LENGTH = 24


def batch_of(step: int, count: int, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    latents = [torch.randn(count, tokens, 32, generator=generator) for _ in range(2)]
    ids = [torch.randint(4, 50, (count, LENGTH), generator=generator) for _ in range(2)]
    parts = {"x0": latents[0], "noise": latents[1], "t": torch.rand(count, generator=generator)}
    parts |= {"weights": torch.ones(count, tokens), "t5_ids": ids[0], "clip_ids": ids[1]}
    return {name: part.cuda() for name, part in parts.items()}


def trained(kind: type[Update], start) -> tuple[list[float], list[torch.Tensor]]:
    nets, average = copy.deepcopy(start), copy.deepcopy(start).requires_grad_(False)
    grids = {(16, 16): (4, 4), (16, 32): (4, 8)}
    tables = {size: table_for(nets.transformer.params, LENGTH, grid, "cuda") for size, grid in grids.items()}
    update = kind(
        lambda batch, size: flow_loss(nets, batch, tables[size]),
        list(nets.parameters()),
        list(average.parameters()),
        optimizers(nets, muon_lr=2e-3, adam_lr=1e-3, text_lr=3e-4),
        1.0,
    )
    losses = []
    for step in range(40):
        size = list(grids)[step % 3 == 2]
        batch = batch_of(step, 8, size[0] * size[1] // 16)
        losses.append(update(size, batch, min(1.0, (step + 1) / 20), (1 + step) / (10 + step))[0].item())
    return losses, [p.detach() for p in average.parameters()]


def test_a_replayed_step_is_the_step_that_python_launches():
    start = new_nets(Recipe(name="test", depth=1, depth_single_blocks=1, text_layers=1))[0].cuda()
    one, two = trained(Update, start), trained(GraphedUpdate, start)
    assert max(abs(a - b) / a for a, b in zip(one[0], two[0], strict=True)) < 0.02  # bf16, and sums in another order
    moved = sum((a - b).square().sum() for a, b in zip(one[1], start.parameters(), strict=True)).sqrt()
    apart = sum((a - b).square().sum() for a, b in zip(one[1], two[1], strict=True)).sqrt()
    assert apart < 0.1 * moved
