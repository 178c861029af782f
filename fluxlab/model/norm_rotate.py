"""RMSNorm and rotation of queries and keys, without gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxlab.model.operators import operator
from fluxlab.model.rope import Rotary, apply_rotary, apply_rotary_

FEW_TOKENS = 768
"""With fewer tokens, flash on a CPU takes blocks of 32 or 64 queries, with more of 256."""


def norm_and_rotate(
    parts: Sequence[Tensor], scales: Sequence[tuple[Tensor, Tensor]], q_table: Rotary, k_table: Rotary
) -> tuple[Tensor, Tensor]:
    """Return queries and keys after RMSNorm and rotation, each `(B, H, N, d)`, in the dtype of the tables.

    parts: `(B, L, 3, H, d)` of each stream: queries, keys and values. scales: `(d,)` for queries and for keys, of each
    stream.

    The tokens of a head are next to each other in memory: attention takes 0.75 to 0.98 of the time of that on tokens
    which are H·d numbers apart (flash on a CPU, bf16 and fp32). In compiled code queries of fewer than `FEW_TOKENS`
    tokens have the order `(B, N, H, d)` instead. Flash gives it to its result, so that nobody has to copy that.
    """
    tables = (q_table, k_table)
    if torch.compiler.is_compiling() and parts[0].device.type == "cpu":
        few = sum(part.shape[1] for part in parts) < FEW_TOKENS
        q, k = (
            _compiled([part[:, :, i] for part in parts], [s[i] for s in scales], table, by_token=few and i == 0)
            for i, table in enumerate(tables)
        )
        return q, k
    function = _traced if torch.compiler.is_compiling() else _in_one_buffer
    scales = [torch.stack(pair) for pair in scales]
    if q_table is k_table:
        q, k = function([part[:, :, :2] for part in parts], scales, q_table).unbind(1)
        return q, k
    q, k = (
        function([part[:, :, i : i + 1] for part in parts], [s[i : i + 1] for s in scales], table)[:, 0]
        for i, table in enumerate(tables)
    )
    return q, k


def _in_one_buffer(parts: Sequence[Tensor], scales: Sequence[Tensor], table: Rotary) -> Tensor:
    """Return `(B, S, H, N, d)` from parts `(B, L, S, H, d)` and scales `(S, d)`: S = 2 for queries and keys."""
    # 1/rms is applied last, in the same buffer: a rotation does not change lengths.
    (B, _, S, H, d), tokens = parts[0].shape, [part.shape[1] for part in parts]
    out = parts[0].new_empty((B, S, H, sum(tokens), d), dtype=table.cos.dtype)
    places = out.split(tokens, dim=3)
    for part, place in zip(parts, places, strict=True):
        place.copy_(part.permute(0, 2, 3, 1, 4))
    rms = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_().div_(d).add_(1e-6).sqrt_()
    for scale, place in zip(scales, places, strict=True):
        place.mul_(scale[:, None, None])
    return apply_rotary_(out, Rotary(*(x[:, None] for x in table))).div_(rms)


def _traced(parts: Sequence[Tensor], scales: Sequence[Tensor], table: Rotary) -> Tensor:
    """Return the same in operators that inductor fuses on a GPU."""
    exact = [part.to(table.cos.dtype).permute(0, 2, 3, 1, 4) for part in parts]
    normed = [
        x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale[:, None, None]
        for x, scale in zip(exact, scales, strict=True)
    ]
    return apply_rotary(torch.cat(normed, dim=3), Rotary(*(x[:, None] for x in table)))


def _compiled(parts: Sequence[Tensor], scales: Sequence[Tensor], table: Rotary, by_token: bool) -> Tensor:
    streams = [tensor for stream in zip(parts, scales, strict=True) for tensor in stream]
    return compiled_norm_rotate(*streams, *[None] * (4 - len(streams)), *table, table.cos.dtype, by_token)


def _of_compiled_code(
    x: Tensor,
    scale: Tensor,
    x2: Tensor | None,
    scale2: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    dtype: torch.dtype,
    by_token: bool,
) -> Tensor:
    parts, scales = ([x], [scale]) if x2 is None else ([x, x2], [scale, scale2])
    (out,) = _in_one_buffer([part[:, :, None] for part in parts], [s[None] for s in scales], Rotary(cos, sin)).unbind(1)
    return _empty(x, scale, x2, scale2, cos, sin, dtype, by_token).copy_(out)


def _empty(x, scale, x2, scale2, cos, sin, dtype, by_token):
    B, L, H, d = x.shape
    N = L if x2 is None else L + x2.shape[1]
    if by_token:
        return x.new_empty((B, N, H, d), dtype=dtype).transpose(1, 2)
    return x.new_empty((B, H, N, d), dtype=dtype)


# One operator for torch.compile on a CPU. Inductor's own code for pairs of channels is not vectorised, and it has none
# for complex numbers. `CODE` below takes its place.
compiled_norm_rotate = operator(
    "norm_rotate(Tensor x, Tensor scale, Tensor? x2, Tensor? scale2, Tensor cos, Tensor sin, ScalarType dtype,"
    " bool by_token) -> Tensor",
    _of_compiled_code,
    _empty,
)

CODE = r"""
extern "C" {{export}} {{signature}} {
    {{profile}}
    using Vec = at::vec::Vectorized<float>;
    constexpr int64_t d = {{d}}, V = Vec::size();

    const auto load = [](const auto* from) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(from)>>;
        if constexpr (std::is_same_v<T, float>) return Vec::loadu(from);
        else return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(from, V));
    };
    const auto store = [](const Vec& x, auto* to) {
        using T = std::remove_pointer_t<decltype(to)>;
        if constexpr (std::is_same_v<T, float>) x.store(to);
        else at::vec::convert<T>(x).store(to, V);
    };
    // The d channels of one token and head: RMSNorm, and the rotation of pairs.
    const auto norm_rotate = [&](const auto* x, const auto* scale, const float* cos, const float* sin, auto* out) {
        alignas(64) float scaled[d];
        Vec squares(0.0f);
        for (int64_t i = 0; i < d; i += V) {
            const Vec v = load(x + i);
            squares = squares + v * v;
            (v * load(scale + i)).store(scaled + i);
        }
        const float sum = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, squares);
        const Vec inverse(1 / std::sqrt(sum / d + 1e-6f));
        for (int64_t i = 0; i < d; i += 2 * V) {
            const auto [a, b] = at::vec::deinterleave2(Vec::loadu(scaled + i), Vec::loadu(scaled + i + V));
            const Vec c = load(cos + i / 2) * inverse, s = load(sin + i / 2) * inverse;
            const auto [first, second] = at::vec::interleave2(a * c - b * s, a * s + b * c);
            store(first, out + i);
            store(second, out + i + V);
        }
    };
    #pragma omp parallel
    {
        {%- for stream in streams %}
        #pragma omp for collapse(2) nowait
        for (int64_t b = 0; b < {{B}}; b++)
        for (int64_t n = {{stream.start}}; n < {{stream.end}}; n++)
        for (int64_t h = 0; h < {{H}}; h++) {
            const int64_t l = n - {{stream.start}};
            norm_rotate(&{{stream.x}}, &{{stream.scale}}, &{{cos}}, &{{sin}}, &{{out}});
        }
        {%- endfor %}
    }
}
"""
"""C++ for `compiled_norm_rotate`, as a template of inductor. Elements are expressions in b, n, h and l."""
