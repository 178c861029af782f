"""Linear layers, computed by oneDNN on a CPU where it is faster."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxlab.model.operators import operator
from fluxlab.model.torch_ops import ONEDNN_DTYPES, onednn_linear


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
    does with MKL, which `F.linear` calls; a single row would be the exception. Which product is faster depends on the
    processor. In bf16 `F.linear` calls oneDNN too, with the same bits. Compiled code calls `F.linear`, with no Python
    in between, and oneDNN for the GELU only.
    """
    if uses_onednn(x, weight):
        if x.ndim > 1 and x.numel() == x.shape[-1]:
            return linear(torch.cat((x, x)), weight, bias, gelu)[: len(x)]
        if not torch.compiler.is_compiling():
            return onednn_linear(x, weight, bias, gelu)
        if gelu:
            return _onednn_gelu(x, weight, bias)
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


# Inductor would take oneDNN's own operator for one whose weight it has packed itself.
_onednn_gelu = operator(
    "onednn_gelu(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: onednn_linear(x, weight, bias, gelu=True),
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LinearGELU(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, gelu=True)


class ParallelLinear(nn.Linear):
    """One projection for attention and MLP. Returns its first `attention_width` channels, and the GELU of the rest."""

    def __init__(self, dim: int, attention_width: int, mlp_width: int):
        super().__init__(dim, attention_width + mlp_width)
        self.widths = (attention_width, mlp_width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not uses_onednn(x, self.weight):
            qkv, mlp = F.linear(x, self.weight, self.bias).split(self.widths, dim=-1)
            return qkv, F.gelu(mlp, approximate="tanh")
        (w_qkv, w_mlp), (b_qkv, b_mlp) = self.weight.split(self.widths), self.bias.split(self.widths)
        return linear(x, w_qkv, b_qkv), linear(x, w_mlp, b_mlp, gelu=True)
