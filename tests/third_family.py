"""A family from outside of the package, as a recipe's reader would add it: everything that it needs is in this file.

It has one stream of blocks, ids around the middle of the image (as Qwen-Image), text of single letters without anything
pooled, a token for each latent pixel, names of its own in files, and FLUX.1's autoencoder.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fluxlab import checkpoints, sampling
from fluxlab.checkpoints.files import open_tensors
from fluxlab.checkpoints.formats import Format
from fluxlab.checkpoints.headers import Stored, described
from fluxlab.checkpoints.keys import Piece, layers, norms
from fluxlab.checkpoints.lora_names import Where
from fluxlab.checkpoints.shapes import count, size
from fluxlab.errors import UserError
from fluxlab.families import FAMILIES, Architecture, Family, Later, Names
from fluxlab.model import AutoEncoder, AutoEncoderParams
from fluxlab.model.flux2_layers import SingleStreamBlock2
from fluxlab.model.inputs import block_masks, block_tables, check_sizes, per_block
from fluxlab.model.layers import Affine, LastLayer, MLPEmbedder, Modulation, timestep_embedding
from fluxlab.sampling import Schedule
from fluxlab.schedules import Decision

# --- the network ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ThirdParams:
    """Sizes as `fluxlab.model.protocols.TransformerSizes` names them."""

    in_channels: int = 4
    out_channels: int = 4
    context_in_dim: int = 8
    hidden_size: int = 32
    mlp_ratio: float = 2.0
    num_heads: int = 2
    depth: int = 0
    depth_single_blocks: int = 3
    axes_dim: tuple[int, ...] = (4, 6, 6)
    theta: float = 256
    guidance_embed: bool = False

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        check_sizes(self, "in_channels", "hidden_size", "num_heads")


class Third(nn.Module):
    mlp_maps = 4

    def __init__(self, params: ThirdParams):
        super().__init__()
        p = self.params = params
        self.img_in = nn.Linear(p.in_channels, p.hidden_size)
        self.txt_in = nn.Linear(p.context_in_dim, p.hidden_size)
        self.time_in = MLPEmbedder(256, p.hidden_size)
        self.shared_modulation = Modulation(p.hidden_size, double=False)
        self.double_blocks = nn.ModuleList()
        blocks = range(p.depth_single_blocks)
        self.single_blocks = nn.ModuleList(SingleStreamBlock2(p.hidden_size, p.num_heads, p.mlp_ratio) for _ in blocks)
        self.final_layer = LastLayer(p.hidden_size, p.out_channels)

    def forward(
        self, img, img_ids, txt, txt_ids, timesteps, guidance=None, *, rotary=None, mask=None, taps=None, sites=None,
        modulations=None,
    ):  # fmt: skip
        p, dtype = self.params, self.img_in.weight.dtype
        tables = block_tables(p, img, img_ids, txt, txt_ids, rotary, dtype)
        masks, taps, sites = block_masks(p, mask, dtype), per_block(p, "taps", taps), per_block(p, "sites", sites)
        if modulations is None:
            modulations = self.modulations(self.conditioning(timesteps, guidance))
        joint = torch.cat((self.txt_in(txt), self.img_in(img)), 1)
        inputs = zip(modulations[:-1], tables, masks, taps, sites, strict=True)
        for block, own in zip(self.single_blocks, inputs, strict=True):
            joint = block(joint, *own)
        return self.final_layer(joint[:, txt.shape[1] :], modulations[-1])

    def conditioning(self, timesteps, guidance):
        return self.time_in(timestep_embedding(timesteps, self.img_in.weight.dtype))

    def modulations(self, vec):
        shared = tuple(self.shared_modulation(vec))
        return [shared] * self.params.depth_single_blocks + [self.final_layer.modulations(vec)]

    @staticmethod
    def modulation_layers(p):
        return {"shared_modulation.lin": 3, "final_layer.adaLN_modulation.1": 2}

    @staticmethod
    def split_modulations(table, p):
        *parts, shift, scale = table[:, None, :].split(p.hidden_size, dim=-1)
        return [(Affine(*parts),)] * p.depth_single_blocks + [(Affine(shift, scale, None),)]


# --- its files ------------------------------------------------------------------------------------


def pieces(p: ThirdParams) -> list[Piece]:
    names = {
        "img_in": "x_in",
        "txt_in": "cap_embedder",
        "time_in.in_layer": "t_embedder.0",
        "time_in.out_layer": "t_embedder.2",
        "shared_modulation.lin": "layer_mod",
        "final_layer.linear": "head",
        "final_layer.adaLN_modulation.1": "head_mod",
    }
    found = layers(names)
    for i in range(p.depth_single_blocks):
        found += [
            Piece(f"single_blocks.{i}.{ours}.weight", f"layers.{i}.{theirs}.weight")
            for ours, theirs in (("linear1", "qkv_mlp"), ("linear2", "out"))
        ]
        found += norms(f"single_blocks.{i}.norm", f"layers.{i}.norm_q", f"layers.{i}.norm_k")
    return found


def to_config(p: ThirdParams) -> dict[str, Any]:
    return {"_class_name": "ThirdTransformer2DModel", "layers": p.depth_single_blocks}


def from_config(config: Mapping[str, Any], where: Path) -> ThirdParams:
    return ThirdParams(depth_single_blocks=config["layers"])


def from_shapes(shapes: Mapping[str, tuple[int, ...]], where: Path) -> ThirdParams:
    return ThirdParams(
        context_in_dim=size(shapes, ("txt_in.weight", 1)), depth_single_blocks=count(shapes, "single_blocks")
    )


def lora_aliases(p: ThirdParams, known: Mapping[str, list[Where]]) -> dict[str, list[Where]]:
    return {f"blocks.{i}.o": [Where(f"single_blocks.{i}.linear2.weight", None, None)] for i in range(3)}


TRANSFORMER = Format(
    pieces, to_config, from_config, from_shapes, {r"^cap_embedder\.": "txt_in.", r"^layers\.": "single_blocks."}
)

# --- its text: one token a letter, a table of embeddings -------------------------------------------

TITLE, PLACES = "letters", "a folder"
LETTERS = "abcdefghijklmnopqrstuvwxyz "


class Letters:
    titles = ("the letters",)
    vocabulary = None
    room = after_block = None

    def __init__(self, table: Tensor, tokenizer: str | None = LETTERS):
        self.table, self.tokenizer = table, tokenizer

    @property
    def dtypes(self):
        return (self.table.dtype,)

    def load(self):
        return self.table

    def to(self, device):
        self.table = self.table.to(device)

    def prepare(self, texts, default_length):
        self.check(texts.prompts, texts.max_sequence_length or default_length, texts.truncate, texts.unknown_words)

    def check(self, prompts, max_sequence_length, truncate=False, unknown_words="error"):
        for prompt in prompts:
            if set(prompt) - set(LETTERS) and unknown_words == "error":
                raise UserError(f"prompt {prompt!r}: expected letters")

    def spans(self, prompt, max_sequence_length):
        return tuple((i, i + 1) for i in range(len(prompt)))[:max_sequence_length]

    def token_of(self, word, max_sequence_length):
        return 0

    def encode(self, prompt, max_sequence_length, truncate=False, unknown_words="error"):
        self.check([prompt], max_sequence_length, truncate, unknown_words)
        numbers = [LETTERS.find(c) for c in prompt.ljust(max_sequence_length)[:max_sequence_length]]
        return (self.table[numbers][None],)


def _file(root: Path) -> Path:
    return root / "text_encoder" / "letters.safetensors"


def stored(root: Path, row, cache) -> dict[str, Stored]:
    return {"letters": described([_file(root)], open_tensors([_file(root)])[0].values())}


def save(folder: Path, text: Letters, distilled: bool) -> dict[str, Any]:
    _file(folder).parent.mkdir()
    save_file({"table": text.table}, _file(folder))
    return {"_class_name": "ThirdPipeline", "text_encoder": ["nowhere", "Letters"]}


def reads(root: Path) -> bool:
    return _file(root).is_file()


def tokenizer_folder(root: Path, given) -> Path:
    return Path(given)


def open_text(path, dtype, device, variant, tokenizers, cache) -> Letters:
    return Letters(load_file(_file(Path(path)))["table"].to(device, dtype))


def check_widths(row, p: ThirdParams, text: Letters) -> None:
    if text.table.shape[1] != p.context_in_dim:
        raise UserError(f"{row.path}: letters of {text.table.shape[1]} channels, expected {p.context_in_dim}")


def silent_text(row, parts, p: ThirdParams, dtype, like: Tensor) -> Letters:
    return Letters(like.new_zeros(len(LETTERS), p.context_in_dim))


# --- its sampling ---------------------------------------------------------------------------------


def decide(row, found: "checkpoints.Found | None", params: ThirdParams) -> Decision:
    return Decision(Schedule(use_dynamic_shifting=False, shift=2.0), "third", "as the third's", 3)


def ids(text: int, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The middle of each image is at (n, 0, 0), and text is on the diagonal behind the image."""
    made = [(max(grids[0]) // 2 + torch.arange(text, dtype=torch.float32))[:, None].expand(-1, 3)]
    for n, (rows, cols) in enumerate(grids):
        made.append(sampling.image_ids(1, rows, cols)[0] + torch.tensor([n, -(rows // 2), -(cols // 2)]))
    return made


def pack(latents: Tensor) -> Tensor:
    return rearrange(latents, "b c h w -> b (h w) c")


def unpack(tokens: Tensor, rows: int, cols: int) -> Tensor:
    return rearrange(tokens, "b (h w) c -> b c h w", h=rows, w=cols)


def noise(seeds: Sequence[int], channels: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return pack(sampling.noise(seeds, channels, rows, cols, dtype))


HERE = Later(__name__)
FAMILY = Family(
    name="third",
    title="Third",
    transformer=Architecture(
        build=Third,
        params=ThirdParams,
        published={},
        diffusers="ThirdTransformer2DModel",
        originals=("third-*.safetensors",),
        names={
            "bfl": Names(
                signs=r"shared_modulation\.",
                roots=r"(?:single_blocks|img_in|txt_in|time_in|shared_modulation|final_layer)\.",
            ),
            "diffusers": Names(
                signs=r"layers\.\d+\.qkv_mlp\.",
                roots=r"(?:layers|x_in|cap_embedder|t_embedder|layer_mod|head|head_mod)\.",
            ),
        },
        only=re.compile(r"(?:shared_modulation|layer_mod)\."),
        unusual=re.compile(r"(?:^|\.)cap_embedder\."),
    ),
    autoencoder=FAMILIES["flux1"].autoencoder,
    axes=("frame", "y", "x"),
    ids=ids,
    patch=1,
    noise=noise,
    pack=pack,
    unpack=unpack,
    guidance=1.0,
    text_activation_bytes=lambda p, tokens, itemsize: tokens * p.context_in_dim * itemsize,
    pooled=lambda p: (),
    published_text=lambda name: {},
    files=HERE,
    text_files=HERE,
    conditioning=HERE,
    schedules=HERE,
)


def parts(seed: int = 0) -> tuple[Third, AutoEncoder, Letters, Schedule]:
    """Return random parts of a pipeline: transformer, autoencoder, text, schedule."""
    torch.manual_seed(seed)
    autoencoder = AutoEncoder(AutoEncoderParams(64, 3, 32, 3, (1, 2), 1, 4, 0.3611, 0.1159))
    transformer, table = Third(ThirdParams()).requires_grad_(False), torch.randn(len(LETTERS), 8)
    return transformer.eval(), autoencoder.eval().requires_grad_(False), Letters(table), Schedule(shift=2.0)
