"""The stages of a training run: autoencoder, pools of latents, transformer, guidance."""

import copy
import math
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from fluxlab import scenes
from fluxlab.errors import UserError
from fluxlab.families import FAMILIES
from fluxlab.loading import load_pipeline
from fluxlab.model import AutoEncoder, Rotary
from fluxlab.model.protocols import Text, TransformerSizes
from fluxlab.pipeline import Pipeline
from fluxlab.progress import Progress
from fluxlab.training.autoencoder_stage import autoencoder_of
from fluxlab.training.guidance import distill
from fluxlab.training.nets import Nets, new_nets, table_for, text_with
from fluxlab.training.pool import Pool, build_pool
from fluxlab.training.program import Convention, convention_for, read_program
from fluxlab.training.recipe import Recipe
from fluxlab.training.show import Tracker, write_curve, write_grid
from fluxlab.training.state import (
    load_optimizers,
    load_parameters,
    optimizer_tensors,
    parameter_tensors,
    read_tensors,
    write_tensors,
)
from fluxlab.training.teacher import Teacher, check_hints, taught_loss
from fluxlab.training.transformer import Batches, Phase, average_decay, flow_loss, learning_rate, optimizers
from fluxlab.training.update import Loss, update_for

EARLY_SIZE = (48, 48)
READ_EVERY = 10  # steps between two readings of the loss
LOOK = (
    "A cat holding a sign that says hello world",
    "a red fox on the left holding a sign that says hello world",
    "a blue bird at the top holding a sign that says jazz",
    "a green heart on the right holding a sign that says open cafe",
    "a yellow star in the centre holding a sign that says milk",
    "a purple ring at the bottom holding a sign that says stop book",
    "a blue ring above a green square",
    "an orange circle on the left",
)
LOOK_THINGS = (
    "a red fox on the left",
    "a blue bird at the top",
    "a green heart on the right",
    "a yellow star in the centre",
    "a purple ring at the bottom",
    "an orange circle on the left",
    "a blue cat on the right",
    "a red square at the top",
)


def train(recipe: Recipe, folder: Path, device: str) -> Pipeline:
    """Run or resume a recipe in its folder. Return the trained pipeline with EMA weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(recipe.tracker, folder, asdict(recipe))
    try:
        given = load_pipeline(recipe.start, torch.float32, device, cache="none") if recipe.start else None
        model = autoencoder_of(recipe, folder, device, tracker, given)
        pools = load_pools(recipe, folder, model, device)
        pipe = train_transformer(recipe, folder, device, model, pools, tracker, given)
        if recipe.guidance_steps:
            batches, tables = supply(recipe, pools, pipe.text, pipe.transformer.params, device)
            distill(recipe, folder, device, pipe, batches, tables, tracker.log, workers_for(recipe, device))
            shown = folder / "samples-guided.png"
            write_grid(shown, look(pipe, recipe), columns=len(LOOK))
            tracker.log({}, recipe.autoencoder.steps + recipe.steps + recipe.guidance_steps, {"samples": shown})
        return pipe
    finally:
        tracker.close()


def load_pools(recipe: Recipe, folder: Path, model: AutoEncoder, device: str) -> list[Pool]:
    """Return a pool for each size. Latents are kept in the folder, so that a resumed run has the same ones."""
    counts = dict.fromkeys(scenes.SIZES, recipe.pool_other) if recipe.native_share < 1 else {}
    counts |= {EARLY_SIZE: recipe.pool_early} if recipe.native_share < 1 or recipe.early else {}
    counts |= {size_of(recipe): recipe.pool}
    pools = []
    progress = Progress("pools", len(counts))
    for done, (size, count) in enumerate(counts.items()):
        file = folder / f"pool-{size[0]}x{size[1]}.safetensors"
        common = {"seed": recipe.seed, "workers": workers_for(recipe, device), "two_words": recipe.two_words}
        common |= {
            "small_d": recipe.small_d,
            "things": recipe.things,
            "sign_weight": recipe.sign_weight,
            "thing_weight": recipe.thing_weight,
        }
        if file.is_file():
            tensors, _ = read_tensors(file)
            pools.append(build_pool(None, size, count, latents=tensors["latents"], **common))
        else:
            pools.append(build_pool(model, size, count, device=device, **common))
            write_tensors(file, {"latents": pools[-1].latents}, {"size": size})
        progress(done + 1)
    progress.close()
    return pools


def train_transformer(
    recipe: Recipe,
    folder: Path,
    device: str,
    model: AutoEncoder,
    pools: list[Pool],
    tracker: Tracker,
    given: Pipeline | None = None,
) -> Pipeline:
    """Run or resume the second stage from `state.safetensors` in the folder. A new run starts from the weights of
    `given`, if there is one.
    """
    nets, text = new_nets(recipe)
    nets.to(device)
    if given:
        try:
            load_parameters("", nets, parameter_tensors("", Nets(given.transformer, given.text)))
        except UserError as error:
            raise UserError(
                f"start={recipe.start}: its networks are not those of the recipe; set sizes as they are there"
            ) from error
    average = copy.deepcopy(nets).eval().requires_grad_(False)
    chosen = optimizers(nets, muon_lr=recipe.lr, adam_lr=recipe.adam_lr, text_lr=recipe.text_lr)
    file, start, curve = folder / "state.safetensors", 0, []
    if file.is_file():
        tensors, notes = read_tensors(file)
        load_parameters("net.", nets, tensors)
        load_parameters("ema.", average, tensors)
        load_optimizers(chosen, tensors)
        start, curve = notes["step"], notes["curve"]
    family = FAMILIES[recipe.family].training()
    pipe = Pipeline(
        average.transformer,
        model,
        text_with(text, average),
        family.schedule(recipe),
        recipe.sample_steps,
        None,
        recipe.max_sequence_length,
        size_of(recipe),
        recipe.name,
        distilled=family.DISTILLED,
    )
    teacher = Teacher(recipe.teacher, device) if recipe.teacher else None
    if teacher and recipe.hints:
        check_hints(nets, teacher, recipe.teacher)
    batches, tables = supply(recipe, pools, text, nets.transformer.params, device, teacher)
    parameters, averages = list(nets.parameters()), list(average.parameters())
    update = update_for(device)(
        loss_for(recipe, nets, tables, pools, teacher, device),
        parameters,
        averages,
        chosen,
        recipe.clip,
    )
    progress = Progress("transformer", recipe.steps, start)
    steps = range(start, recipe.steps)
    pending: list[tuple] = []  # values of recent steps that are still on the device: reading one waits for it
    for step, (pool, batch) in zip(steps, batches.stream(steps, device, workers_for(recipe, device)), strict=True):
        share = learning_rate(step, recipe.steps, recipe.warmup, recipe.decay)
        loss, plain, norm = update(pool.size, batch, share, average_decay(recipe.ema, step))
        last = step + 1 == recipe.steps
        pending.append((step + 1, loss, plain, norm, share))
        if (step + 1) % READ_EVERY == 0 or (step + 1) % recipe.save_every == 0 or last:
            curve += read_values(pending, recipe)
            pending.clear()
            recent = curve[-50:]
            progress(step + 1, f"loss {sum(row[2] for row in recent) / len(recent):.4f}")
            tracker.log(
                {"loss": curve[-1][1], "plain_loss": curve[-1][2], "grad_norm": curve[-1][3]},
                recipe.autoencoder.steps + step + 1,
            )
        if (step + 1) % recipe.sample_every == 0 or last:
            shown = folder / f"samples-{step + 1:06}.png"
            write_grid(shown, look(pipe, recipe), columns=len(LOOK))
            tracker.log({}, recipe.autoencoder.steps + step + 1, {"samples": shown})
        if (step + 1) % recipe.save_every == 0 or last:
            states = parameter_tensors("net.", nets) | parameter_tensors("ema.", average) | optimizer_tensors(chosen)
            write_tensors(file, states, {"step": step + 1, "curve": curve})
            write_curve(folder / "curve.csv", curve)
    progress.close()
    return pipe


def loss_for(
    recipe: Recipe,
    nets: Nets,
    tables: dict[tuple[int, int], Rotary | Convention],
    pools: list[Pool],
    teacher: Teacher | None,
    device: str,
) -> Loss:
    """Return the loss of a step: that of flow matching, or with a teacher the distance to it."""
    if not teacher:
        return lambda batch, size: flow_loss(nets, batch, tables[size])
    theirs = {pool.size: table_for(teacher.params, teacher.reader.length, pool.grid, device) for pool in pools}
    return lambda batch, size: taught_loss(nets, teacher, batch, tables[size], theirs[size])


def hint_weight(recipe: Recipe, step: int) -> float:
    """Return the weight of the teacher's hidden states at a step."""
    return recipe.hints * max(0.0, 1 - step / recipe.hint_steps)


def workers_for(recipe: Recipe, device: str) -> int:
    """Return the number of processes that draw scenes and batches. The default is 0 on a CPU, at most 12 on a GPU."""
    if recipe.workers is not None:
        return recipe.workers
    return max(0, min(12, (os.cpu_count() or 1) - 2)) if device.startswith("cuda") else 0


def read_values(pending: list[tuple], recipe: Recipe) -> list[list[float]]:
    """Return rows (step, loss, plain loss, gradient norm, learning rate's share) of steps whose values are tensors.

    Raises UserError if a loss is not finite.
    """
    rows = []
    for step, loss, plain, norm, share in pending:
        rows.append([step, *(round(v, 5) for v in (loss.item(), plain.item(), norm.item(), share))])
        if not math.isfinite(rows[-1][1]):
            raise UserError(
                f"the loss is {rows[-1][1]} at step {step}: lower lr={recipe.lr} or adam_lr={recipe.adam_lr}"
            )
    return rows


def supply(
    recipe: Recipe,
    pools: list[Pool],
    text: Text,
    params: TransformerSizes,
    device: str,
    teacher: Teacher | None = None,
) -> tuple[Batches, dict[tuple[int, int], Rotary | Convention]]:
    """Return the batches of all steps, and the rotary table or convention of each size."""
    turn = round(recipe.early * recipe.steps)
    phases = [
        Phase(0, EARLY_SIZE, recipe.native_share, recipe.early_batch),
        Phase(turn, size_of(recipe), recipe.native_share, recipe.batch),
        Phase(recipe.steps, size_of(recipe), recipe.native_share, recipe.guidance_batch),
    ]
    batches = Batches(
        pools,
        phases,
        text,
        seed=recipe.seed,
        length=recipe.max_sequence_length,
        unknown=recipe.unknown_share,
        t_mean=recipe.t_mean,
        full_share=recipe.full_share,
        t_std=recipe.t_std,
        teacher=teacher.reader if teacher else None,
        hints=partial(hint_weight, recipe),
    )
    length = recipe.max_sequence_length
    if recipe.program:
        program = read_program(recipe.program)
        return batches, {pool.size: convention_for(program, params, length, pool.grid, device) for pool in pools}
    return batches, {pool.size: table_for(params, length, pool.grid, device) for pool in pools}


def size_of(recipe: Recipe) -> tuple[int, int]:
    """Return the (height, width) of the images of a finished model."""
    height, width = recipe.size
    return height, width


def look(pipe: Pipeline, recipe: Recipe, seeds: int = 2):
    """Return images of the fixed prompts, uint8 `(seeds · prompts, H, W, 3)`, one row per seed, sampled in bf16."""
    parts = []
    pipe._encoded.clear()  # of earlier weights
    device, prompts = pipe.device.type, LOOK_THINGS if recipe.things else LOOK
    for seed in range(seeds):
        with torch.autocast(device, torch.bfloat16):
            images = pipe.generate(list(prompts), seed, recipe.program, output="pt")
        parts.append((images.float().cpu() * 255).round().byte().permute(0, 2, 3, 1))
    return torch.cat(parts).numpy()
