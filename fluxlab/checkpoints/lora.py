"""LoRA files in any of the names in use, read as additions to the tensors of BFL's transformer. No weights are read."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxlab.checkpoints.errors import CheckpointError, few
from fluxlab.checkpoints.files import COMPUTE_DTYPES, FLOAT8, SUFFIXES, Entry, open_tensors, read_json
from fluxlab.checkpoints.finding import resolve
from fluxlab.checkpoints.hub import is_hub_id
from fluxlab.checkpoints.keys import Rows
from fluxlab.checkpoints.lora_names import Where, bare, layers
from fluxlab.config import Lora
from fluxlab.model.protocols import TransformerSizes

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""The names that Diffusers and PEFT give to a LoRA in a folder."""
CONFIG = "adapter_config.json"
"""PEFT's settings, next to the file."""

_TEXT = re.compile(
    r"^(?:base_model\.model\.)?(?:lora_te\d?_|lora_clip_l_|lora_t5xxl_|text_encoders?(?:_\d)?\.|te\d?\.|text_model\."
    r"|cond_stage_model\.|conditioner\.)"
)
_KINDS = {
    "down": r"\.(?:lora_A(?:\.\w+)?|lora_down|(?:lora\.|lora_linear_layer\.)?down)\.weight",
    "up": r"\.(?:lora_B(?:\.\w+)?|lora_up|(?:lora\.|lora_linear_layer\.)?up)\.weight",
    "bias": r"\.(?:lora_B(?:\.\w+)?|lora_up|(?:lora\.|lora_linear_layer\.)?up)\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "norm": r"(?<=[._]norm)\.(?:query_norm|key_norm)\.scale|(?<=\.attn)\.norm_(?:added_)?[qk]\.weight",
}
_KEY = re.compile(r"(?P<module>.+?)(?:" + "|".join(f"(?P<{kind}>{text})" for kind, text in _KINDS.items()) + ")")
_OTHER = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoHa": re.compile(r"hada_w\d"),
    "LoKr": re.compile(r"lokr_(?:w|t)\d"),
    "OFT": re.compile(r"oft_\w+"),
    "LoRA with a middle matrix": re.compile(r"lora_mid"),
}


@dataclass(frozen=True)
class Addition:
    """What a file adds to rows of one of our tensors: `factor` · up · down, or `factor` · up without `down`.

    replaces: the rows become `up`, whatever the factor. up_rows: the rows of `up` that are meant.
    """

    ours: str
    our_rows: Rows
    up: Entry
    up_rows: Rows
    down: Entry | None
    factor: float
    replaces: bool = False


def lora_file(lora: Lora) -> Path:
    """Return the file of a LoRA; one on the hub is fetched. Raises `CheckpointError` if there is not exactly one."""
    if is_hub_id(lora.path) and not lora.path.endswith(SUFFIXES) and not Path(lora.path).expanduser().exists():
        raise CheckpointError(f"{lora.path}: name the file of this hub id, as in {lora.path}/<file>.safetensors")
    root = resolve(lora.path, (), None)
    if root.is_file():
        return root
    named = [root / name for name in FILES if (root / name).is_file()]
    every = named or sorted(file for file in root.iterdir() if file.suffix.lower() in SUFFIXES)
    if len(every) != 1:
        held = f"holds {few([file.name for file in every])}" if every else "holds no .safetensors file"
        raise CheckpointError(f"{root}: a folder that {held}; pass lora=[{{path: <one file>}}]")
    return every[0]


def settings_file(file: Path) -> Path | None:
    """Return PEFT's settings next to the file of a LoRA; None if it has none."""
    settings = file.parent / CONFIG
    return settings if file.name == FILES[1] and settings.is_file() else None


def read_additions(lora: Lora, p: TransformerSizes, shapes: Mapping[str, tuple[int, ...]]) -> list[Addition]:
    """Return what a LoRA adds to a transformer of these sizes. Names and shapes are read, no values but alphas.

    shapes: of our tensors. Accepts BFL's, Diffusers' and PEFT's, kohya's and ComfyUI's names, and XLabs' of FLUX.1. A
    missing alpha equals the rank. Raises `CheckpointError`, in one line, for tensors that this model does not have or
    that do not fit it, for incomplete pairs, parts of text encoders, and other kinds of adapters.
    """
    file = lora_file(lora)
    entries, metadata = open_tensors([file])
    _check_kind(entries, file)
    text = [name for name in entries if _TEXT.match(name)]
    if text and lora.text_encoders == "error":
        raise CheckpointError(
            f"{file}: {len(text)} of {len(entries)} tensors are for the text encoders, which are not changed "
            f"({few(text, 1)}); to leave them out: lora=[{{path: {lora.path}, text_encoders: ignore}}]"
        )
    modules, unknown = _modules({name: entry for name, entry in entries.items() if name not in text}, p)
    if unknown:
        raise CheckpointError(
            f"{file}: {len(unknown)} of {len(entries)} tensors belong to no layer of this transformer: {few(unknown)}; "
            "the LoRA was trained for another model"
        )
    if not modules:
        raise CheckpointError(f"{file}: holds nothing for the transformer")
    alphas = _Alphas(file, metadata)
    additions = [
        addition
        for module, (places, parts) in modules.items()
        for addition in _additions(module, places, parts, lora.scale, alphas, file)
    ]
    _check_shapes(additions, shapes, file)
    _check_twice(additions, shapes, file)
    return additions


def _check_kind(entries: Mapping[str, Entry], file: Path) -> None:
    for kind, pattern in _OTHER.items():
        names = [name for name in entries if pattern.search(name)]
        if names:
            raise CheckpointError(
                f"{file}: a {kind} ({few(names, 1)}); only LoRA, the product of two matrices, can be merged"
            )
    stored = {name: e.stored for name, e in entries.items() if not name.endswith(".alpha")}
    odd = [name for name in stored if entries[name].dtype not in (*COMPUTE_DTYPES.values(), *FLOAT8.values())]
    if odd:
        raise CheckpointError(f"{file}: {len(odd)} tensors of {stored[odd[0]]}, expected floating point: {few(odd)}")


Modules = dict[str, tuple[list[Where], dict[str, Entry]]]


def _modules(entries: Mapping[str, Entry], p: TransformerSizes) -> tuple[Modules, list[str]]:
    """Return the tensors of each layer by kind, and the names that belong to no layer."""
    known, found, unknown = layers(p), {}, []
    for name, entry in entries.items():
        match = _KEY.fullmatch(name)
        kind = match.lastgroup if match else None
        # a norm's own name is part of its layer's
        module = name.rpartition(".")[0] if kind == "norm" else match["module"] if match else ""
        places = known.get(bare(module).replace(".", "_"))
        if not places or (kind == "norm") != places[0].ours.endswith(".scale"):
            unknown.append(name)
            continue
        parts = found.setdefault(module, (places, {}))[1]
        parts[kind] = entry
    return found, unknown


def _additions(
    module: str, places: list[Where], parts: Mapping[str, Entry], scale: float, alphas: "_Alphas", file: Path
) -> list[Addition]:
    """Return what the tensors of one layer add."""
    if ("up" in parts) != ("down" in parts) or ("alpha" in parts and "up" not in parts):
        held = few([entry.name for entry in parts.values()])
        raise CheckpointError(f"{file}: one matrix of a pair is missing, it has only {held}; the file is incomplete")
    found = []
    for ours, our_rows, up_rows in places:
        bias = re.sub(r"\.weight$", ".bias", ours)
        if "up" in parts:
            factor = scale * alphas.factor(module, parts["down"].shape[0] if parts["down"].shape else 0, parts)
            found.append(Addition(ours, our_rows, parts["up"], up_rows, parts["down"], factor))
            if "bias" in parts:
                found.append(Addition(bias, our_rows, parts["bias"], up_rows, None, factor))
        if "diff" in parts:
            found.append(Addition(ours, our_rows, parts["diff"], up_rows, None, scale))
        if "diff_b" in parts:
            found.append(Addition(bias, our_rows, parts["diff_b"], up_rows, None, scale))
        if "norm" in parts:
            found.append(Addition(ours, our_rows, parts["norm"], up_rows, None, 1.0, replaces=True))
    return found


class _Alphas:
    """The factors alpha / rank of a file: from its tensors, else from its metadata or PEFT's adapter_config.json."""

    def __init__(self, file: Path, metadata: Mapping[str, str]):
        self.file = file
        self.config: dict[str, Any] = {}
        if "lora_adapter_metadata" in metadata:  # Diffusers 0.34 and later
            try:
                stored = json.loads(metadata["lora_adapter_metadata"])
            except json.JSONDecodeError:
                raise CheckpointError(f"{file}: its lora_adapter_metadata is not JSON; get another copy") from None
            mine = {key: value for key, value in stored.items() if key.startswith("transformer.")}
            self.config = {key.removeprefix("transformer."): value for key, value in mine.items()}
        elif settings := settings_file(file):
            self.config = read_json(settings)
        if self.config.get("use_dora"):
            raise CheckpointError(f"{file}: a DoRA; only LoRA, the product of two matrices, can be merged")

    def factor(self, module: str, rank: int, parts: Mapping[str, Entry]) -> float:
        """Return alpha / rank of a layer, or alpha / √rank if PEFT's settings say so."""
        if rank < 1:
            raise CheckpointError(f"{self.file}: {parts['down'].name} has shape {parts['down'].shape}, no matrix")
        alpha = None
        if "alpha" in parts:
            value = parts["alpha"].read()
            alpha = float(value) if value.numel() == 1 else math.nan
        elif "lora_alpha" in self.config:
            alpha = self.config["lora_alpha"]
            name = bare(module)
            for pattern, special in (self.config.get("alpha_pattern") or {}).items():
                if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                    alpha = special
                    break
        if alpha is None:
            return 1.0
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.file}: alpha of {module} is {alpha!r}, expected one finite number")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") and "alpha" not in parts else rank)


def matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the two last dimensions of a 1×1 convolution."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _height(rows: Rows, otherwise: int) -> int:
    return otherwise if rows is None else rows[1] - rows[0]


def _check_shapes(additions: list[Addition], shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Raise `CheckpointError`, naming them, for matrices that do not fit the layers that they are named for."""
    absent = [a.up.name for a in additions if a.ours not in shapes]
    if absent:
        raise CheckpointError(f"{file}: {few(absent)}: this transformer has no bias there")
    heights: dict[str, int] = {}
    for a in additions:  # several rows of one matrix may go to different places
        top = a.up_rows[1] if a.up_rows else _height(a.our_rows, shapes[a.ours][0])
        heights[a.up.name] = max(top, heights.get(a.up.name, 0))
    wrong = {}
    for a in additions:
        want = (heights[a.up.name], *shapes[a.ours][1:])
        up = matrix(a.up.shape)
        if a.down is None:
            if up != want:
                wrong[a.up.name] = f"{a.up.name} {a.up.shape} instead of {want}"
            continue
        down = matrix(a.down.shape)
        if len(down) != 2 or down[1] != want[1]:
            wrong[a.down.name] = f"{a.down.name} {a.down.shape} instead of (rank, {want[1]})"
        elif up != (want[0], down[0]):
            wrong[a.up.name] = f"{a.up.name} {a.up.shape} instead of {(want[0], down[0])}"
    if wrong:
        raise CheckpointError(
            f"{file}: {len(wrong)} tensors do not fit this transformer: {few(list(wrong.values()), 3)}; "
            "the LoRA was trained for another model"
        )


def _check_twice(additions: list[Addition], shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Raise `CheckpointError` for a file that adds to one layer under two names."""
    seen: dict[tuple[str, bool], list[tuple[range, str]]] = {}
    for a in additions:
        rows = range(*(a.our_rows or (0, shapes[a.ours][0])))
        places = seen.setdefault((a.ours, a.down is None), [])
        for other, name in places:
            if name != a.up.name and max(rows.start, other.start) < min(rows.stop, other.stop):
                raise CheckpointError(f"{file}: changes {a.ours} twice, by {name} and {a.up.name}; keep one of them")
        places.append((rows, a.up.name))
