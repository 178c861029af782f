"""Ops on frequencies: methods for images larger than those of training, and single changes of bands.

An op maps `Waves` to `Waves`. It sees a `Spectrum`. Each formula acts on the frequencies that the edits before it left,
so that methods compose. s is the extent of the image's positions over the trained one, for each axis, unless the
argument `factor` gives it. Differentiable in ids, factors and frequencies, except at the bounds of a ramp.
"""

import math

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.positions.ops import PerAxis
from fluxlab.positions.registry import op
from fluxlab.positions.tensors import as_tensor
from fluxlab.positions.waves import Spectrum, Waves
from fluxlab.select import arguments as types
from fluxlab.select.where import parse_pairs

GRID_AXES = ("row", "col")
"""The axes that methods for larger images change by default: the index has no trained extent."""

BETA, GAMMA = (1.25, 0.75), (16.0, 2.0)
"""Rotations over the trained extent between which YaRN blends, as chosen for FLUX by DyPE: NTK to PI, base to NTK."""


def stretch_of(spectrum: Spectrum, factor: PerAxis | None) -> Tensor:
    """Return s for each pair, `(d/2,)`: the given factor, or the extent over the trained one."""
    return spectrum.stretch if factor is None else spectrum.values(factor)


def ntk_ratio(s: Tensor, spectrum: Spectrum) -> Tensor:
    """Return (s^(d/(d-2)))^(-2i/d): the ratio of frequencies if θ becomes θ·s^(d/(d-2))."""
    return s ** (-2 * spectrum.pair / (spectrum.width - 2).clamp(min=1))


def _ramp(rotations: tuple[float, float], spectrum: Spectrum) -> Tensor:
    """Return 0 … 1 for each pair: 0 below the pair that turns rotations[0] times over the trained extent, 1 from the
    one that turns rotations[1] times."""

    def pair(r: float) -> Tensor:
        turns = spectrum.trained / (2 * math.pi * torch.tensor(r, dtype=torch.float64, device=spectrum.pair.device))
        return spectrum.width * turns.log() / (2 * math.log(spectrum.theta))

    most = spectrum.width / 2
    low, high = (torch.minimum(x.clamp(min=0), most) for x in (pair(rotations[0]).floor(), pair(rotations[1]).ceil()))
    return ((spectrum.pair - low) / torch.where(high == low, 0.001, high - low)).clamp(0, 1)


def _yarn(
    s: Tensor, spectrum: Spectrum, beta: tuple[float, float] = BETA, gamma: tuple[float, float] = GAMMA
) -> Tensor:
    """Return the ratio of frequencies of YaRN: base, then NTK, then PI, from high to low frequencies."""
    to_pi, to_ntk = _ramp(beta, spectrum), _ramp(gamma, spectrum)
    ratio = ntk_ratio(s, spectrum) * (1 - to_pi) + to_pi / s
    return (1 - to_ntk) + ratio * to_ntk


@op("pi", {"factor": types.positive_per_axis}, acts_on="frequencies", tokens="all", axes=GRID_AXES)
def pi(waves: Waves, spectrum: Spectrum, factor: PerAxis | None = None) -> Waves:
    """Position interpolation: divide frequencies by `factor`, by default the extent over the trained one.

    arXiv 2306.15595.
    """
    return waves._replace(frequency=waves.frequency / stretch_of(spectrum, factor))


@op("ntk", {"factor": types.positive_per_axis}, acts_on="frequencies", tokens="all", axes=GRID_AXES)
def ntk(waves: Waves, spectrum: Spectrum, factor: PerAxis | None = None) -> Waves:
    """NTK-aware interpolation: the base θ becomes θ·s^(d/(d-2)). The lowest frequency is divided by s = `factor`."""
    return waves._replace(frequency=waves.frequency * ntk_ratio(stretch_of(spectrum, factor), spectrum))


@op("yarn", {"factor": types.positive_per_axis}, acts_on="frequencies", tokens="all", axes=GRID_AXES)
def yarn(waves: Waves, spectrum: Spectrum, factor: PerAxis | None = None) -> Waves:
    """YaRN as used for FLUX: high frequencies stay, middle ones follow `ntk`, low ones `pi`; where s > 1.

    cos and sin are multiplied by 1 + 0.1·ln s. arXiv 2309.00071, with the ramps of arXiv 2510.20766.
    """
    s = stretch_of(spectrum, factor)
    return _where_larger(s, waves, _yarn(s, spectrum), 1 + 0.1 * s.log())


@op(
    "dype",
    {
        "method": types.choice("yarn", "ntk", "pi"),
        "exponent": types.not_negative,
        "scale": types.not_negative,
        "variant": types.choice("upstream", "comfyui"),
        "factor": types.positive_per_axis,
    },
    acts_on="frequencies",
    tokens="all",
    axes=GRID_AXES,
    timed=True,
)
def dype(
    waves: Waves,
    spectrum: Spectrum,
    method: str = "yarn",
    exponent: float = 2.0,
    scale: float = 1.0,
    variant: str = "upstream",
    factor: PerAxis | None = None,
) -> Waves:
    """Dynamic position extrapolation: a method whose correction fades with κ = `scale`·t^`exponent`; where s > 1.

    yarn: the rotations of both ramps are multiplied by κ (upstream), or raised to the power κ (comfyui, which also
    multiplies cos and sin by 1 + 0.1·ln s/√s). ntk: θ·s^(2κ·d/(d-2)). pi: frequencies are divided by s^κ.
    arXiv 2510.20766; `guyyariv/DyPE`, `wildminder/ComfyUI-DyPE`.
    """
    s, kappa = stretch_of(spectrum, factor), scale * spectrum.t**exponent
    if method == "pi":
        return _where_larger(s, waves, s**-kappa)
    if method == "ntk":
        return _where_larger(s, waves, ntk_ratio(s ** (2 * kappa), spectrum))
    scaled = [tuple(r**kappa if variant == "comfyui" else r * kappa for r in ends) for ends in (BETA, GAMMA)]
    gain = 1 + 0.1 * s.log() / (s.sqrt() if variant == "comfyui" else 1)
    return _where_larger(s, waves, _yarn(s, spectrum, *scaled), gain)


def _where_larger(s: Tensor, waves: Waves, ratio: Tensor, gain: Tensor | float = 1.0) -> Waves:
    """Return the waves with frequencies multiplied by `ratio` and gains by `gain` where s > 1."""
    return waves._replace(
        frequency=torch.where(s > 1, waves.frequency * ratio, waves.frequency),
        gain=torch.where(s > 1, waves.gain * gain, waves.gain),
    )


@op(
    "riflex",
    {
        "pair": types.index,
        "repeats": types.positive,
        "length": types.positive,
        "share": types.positive,
    },
    acts_on="frequencies",
    tokens="all",
    axes=GRID_AXES,
)
def riflex(
    waves: Waves,
    spectrum: Spectrum,
    pair: int | None = None,
    repeats: float | None = None,
    length: float | None = None,
    share: float = 0.9,
) -> Waves:
    """RIFLEx: the pair whose period is nearest the length at which content repeats turns `share` of once over it all.

    ω_k = share·2π/length. `length` is the extent by default, and then the axis changes only if it exceeds the trained
    extent. `repeats` is the length at which content repeats, by default the trained extent; `pair` gives k instead.
    arXiv 2502.15894; UltraImage (arXiv 2512.04504) has pair 9, share 0.85, length 225.
    """
    at = spectrum.extent if length is None else as_tensor(length, spectrum.extent).expand_as(spectrum.extent)
    acts = spectrum.chosen & ((spectrum.extent > spectrum.trained) if length is None else True)
    chosen = torch.zeros_like(spectrum.chosen)
    for axis in spectrum.axis.unique().tolist():
        pairs = (spectrum.axis == axis).nonzero()[:, 0]
        content = spectrum.trained[pairs[0]] if repeats is None else torch.tensor(repeats)
        if pair is not None and pair < len(pairs):
            chosen[pairs[pair]] = True
        elif pair is None and content.isfinite():  # the index has no length at which content repeats
            chosen[pairs[(2 * math.pi / spectrum.base[pairs] - content).abs().argmin()]] = True
    if pair is not None:
        _check_any(chosen & spectrum.chosen, "pair", pair, spectrum)
    return waves._replace(frequency=torch.where(chosen & acts, share * 2 * math.pi / at, waves.frequency))


@op("imax", {"factor": types.positive}, acts_on="frequencies", tokens="all")
def imax(waves: Waves, spectrum: Spectrum, factor: float | None = None) -> Waves:
    """I-Max: frequencies are divided by s, but stay above (10θ)^(-2i/d); scores are multiplied by √(log_M N); s > 1.

    s = √(image tokens / trained image tokens). N and M are the number of tokens, text included, and that of training.
    arXiv 2410.07536.
    """
    s = math.sqrt(spectrum.image / spectrum.trained_image) if factor is None else factor
    if factor is None and s <= 1:
        return waves
    floor = (10 * spectrum.theta) ** (-2 * spectrum.pair / spectrum.width)
    logarithm = math.log(spectrum.tokens) / math.log(spectrum.trained_tokens)
    return waves._replace(
        frequency=torch.maximum(floor, waves.frequency / s), score=waves.score * math.sqrt(max(1.0, logarithm))
    )


@op("theta", {"value": types.above_one}, acts_on="frequencies", tokens="all")
def theta(waves: Waves, spectrum: Spectrum, value: float) -> Waves:
    """Use the frequencies of another base: `value`^(-2i/d). FLUX.1 has 10000."""
    return waves._replace(frequency=(value ** (-2 * spectrum.pair / spectrum.width)).expand_as(waves.frequency))


BAND = {"pairs": parse_pairs, "periods": types.interval}


@op("band", {**BAND, "rule": types.choice("keep", "drop")}, acts_on="frequencies", tokens="all")
def band(
    waves: Waves,
    spectrum: Spectrum,
    pairs: list[int] | None = None,
    periods: list[float] | None = None,
    rule: str = "keep",
) -> Waves:
    """Keep or drop frequencies: a dropped pair is not rotated.

    pairs: numbers from 0, the highest frequency of each axis. periods: from low to high, in tokens, both included.
    """
    inside = _inside(pairs, periods, spectrum)
    if inside is None:
        raise UserError("pairs: missing, band needs pairs or periods")
    return waves._replace(frequency=torch.where(inside == (rule == "keep"), waves.frequency, 0.0))


@op(
    "gain",
    {"factor": types.not_negative, "to": types.not_negative, "power": types.positive, **BAND},
    acts_on="frequencies",
    tokens="all",
)
def gain(
    waves: Waves,
    spectrum: Spectrum,
    factor: float,
    to: float | None = None,
    power: float = 1.0,
    pairs: list[int] | None = None,
    periods: list[float] | None = None,
) -> Waves:
    """Multiply rotated queries or keys by a factor for each frequency: `factor` at the highest, `to` at the lowest.

    Pair i of the n pairs of an axis has factor + (to - factor)·(i/(n - 1))^power. Without `to` all have `factor`.
    pairs, periods: as in `band`; the others keep their gain. Untwisting RoPE (arXiv 2602.05013) has power 2.
    """
    inside = _inside(pairs, periods, spectrum)
    share = spectrum.pair / (spectrum.width / 2 - 1).clamp(min=1)
    by = factor + ((factor if to is None else to) - factor) * share**power
    return waves._replace(gain=waves.gain * (by if inside is None else torch.where(inside, by, 1.0)))


def _inside(pairs: list[int] | None, periods: list[float] | None, spectrum: Spectrum) -> Tensor | None:
    """Return which pairs are meant, boolean `(d/2,)`. None without a choice."""
    if pairs is None and periods is None:
        return None
    if pairs is not None and periods is not None:
        raise UserError(f"periods: {periods}, expected pairs or periods, not both")
    if pairs is not None:
        inside = torch.isin(spectrum.pair, torch.tensor(pairs, dtype=torch.float64, device=spectrum.pair.device))
        missing = [n for n in pairs if not bool(((spectrum.pair == n) & spectrum.chosen).any())]
        _check_any(inside & spectrum.chosen if not missing else torch.zeros_like(inside), "pairs", missing, spectrum)
    else:
        period = 2 * math.pi / spectrum.base
        inside = (period >= periods[0]) & (period <= periods[1])
        _check_any(inside & spectrum.chosen, "periods", periods, spectrum)
    return inside


def _check_any(chosen: Tensor, key: str, value: object, spectrum: Spectrum) -> None:
    """Raise UserError if no pair is chosen."""
    if not chosen.any():
        widths = [int((spectrum.axis[spectrum.chosen] == axis).sum()) for axis in range(int(spectrum.axis.max()) + 1)]
        numbers = ", ".join(f"{name} 0-{n - 1}" for name, n in zip(types.EVERY_AXIS, widths, strict=False) if n)
        period = 2 * math.pi / spectrum.base[spectrum.chosen]
        raise UserError(
            f"{key}: {value}, none of this model's pairs: {numbers}, with periods from {period.min():.3g} to "
            f"{period.max():.3g} tokens"
        )
