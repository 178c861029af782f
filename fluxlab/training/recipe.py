"""The schema of `configs/train/*.yaml`. Unknown keys and values of another type are errors."""

from dataclasses import dataclass, field
from typing import Any

from fluxlab.errors import UserError


@dataclass
class AutoencoderRecipe:
    """The first stage.

    The `steps` see `batch` crops of `crop` pixels and, after a share `whole_from`, `whole_batch` whole scenes. Then the
    decoder alone learns for `polish` steps, from means with `polish_noise` standard deviations of noise.
    `start` is a model, a name under configs/model or a folder, whose autoencoder is taken. This stage is then left out.
    """

    start: str | None = None
    ch: int = 64
    ch_mult: list[int] = field(default_factory=lambda: [1, 1])
    num_res_blocks: int = 0
    z_channels: int = 8
    steps: int = 750
    polish: int = 600
    polish_lr: float = 1e-3
    polish_noise: float = 0.05
    batch: int = 10
    crop: int = 32
    whole_from: float = 0.75
    whole_batch: int = 4
    lr: float = 2e-3
    kl_weight: float = 2e-3


@dataclass
class Recipe:
    """One training run.

    `family` is flux1 or flux2. FLUX.1 reads a small T5 and CLIP of `t5_width` and `clip_width`, FLUX.2 three states of
    a small Qwen3 of `lm_width`. Widths and depths have FLUX.1's names. `lr` is Muon's, for the matrices of the blocks;
    `adam_lr` is for the rest.

    During the first share `early` of the steps, most batches are 48 × 48 pixels instead of 64 × 64: half the cost, same
    lettering. A share `native_share` of the batches has the size of its phase, the others any size.
    `two_words` is the share of scenes that are drawn again until they have a sign with two words, the hardest to
    spell. `workers` processes draw scenes and batches (null: chosen by the device).
    `t_mean` maps a step to the mean of the logit of the times from there on; `shift` is the sampler's μ. Flat images
    emerge from noise early, so that the text matters most at times above 0.8.

    `start` is the folder of a trained model to continue from: the autoencoder is kept, and the transformer and the text
    encoders start from its weights. `+train=<name>` is another recipe, which is then run first, in `<out>/start`. Null:
    start from nothing.

    `small_d` draws the D of signs as the font had it at first, with the form of a small d.

    `teacher` is a trained model of the same latents, a name under configs/model or a folder. Its velocity is then the
    target, in place of noise - x0. Hidden states of its blocks are targets too, with the weight `hints`, which falls to
    0 in `hint_steps` steps.

    `size` is the (height, width) of images after the share `early`; with `native_share` 1 no other sizes are drawn.
    `things` keeps single things without a sign only. `program` is applied to the position ids in every step and to the
    samples, as an edit is to those of a finished model: the convention that the model learns.

    Afterwards true guidance by `guidance` is distilled into one forward for `guidance_steps` steps (0: never) of
    `guidance_batch` scenes, at a share `guidance_rate` of the learning rates.
    """

    name: str = "???"
    family: str = "flux1"
    out: str | None = None
    device: str | None = None
    tracker: str = "wandb"
    start: str | None = None
    teacher: str | None = None
    hints: float = 0.0
    hint_steps: int = 2000
    program: Any = None
    size: list[int] = field(default_factory=lambda: [64, 64])
    things: bool = False
    seed: int = 0
    threads: int | None = None
    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    hidden_size: int = 192
    depth: int = 2
    depth_single_blocks: int = 4
    max_sequence_length: int = 24
    t5_width: int = 128
    clip_width: int = 96
    lm_width: int = 96
    text_layers: int = 2
    pool: int = 20000
    pool_early: int = 12000
    pool_other: int = 600
    two_words: float = 0.0
    small_d: bool = False
    early: float = 0.8
    early_batch: int = 24
    native_share: float = 0.75
    t_std: float = 1.2
    shift: float = 1.6
    t_mean: dict[int, float] = field(default_factory=lambda: {0: 1.6})
    sign_weight: float = 3.0
    thing_weight: float = 3.0
    unknown_share: float = 0.05
    full_share: float = 0.75
    steps: int = 2100
    batch: int = 20
    warmup: int = 200
    decay: float = 0.2
    lr: float = 2e-3
    adam_lr: float = 1e-3
    text_lr: float = 3e-4
    ema: float = 0.995
    clip: float = 1.0
    guidance: float = 2.0
    guidance_steps: int = 0
    guidance_batch: int = 12
    guidance_rate: float = 0.25
    guidance_ema: float = 0.95
    workers: int | None = None
    save_every: int = 200
    sample_every: int = 300
    sample_steps: int = 20
    export: str | None = None


def check(recipe: Recipe) -> None:
    """Raise UserError if a value is out of range."""
    for key in (
        "steps",
        "batch",
        "warmup",
        "pool",
        "pool_other",
        "save_every",
        "sample_every",
        "sample_steps",
        "depth",
        "hint_steps",
    ):
        value = getattr(recipe, key)
        if value < 1:
            raise UserError(f"{key}={value}: expected at least 1")
    if recipe.hidden_size % 64:
        raise UserError(f"hidden_size={recipe.hidden_size}: expected a multiple of 64, the width of a head")
    if recipe.hints and not recipe.teacher:
        raise UserError(f"hints={recipe.hints}: the hidden states are a teacher's; set teacher=, or hints=0")
    for key in ("t5_width", "clip_width", "lm_width"):
        if getattr(recipe, key) % 32:
            raise UserError(f"{key}={getattr(recipe, key)}: expected a multiple of 32, the width of a head")
    if recipe.tracker not in ("wandb", "none"):
        raise UserError(f"tracker={recipe.tracker}: expected wandb or none")
    if recipe.guidance_steps < 0 or recipe.guidance_batch < 1:
        key = "guidance_steps" if recipe.guidance_steps < 0 else "guidance_batch"
        raise UserError(f"{key}={getattr(recipe, key)}: expected a count; guidance_steps=0 leaves the stage out")
    if not 0 <= recipe.two_words <= 1:
        raise UserError(f"two_words={recipe.two_words}: expected a share from 0 to 1")
    if recipe.workers is not None and recipe.workers < 0:
        raise UserError(f"workers={recipe.workers}: expected a number of processes, 0 for none")
    if not 0 < recipe.native_share <= 1:
        raise UserError(f"native_share={recipe.native_share}: expected a share above 0 and at most 1")
    least = 32 if recipe.things else 48
    if len(recipe.size) != 2 or any(side % 4 or not least <= side <= 80 for side in recipe.size):
        raise UserError(f"size={recipe.size}: expected [height, width], both multiples of 4 from {least} to 80 pixels")
    if recipe.things and recipe.two_words:
        raise UserError(f"two_words={recipe.two_words}: with things=true there are no signs; leave one of them out")
    if recipe.program and recipe.teacher:
        raise UserError(
            f"program: a model with a teacher learns without one; leave out program or teacher={recipe.teacher}"
        )
    if 0 not in recipe.t_mean:
        raise UserError(f"t_mean={recipe.t_mean}: expected a mean for step 0, for instance {{0: 1.6}}")
    from fluxlab.families import FAMILIES

    trained = [family.name for family in FAMILIES.values() if family.training]
    if recipe.family not in trained:
        raise UserError(f"family={recipe.family}: expected {' or '.join(trained)}")
    FAMILIES[recipe.family].training().check(recipe)
