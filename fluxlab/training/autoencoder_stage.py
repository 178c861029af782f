"""The first stage of a training run: the autoencoder, given or trained, in the form of the recipe's family."""

from pathlib import Path

import torch

from fluxlab.errors import UserError
from fluxlab.families import FAMILIES
from fluxlab.loading import load_pipeline
from fluxlab.model import AutoEncoder, AutoEncoderParams
from fluxlab.pipeline import Pipeline
from fluxlab.progress import Progress
from fluxlab.training import autoencoder as ae
from fluxlab.training.recipe import Recipe
from fluxlab.training.seeds import derived, torch_rng
from fluxlab.training.show import Tracker
from fluxlab.training.state import load_optimizers, optimizer_tensors, read_tensors, write_tensors
from fluxlab.training.transformer import learning_rate


def autoencoder_of(recipe: Recipe, folder: Path, device: str, tracker: Tracker, given: Pipeline | None) -> AutoEncoder:
    """Return the autoencoder in the form of the recipe's family: that of `given`, that of the model which the recipe
    names, or a trained one.
    """
    start = recipe.autoencoder.start
    if given:
        model = given.autoencoder
    elif start:
        model = load_pipeline(start, torch.float32, device, cache="none").autoencoder
    else:
        model = train_autoencoder(recipe, folder, device, tracker)
    model = FAMILIES[recipe.family].training().as_own_autoencoder(model, start)
    if model.params.z_channels != recipe.autoencoder.z_channels:
        raise UserError(
            f"autoencoder.z_channels={recipe.autoencoder.z_channels}: the given one has {model.params.z_channels}"
        )
    return model


def train_autoencoder(recipe: Recipe, folder: Path, device: str, tracker: Tracker) -> AutoEncoder:
    """Run or resume the first stage from `autoencoder.safetensors` in the folder."""
    r, file = recipe.autoencoder, folder / "autoencoder.safetensors"
    torch.manual_seed(derived(recipe.seed, "autoencoder weights", 0))
    params = AutoEncoderParams(64, 3, r.ch, 3, tuple(r.ch_mult), r.num_res_blocks, r.z_channels, 1.0, 0.0)
    model = AutoEncoder(params).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=r.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    start = 0
    if file.is_file():
        tensors, notes = read_tensors(file)
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        start = notes["step"]
        if start < r.steps + r.polish:
            load_optimizers([optimizer], tensors)
    total = r.steps + r.polish
    progress = Progress("autoencoder", total, start)
    for step in range(start, total):
        polishing = step >= r.steps
        crop = r.crop if step < r.whole_from * r.steps else None
        pixels = ae.batch_of(recipe.seed, step, r.batch if crop else r.whole_batch, crop, recipe.small_d)
        pixels = pixels.to(device, memory_format=torch.channels_last)
        at = (step - r.steps, r.polish, 20) if polishing else (step, r.steps, 60)
        for group in optimizer.param_groups:
            group["lr"] = (r.polish_lr if polishing else r.lr) * learning_rate(*at, decay=0.9)
        generator = torch_rng(recipe.seed, "posterior", step)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            if polishing:
                loss, error = ae.polish_loss(model, pixels, generator, r.polish_noise)
            else:
                loss, error = ae.step_loss(model, pixels, generator, r.kl_weight)
        optimizer.zero_grad()
        loss.backward()  # the encoder has no gradients while polishing
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, f"error {error.item():.4f}")
        if (step + 1) % recipe.save_every == 0 or step + 1 in (r.steps, total):
            tracker.log({"autoencoder/loss": loss.item(), "autoencoder/error": error.item()}, step + 1)
            states = {f"model.{k}": v for k, v in model.state_dict().items()} | optimizer_tensors([optimizer])
            write_tensors(file, states, {"step": step + 1})
    progress.close()
    return ae.normalised(model.eval().requires_grad_(False), recipe.seed, device, recipe.small_d)
