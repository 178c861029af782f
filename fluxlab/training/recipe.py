"""The schema of `configs/train/*.yaml`: a key that is not here, or a value of another type, is an error."""

from dataclasses import dataclass, field

from fluxlab.errors import UserError


@dataclass
class AutoencoderRecipe:
    """The first stage.

    steps: of `batch` crops of `crop` pixels, then, from `whole_from` (a share) on, of `whole_batch` whole scenes. After
    them the encoder stays as it is, and the decoder alone learns for `polish` steps, from means off by `polish_noise`
    standard deviations, as sampled latents are.
    """

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

    Widths and depths have FLUX.1's names; `lr` is Muon's, for the blocks' matrices, `adam_lr` is for all the rest.

    For the first `early` share of the steps most batches are 48 × 48 pixels instead of 64 × 64, which costs half as
    much and teaches the same lettering. `native_share` of the batches have the phase's own size, the others any.
    `two_words` is the share of scenes that are drawn again until they have a sign with two words, the hardest to
    spell. `workers` processes draw scenes and batches (null: chosen by the device).
    `t_mean` is the mean of the logit of the times, from a step on, and `shift` the sampler's μ: flat pictures stand out
    of the noise so early that what the text decides is decided at times above 0.8.

    Afterwards, for `guidance_steps` of `guidance_batch` scenes and `guidance_rate` of the learning rates, the networks
    learn to say at once what true guidance by `guidance` makes of them; 0 steps leave that out.
    """

    name: str = "???"
    out: str | None = None
    device: str | None = None
    tracker: str = "wandb"
    seed: int = 0
    threads: int | None = None
    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    hidden_size: int = 192
    depth: int = 2
    depth_single_blocks: int = 4
    max_sequence_length: int = 24
    t5_width: int = 128
    clip_width: int = 96
    text_layers: int = 2
    pool: int = 20000
    pool_early: int = 12000
    pool_other: int = 600
    two_words: float = 0.0
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
    """Raise `UserError` naming the key, its value and what would be accepted."""
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
    ):
        value = getattr(recipe, key)
        if value < 1:
            raise UserError(f"{key}={value}: at least 1 is needed")
    if recipe.hidden_size % 64:
        raise UserError(f"hidden_size={recipe.hidden_size}: heads are 64 wide, a multiple of 64 is needed")
    for key in ("t5_width", "clip_width"):
        if getattr(recipe, key) % 32:
            raise UserError(f"{key}={getattr(recipe, key)}: heads are 32 wide, a multiple of 32 is needed")
    if recipe.tracker not in ("wandb", "none"):
        raise UserError(f"tracker={recipe.tracker}: expected wandb or none")
    if recipe.guidance_steps < 0 or recipe.guidance_batch < 1:
        key = "guidance_steps" if recipe.guidance_steps < 0 else "guidance_batch"
        raise UserError(f"{key}={getattr(recipe, key)}: a count is needed, guidance_steps=0 leaves the stage out")
    if not 0 <= recipe.two_words <= 1:
        raise UserError(f"two_words={recipe.two_words}: expected a share from 0 to 1")
    if recipe.workers is not None and recipe.workers < 0:
        raise UserError(f"workers={recipe.workers}: expected a number of processes, 0 for none")
    if not 0 < recipe.native_share <= 1:
        raise UserError(f"native_share={recipe.native_share}: a share above 0, at most 1, is needed")
    if 0 not in recipe.t_mean:
        raise UserError(f"t_mean={recipe.t_mean}: a mean from step 0 on is needed")
