"""Decide what a safetensors file holds, from the names, shapes and dtypes of its tensors alone."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fluxlab.checkpoints.errors import CheckpointError, few, quantised
from fluxlab.checkpoints.files import COMPUTE_DTYPES, FLOAT8, Entry
from fluxlab.checkpoints.foreign import check_foreign
from fluxlab.families import FAMILIES, Family, claimed

NETWORKS = ("transformer", "autoencoder", "clip", "t5")
# Components that wrappers (torch.compile, FSDP, DDP, activation checkpointing) insert anywhere in a name.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class _Layout:
    """How one network names its tensors. signs: names that only this layout has. roots: all that belongs to it."""

    network: str
    name: str
    signs: re.Pattern
    roots: re.Pattern


def _layout(network: str, name: str, signs: str, roots: str) -> _Layout:
    # the shortest prefix: `text_model.` belongs to the layout, not to the prefix
    return _Layout(network, name, re.compile(rf"^(?P<prefix>(?:.*?\.)??)(?:{signs})"), re.compile(rf"(?:{roots})"))


_TEXT = (
    _layout(
        "clip",
        "transformers",
        r"(?:text_model\.)?"
        r"(?:embeddings\.(?:token|position)_embedding\.|encoder\.layers\.\d+\.(?:self_attn|mlp|layer_norm\d)\.)",
        r"(?:text_model\.)?(?:embeddings|encoder|final_layer_norm)\.",
    ),
    _layout("t5", "transformers", r"encoder\.block\.\d+\.layer\.", r"(?:shared|encoder)\."),
)


@cache
def _layouts(family: Family) -> tuple[_Layout, ...]:
    """The layouts of a family's own networks."""
    own = ((part, name, a.names[name]) for part, a in family.networks.items() for name in a.names)
    return tuple(_layout(part, name, names.signs, names.roots) for part, name, names in own)


# Tensors that inference does not use, by the network that they come with. Everything else unknown is an error.
_UNUSED = {
    "clip": re.compile(
        r"(?:^|\.)(?:position_ids|logit_scale|logit_bias|text_projection(?:\.(?:weight|bias))?"
        r"|visual_projection\.(?:weight|bias)|vision_model\..*)$"
    ),
    "t5": re.compile(
        r"(?:^|\.)(?:logit_scale|lm_head\.weight|spiece_model"
        r"|decoder\.(?:block\.\d+\.layer\.\d+|final_layer_norm|embed_tokens)\..*)$"
    ),
}
# A name of that list needs no encoder in the file if its prefix says that it comes from one.
_OF_TEXT_ENCODERS = re.compile(r"^(?:text_encoders?|cond_stage_model|conditioner)\.")
_VISION = re.compile(r"(?:^|\.)vision_model\.")
_TIED = "encoder.embed_tokens.weight"  # T5's `shared.weight` under its second name


@dataclass(frozen=True)
class Network:
    """One network in a file. tensors: entries by the layout's own names, without any prefix. family: None for text
    encoders."""

    family: str | None
    layout: str
    prefix: str
    tensors: dict[str, Entry]


@dataclass(frozen=True)
class Contents:
    """What some files hold. unknown: tensors that belong to no network and are not on the list of unused ones."""

    networks: dict[str, Network]
    unknown: tuple[str, ...]


def recognise(entries: Mapping[str, Entry], where: Path) -> Contents:
    """Return what tensors belong to.

    Raises `CheckpointError` for quantised weights, for what other models and adapters write (`foreign.py`), and for
    two copies of one network.
    """
    names = _unwrapped(entries, where)
    check_foreign({name: entry.shape for name, entry in names.items()}, where)
    found = _find_layouts(names, where)
    networks: dict[str, Network] = {}
    left = dict(names)
    for family, layout, prefix in found:
        mine = {name: entry for name, entry in left.items() if _belongs(name, layout, prefix)}
        left = {name: entry for name, entry in left.items() if name not in mine}
        tensors = {name.removeprefix(prefix): entry for name, entry in mine.items()}
        networks[layout.network] = Network(family, layout.name, prefix, _canonical(layout.network, tensors))
    unknown = {name: entry for name, entry in left.items() if not _is_unused(name, networks)}
    used = {name: e for network in networks.values() for name, e in network.tensors.items()}
    check_quantised({**used, **unknown}, where)
    return Contents(networks, tuple(unknown))


def check_quantised(entries: Mapping[str, Entry], where: Path) -> None:
    """Raise `CheckpointError` if a tensor is stored as integers, or as a float that PyTorch cannot cast."""
    readable = (*COMPUTE_DTYPES.values(), *FLOAT8.values())
    odd = {name: e.stored for name, e in entries.items() if e.dtype not in readable and not is_counter(name)}
    if odd:
        kinds = "/".join(sorted(set(odd.values())))
        raise quantised(where, f"{len(odd)} tensors of {kinds}: {few(odd)}")


def is_counter(name: str) -> bool:
    """Return whether a tensor is a batch norm's count of training steps: a whole number, which nothing reads."""
    return name.endswith("num_batches_tracked")


def _unwrapped(entries: Mapping[str, Entry], where: Path) -> dict[str, Entry]:
    names: dict[str, Entry] = {}
    for name, entry in entries.items():
        plain = _WRAPPERS.sub("", name)
        if plain in names:
            raise CheckpointError(f"{where}: holds {plain} twice, as {names[plain].name} and {name}; keep one of them")
        names[plain] = entry
    return names


def _find_layouts(names: Collection[str], where: Path) -> list[tuple[str | None, _Layout, str]]:
    """The families, layouts and prefixes found, longest prefix first, so that a bare network takes what is left."""
    found: dict[str, dict[tuple[str, str], tuple[str | None, _Layout, str]]] = {}
    own = [(family, layout) for family in FAMILIES.values() for layout in _layouts(family)]
    for family, layout in [*own, *((None, layout) for layout in _TEXT)]:
        matches = (layout.signs.match(name) for name in names if not _VISION.search(name))
        for prefix in {match["prefix"] for match in matches if match}:
            if family is None or family is _claiming(layout.network, prefix, names):
                place = family and family.name, layout, prefix
                found.setdefault(layout.network, {})[layout.name, prefix] = place
    for network, candidates in found.items():
        if len(candidates) > 1:
            shown = ", ".join(sorted(f"{prefix or 'no prefix'} ({layout})" for layout, prefix in candidates))
            raise CheckpointError(f"{where}: holds {len(candidates)} of FLUX.1's {network}: {shown}; keep one of them")
    every = [place for candidates in found.values() for place in candidates.values()]
    return sorted(every, key=lambda place: (-len(place[2]), NETWORKS.index(place[1].network)))


def _claiming(part: str, prefix: str, names: Collection[str]) -> Family:
    """The family whose transformer or autoencoder has tensors with this prefix."""
    mine = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def has_own(family: Family) -> bool:
        only = family.networks[part].only
        return only is not None and any(map(only.match, mine))

    return claimed(has_own)


def _is_unused(name: str, networks: Iterable[str]) -> bool:
    owners = [network for network, pattern in _UNUSED.items() if pattern.search(name)]
    return any(network in networks for network in owners) or bool(owners and _OF_TEXT_ENCODERS.match(name))


def _belongs(name: str, layout: _Layout, prefix: str) -> bool:
    return (
        name.startswith(prefix)
        and bool(layout.roots.match(name, len(prefix)))
        and not any(pattern.search(name) for network, pattern in _UNUSED.items() if network == layout.network)
    )


def text_encoder_names(network: str, name: str) -> str | None:
    """Return a text encoder's tensor name as every release of transformers reads it; None for a second name."""
    if network == "clip":  # without "text_model." since transformers 5.6
        return f"text_model.{name.removeprefix('text_model.')}"
    return None if name == _TIED else name


def _canonical(network: str, tensors: dict[str, Entry]) -> dict[str, Entry]:
    if network not in ("clip", "t5"):
        return tensors
    renamed = {text_encoder_names(network, name): entry for name, entry in tensors.items()}
    tied = renamed.pop(None, None)
    return {"shared.weight": tied, **renamed} if tied else renamed
