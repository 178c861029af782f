"""Third training stage: distil true guidance, which takes two forwards, into one (arXiv 2210.03142, first stage)."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fluxlab.model import Rotary
from fluxlab.pipeline import Pipeline
from fluxlab.progress import Progress
from fluxlab.training.nets import Nets, tokens_of
from fluxlab.training.program import Convention
from fluxlab.training.recipe import Recipe
from fluxlab.training.state import (
    load_optimizers,
    load_parameters,
    optimizer_tensors,
    parameter_tensors,
    read_tensors,
    write_tensors,
)
from fluxlab.training.transformer import Batches, average_decay, learning_rate, optimizers
from fluxlab.training.update import update_for

WARMUP, DECAY = 10, 0.8


@torch.no_grad()
def guided(
    teacher: Nets,
    x: Tensor,
    batch: dict[str, Tensor],
    empty: dict[str, Tensor],
    table: Rotary | Convention,
    scale: float,
):
    """Return the velocity v⁻ + scale · (v⁺ - v⁻), `(B, N, C)`, with v⁻ from the empty caption (as `true_cfg`)."""
    count = len(x)
    tokens = {key: torch.cat((batch[key], none.expand(count, *none.shape[1:]))) for key, none in empty.items()}
    with_text, without = teacher(torch.cat((x, x)), batch["t"].repeat(2), tokens, table).float().chunk(2)
    return without + scale * (with_text - without)


def distill(
    recipe: Recipe,
    folder: Path,
    device: str,
    pipe: Pipeline,
    batches: Batches,
    tables: dict[tuple[int, int], Rotary | Convention],
    log: Callable[[dict, int], None],
    workers: int = 0,
) -> None:
    """Distil guidance by `recipe.guidance` into the networks of the pipeline, in place.

    Resumes from `guidance.safetensors` in the folder. Few steps are enough: unlike the target of flow matching, this
    one has no noise.
    """
    teacher = Nets(pipe.transformer, pipe.text)
    nets = copy.deepcopy(teacher).train().requires_grad_(True)
    average = copy.deepcopy(teacher)
    chosen = optimizers(
        nets,
        muon_lr=recipe.lr * recipe.guidance_rate,
        adam_lr=recipe.adam_lr * recipe.guidance_rate,
        text_lr=recipe.text_lr * recipe.guidance_rate,
    )
    file, start = folder / "guidance.safetensors", 0
    if file.is_file():
        tensors, notes = read_tensors(file)
        load_parameters("net.", nets, tensors)
        load_parameters("ema.", average, tensors)
        load_optimizers(chosen, tensors)
        start = notes["step"]
    empty = {key: ids.to(device) for key, ids in tokens_of(pipe.text, [""], recipe.max_sequence_length).items()}

    def loss_of(batch: dict[str, Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        t = batch["t"][:, None, None]
        x = (1 - t) * batch["x0"] + t * batch["noise"]
        target = guided(teacher, x, batch, empty, tables[size], recipe.guidance)
        velocity = nets(x, batch["t"], batch, tables[size])
        error, weights = (velocity.float() - target).square().mean(dim=-1), batch["weights"]
        return (weights * error).sum() / weights.sum(), error.detach().mean()

    parameters, averages = list(nets.parameters()), list(average.parameters())
    update = update_for(device)(loss_of, parameters, averages, chosen, recipe.clip)
    progress = Progress("guidance", recipe.guidance_steps, start)
    steps = range(recipe.steps + start, recipe.steps + recipe.guidance_steps)
    for step, (pool, batch) in enumerate(batches.stream(steps, device, workers), start):
        share = learning_rate(step, recipe.guidance_steps, WARMUP, DECAY)
        loss, _, _ = update(pool.size, batch, share, average_decay(recipe.guidance_ema, step))
        last = step + 1 == recipe.guidance_steps
        if (step + 1) % 10 == 0 or last:
            progress(step + 1, f"loss {loss.item():.4f}")
            log({"guidance/loss": loss.item()}, recipe.autoencoder.steps + recipe.steps + step + 1)
        if (step + 1) % recipe.save_every == 0 or last:
            states = parameter_tensors("net.", nets) | parameter_tensors("ema.", average) | optimizer_tensors(chosen)
            write_tensors(file, states, {"step": step + 1})
    progress.close()
    load_parameters("", teacher, dict(average.named_parameters()))
    pipe._encoded.clear()  # of earlier weights
