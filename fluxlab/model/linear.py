"""Linear layers, computed by oneDNN or MKL on a CPU, whichever is faster there."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxlab.model.attention import BF16_TILES
from fluxlab.model.operators import operator
from fluxlab.model.packing import for_mkl, for_onednn
from fluxlab.model.torch_ops import MKL_PACKS, ONEDNN_DTYPES, mkl_linear, onednn_linear, pack_for_mkl, uses_mkl


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether `linear` may use oneDNN's operator, which has no gradient and ignores autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and ONEDNN_DTYPES.get(x.dtype, False)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Return x·weightᵀ + bias, passed through a tanh-GELU if `gelu`.

    On the CPU oneDNN's operator computes the GELU while the product is in registers, which takes 0.55 of the time of
    the two operators (1024 → 4096, fp32). In fp32 a row of the result does not depend on how many rows there are, as it
    may with `F.linear`, which calls MKL; a single row would be the exception. In bf16 `F.linear` calls oneDNN too, with
    the same bits. Compiled code calls MKL in fp32.
    """
    if uses_onednn(x, weight):
        single = x.ndim > 1 and x.numel() == x.shape[-1]
        if torch.compiler.is_compiling():
            if gelu or x.dtype != torch.float32 or not single:
                return compiled_linear(x, weight, bias, gelu)
        else:
            return _single_row(x, weight, bias, gelu) if single else _linear(x, weight, bias, gelu)
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


MKL_FIRST = MKL_PACKS and BF16_TILES
"""Whether fp32 products of samples with many rows are MKL's where code is not compiled.

On processors with AMX they take 0.85 to 0.93 of the time of oneDNN's if weights are packed. On one without they took
1.15 of it.
"""

MKL_ROWS = 64
"""The least rows of a sample for which this is so. With fewer than 32 rows MKL's bits may depend on the thread."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    if MKL_FIRST and x.dtype == torch.float32 and not gelu and x.ndim == 3 and x.shape[1] >= MKL_ROWS:
        return _mkl_linear(x, weight, bias)
    return onednn_linear(x, for_onednn(weight, x.numel() // x.shape[-1]), bias, gelu)


def _single_row(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return _linear(torch.cat((x, x)), weight, bias, gelu)[: len(x)]


_same_bits: dict[tuple[int, ...], bool] = {}


def _mkl_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return MKL's product. The bits of a sample of x `(B, L, K)` do not depend on the batch.

    MKL does not promise that. So the first batch of each shape is computed sample by sample too, and if its bits are
    others than those of one product, all batches are.
    """
    samples, rows = x.shape[:2]
    case = (samples, rows, *weight.shape, torch.get_num_threads())
    if samples == 1 or _same_bits.get(case):
        return mkl_linear(x, for_mkl(weight, samples * rows), weight, bias)
    packed = for_mkl(weight, rows) if case in _same_bits else pack_for_mkl(weight, rows)
    each = torch.cat([mkl_linear(sample, packed, weight, bias) for sample in x.split(1)])
    if case not in _same_bits:
        _same_bits[case] = each.equal(mkl_linear(x, for_mkl(weight, samples * rows), weight, bias))
    return each


def _linear_of_compiled_code(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    if x.numel() == x.shape[-1]:
        return _single_row(x, weight, bias, gelu)
    if uses_mkl(x.dtype, gelu):
        return mkl_linear(x, for_mkl(weight, x.numel() // x.shape[-1]), weight, bias)
    return _linear(x, weight, bias, gelu)


# Inductor would take oneDNN's own operator for one whose weight it has packed itself.
compiled_linear = operator(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor",
    _linear_of_compiled_code,
    lambda x, weight, bias, gelu: x.new_empty(*x.shape[:-1], weight.shape[0]),
)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class JoinedLinear(Linear):
    """One projection of several inputs `(B, L, Kᵢ)`, whose channels are concatenated.

    Compiled code adds the products of the inputs in fp32, which saves a copy of them. In bf16 each would be rounded.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        if not (torch.compiler.is_compiling() and x.dtype == torch.float32 and uses_onednn(x, self.weight)):
            return super().forward(torch.cat(inputs, dim=-1))
        weights = self.weight.split([x.shape[-1] for x in inputs], dim=1)
        first, *rest = (linear(x, weight, None) for x, weight in zip(inputs, weights, strict=True))
        y = sum(rest, first)
        return y if self.bias is None else y + self.bias


class LinearGELU(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, gelu=True)


class ParallelLinear(nn.Linear):
    """One projection for attention and MLP. Returns its first `attention_width` channels, and the GELU of the rest.

    The GELU is of tokens from `first` on.
    """

    def __init__(self, dim: int, attention_width: int, mlp_width: int):
        super().__init__(dim, attention_width + mlp_width)
        self.widths = (attention_width, mlp_width)

    def forward(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        if not uses_onednn(x, self.weight):
            qkv, mlp = F.linear(x, self.weight, self.bias).split(self.widths, dim=-1)
            return qkv, F.gelu(mlp[:, first:], approximate="tanh")
        (w_qkv, w_mlp), (b_qkv, b_mlp) = self.weight.split(self.widths), self.bias.split(self.widths)
        return linear(x, w_qkv, b_qkv), linear(x[:, first:] if first else x, w_mlp, b_mlp, gelu=True)
