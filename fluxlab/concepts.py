"""Maps of words that need not be in the prompt, from attention outputs (Helbling et al., 2025: ConceptAttention).

Each word is a text token with a stream of its own through the double blocks, with the weights of the text. It attends
to the words of its request and to all tokens but the text. Nothing attends to it, so that the image does not change.
After Helbling et al., the token is the first one of the word's encoding by T5, and the pooled text is zero. In FLUX.2,
which has no pooled text, it is the last token of the word, which has read the others, at its place in the template.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from fluxlab import placement, sampling
from fluxlab.errors import UserError, show
from fluxlab.memory.modulations import Conditions, Inputs
from fluxlab.model.attention import attend
from fluxlab.model.groups import KeyGroups
from fluxlab.model.layers import BlockTables, DoubleStreamBlock, Modulations, clip_fp16, modulate, query_key_value
from fluxlab.model.rope import Rotary, apply_rotary
from fluxlab.model.sites import Site
from fluxlab.model.varied import plain_keys
from fluxlab.parts import ModelParts
from fluxlab.probes import Probe
from fluxlab.probes.shares import site_of
from fluxlab.sampling import Sampling
from fluxlab.select.layout import IMAGE, Layout

Observe = Callable[[str, Tensor], None]
TextModulations = Callable[[float, int], Modulations]
"""(t, double block) → the two sets of modulations of its text stream, for one sample."""


class Concepts:
    """The words of a batch's probe, encoded. `sites` adds their streams to the sites of one forward."""

    def __init__(
        self, parts: ModelParts, probe: Probe, settings: Sampling, sigmas: Sequence[float], layout: Layout
    ) -> None:
        """Raises `UserError` for a word that the text encoders do not know."""
        self.probe, self._flux, self._layout = probe, parts.transformer, layout
        length = settings.max_sequence_length
        self._states: dict[tuple[str, ...], Tensor] = {}
        self._places: dict[tuple[str, ...], list[int]] = {}
        for words, path in probe.concepts.items():
            for word in words if settings.unknown_words != "allow" else ():
                _check(parts, word, length, path)
            encoded = [parts.encode_prompt(word, length, truncate=True, unknown_words="allow")[0] for word in words]
            places = self._places[words] = [parts.text.token_of(word, length) for word in words]
            states = [txt[:, place : place + 1] for txt, place in zip(encoded, places, strict=True)]
            self._states[words] = torch.cat(states, 1)
        self._modulations = text_modulations(parts, settings, sigmas)

    def sites(
        self, sites: Sequence[Site | None] | None, step: int, t: float, rotary: Rotary | Sequence[BlockTables]
    ) -> Sequence[Site | None] | None:
        """Return the sites of a forward, with the streams of the words that are requested at this step.

        rotary: the tables of this step, as in `Flux.forward`. Call it after `Probe.taps`.
        """
        p = self._flux.params
        blocks = p.depth + p.depth_single_blocks
        tables = [(rotary, rotary)] * blocks if isinstance(rotary, Rotary) else rotary
        depths = {words: self.probe.depth(words, step) for words in self._states}
        deepest = max(depths.values())
        if not deepest:
            return sites
        observers: Sequence[Observe | None] = self.probe.observers(tables) or []
        streams = [
            _Stream(self._flux.txt_in(self._states[words]), words, depth, self._places[words])
            for words, depth in depths.items()
            if depth
        ]
        joined: list[Site | None] = list(sites) if sites else [None] * blocks
        for n in range(deepest):
            block, now = self._flux.double_blocks[n], self._modulations(t, n)
            acting = [stream for stream in streams if n < stream.depth]
            joined[n] = _Streams(acting, block, now, tables[n], self._layout, observers[n], joined[n])
        return joined


class _Stream:
    """The hidden states of the words of one request, `(1, C, D)`, or one for each sample after the first block.

    places: the text token at whose position each word is.
    """

    def __init__(self, start: Tensor, words: tuple[str, ...], depth: int, places: list[int]) -> None:
        self.states: Sequence[Tensor] = [start]
        self.words, self.depth, self.places = words, depth, places


class _Streams(Site):
    """A site at which words go through one double block, after `inner` changed the activations."""

    def __init__(
        self,
        streams: Sequence[_Stream],
        block: DoubleStreamBlock,
        modulations: Modulations,
        tables: BlockTables,
        layout: Layout,
        observe: Observe | None,
        inner: Site | None,
    ) -> None:
        self._streams, self._block, self._modulations, self._tables = streams, block, modulations, tables
        self._layout, self._observe, self.inner = layout, observe, inner or Site()
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def __call__(self, name: str, x: Tensor) -> Tensor:
        x = self.inner(name, x)
        if name == "keys":
            self._keys = x
        elif name == "values":
            self._values = x
        elif name == "attention":
            with torch.no_grad():
                for stream in self._streams:
                    maps = self._advance(stream, x)
                    if self._observe is not None:
                        self._observe(site_of(stream.words), maps)
            self._keys = self._values = None
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: object, mask: Tensor | None, tap: object) -> Tensor:
        return self.inner.attend(q, k, v, keys, mask, tap)

    def _advance(self, stream: _Stream, attention: Tensor) -> Tensor:
        """Take the words through the block. Return the shares `(B, C, N)` of the image tokens, in fp32 or fp64.

        attention: the block's, `(B, H, N, d)`. One sample at a time, whose bits then do not depend on the batch.
        """
        start, stop = self._layout.range(IMAGE)
        states = stream.states if len(stream.states) == len(attention) else [*stream.states] * len(attention)
        moved, maps = [], []
        for b, state in enumerate(states):
            keys, values, tables = self._seen(b, stream.places)
            after, words = through(self._block, state, self._modulations, keys, values, tables)
            image = rearrange(attention[b, :, start:stop], "H N d -> N (H d)")
            exact = torch.promote_types(image.dtype, torch.float32)
            moved.append(after)
            maps.append(torch.softmax(words[0].to(exact) @ image.to(exact).mT, dim=0))
        stream.states = moved
        return torch.stack(maps)

    def _seen(self, b: int, places: list[int]) -> tuple[Tensor, Tensor, BlockTables]:
        """Return keys and values of sample b but for the text, `(1, H, n, d)`, and the tables of words at `places`.

        A word has the position of a text token, and all see keys at the positions at which that of the first sees them.
        """
        text, _ = self._layout.range(IMAGE)  # with the texts of regions
        queries, keys = self._tables[0], plain_keys(self._tables[1])
        seen = self._keys[b : b + 1]
        if isinstance(keys, KeyGroups):
            first = [bool((part == places[0]).any()) for part in keys.on_host or keys.queries]
            keys = keys.tables[first.index(True)]
            seen = apply_rotary(seen, _of_sample(keys, b))
        tables = tuple(_at(_of_sample(table, b), places) for table in (queries, keys))
        return seen[:, :, text:], self._values[b : b + 1, :, text:], tables


def through(
    block: DoubleStreamBlock, x: Tensor, mods: Modulations, keys: Tensor, values: Tensor, tables: BlockTables
) -> tuple[Tensor, Tensor]:
    """Return words `(1, C, D)` after a double block, and the output of their attention `(1, C, D)`.

    mods: of the text. keys, values: rotated ones that they see in addition to their own, `(1, H, n, d)`.
    """
    first, second = mods
    qkv = block.txt_attn.qkv(modulate(x, first.shift, first.scale))
    q, k, v = query_key_value((qkv,), (block.txt_attn.norm,), block.txt_attn.num_heads, tables)
    out = attend(q, torch.cat((k, keys), 2), torch.cat((v, values), 2))
    joint = rearrange(out, "B H C d -> B C (H d)")
    x = torch.addcmul(x, first.gate, block.txt_attn.proj(joint))
    mlp = block.txt_mlp(modulate(x, second.shift, second.scale))
    return clip_fp16(torch.addcmul(x, second.gate, mlp)), joint


def text_modulations(parts: ModelParts, settings: Sampling, sigmas: Sequence[float]) -> TextModulations:
    """Return the modulations of text for a pooled text of zeros, as a function of time and block."""
    rounding, device, flux = settings.timestep_rounding, parts.device, parts.transformer
    guidance = placement.guidance_of(parts, 1, settings)

    def inputs(t: float) -> Inputs:
        times = sampling.round_timesteps(placement.filled(1, t, device), rounding)
        pooled = [torch.zeros(1, n, dtype=parts.dtype, device=device) for n in parts.family.pooled(flux.params)]
        return times, *pooled, guidance

    if parts.streaming is None:
        vectors: dict[float, Tensor] = {}

        def own(t: float, n: int) -> Modulations:
            if t not in vectors:
                vectors.clear()
                vectors[t] = flux.conditioning(*inputs(t))
            return flux.text_modulations(vectors[t], n)

        return own
    forwards = tuple(sigmas[:-1])
    key = ("concepts", settings.guidance, rounding, forwards)
    known = parts.streaming.residency.modulations(key, lambda: Conditions(forwards, inputs, len(forwards)))
    return lambda t, n: known.at(t)[n][2:]


def _of_sample(table: Rotary, b: int) -> Rotary:
    return Rotary(*(part[b : b + 1] if len(part) > 1 else part for part in table))


def _at(table: Rotary, places: list[int]) -> Rotary:
    # slices, because a list of numbers would be copied to the device
    return Rotary(*(torch.cat([part[:, :, i : i + 1] for i in places], dim=2) for part in table))


def _check(parts: ModelParts, word: str, length: int, path: str) -> None:
    """Raise `UserError` with the path of the request for a word that the text encoders do not know."""
    try:
        parts.text.check([word], length)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'prompt {show(word)}: ')}") from None
