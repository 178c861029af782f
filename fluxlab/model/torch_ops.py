"""PyTorch operators without a public interface. They are called in this file only.

`F.scaled_dot_product_attention` does not return the log-sum-exp of its kernels, and `F.linear` does not fuse the GELU.
The operators below do. They may change with any release of PyTorch: `tests/unit/test_torch_ops.py` compares each with
its public counterpart, and requires that the installed version is listed here.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TRIED_VERSIONS = ("2.13",)
"""PyTorch versions with which the tests have passed."""

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_DTYPES = {torch.float32: _ONEDNN, torch.bfloat16: _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()}
"""The dtypes that oneDNN multiplies on this CPU. bf16 needs AVX-512."""
PACKED_BITS = {torch.float32: torch.__version__.startswith(TRIED_VERSIONS), torch.bfloat16: True}
"""Whether oneDNN's products by packed weights have the bits of others. In PyTorch 2.8 they do not in fp32."""
MKL_PACKS = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
"""Whether MKL is there, and multiplies by weights that were packed before."""
GRAPH_PASSES = torch.__version__.startswith(TRIED_VERSIONS) and _ONEDNN and MKL_PACKS
"""Whether graphs of torch.compile are changed before code is generated. It relies on how inductor calls operators."""

CONVERSION = torch.ops.prims.convert_element_type.default
"""What `Tensor.to(dtype)` is in a graph of torch.compile."""


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """Return x·weightᵀ + bias, passed through a tanh-GELU if `gelu`. It has no gradient."""
    attr, algorithm = ("gelu", "tanh") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm)


def pack_for_onednn(weight: Tensor) -> Tensor:
    """Return a weight `(N, K)` in the order in which oneDNN's products read it, for `onednn_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def pack_for_mkl(weight: Tensor, rows: int) -> Tensor:
    """Return an fp32 weight `(N, K)` in the order in which MKL's products with `rows` rows read it."""
    return torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)


def mkl_linear(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x·weightᵀ + bias in fp32. `packed` is the weight, packed for as many rows as x has."""
    return torch.ops.mkl._mkl_linear(x, packed, weight, bias, x.numel() // x.shape[-1])


def uses_mkl(dtype: torch.dtype, gelu: bool) -> bool:
    """Return whether products in compiled code are MKL's. oneDNN's are slower in fp32, but include the GELU."""
    return dtype == torch.float32 and MKL_PACKS and not gelu


def packed_linear(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """Return the product of compiled code by a weight that was packed for it."""
    return mkl_linear(x, packed, weight, bias) if uses_mkl(x.dtype, gelu) else onednn_linear(x, packed, bias, gelu)


def lower_packed_linear(operator: Callable) -> None:
    """Let inductor call MKL and oneDNN where a graph has `operator`, which is `packed_linear`, without Python.

    Inductor has its own lowerings of their operators, but only for weights that are constants of the graph.
    """
    from torch._inductor.lowering import fallback_handler, register_lowering

    mkl = fallback_handler(torch.ops.mkl._mkl_linear.default, add_to_fallback_set=False)
    onednn = fallback_handler(torch.ops.mkldnn._linear_pointwise.default, add_to_fallback_set=False)

    @register_lowering(operator, type_promotion_kind=None)
    def lowering(x, packed, weight, bias, gelu):
        if uses_mkl(x.get_dtype(), gelu):
            return mkl(x, packed, weight, bias, math.prod(x.get_size()[:-1]))
        return onednn(x, packed, bias, "gelu" if gelu else "none", [], "tanh" if gelu else "")


def lower_norm_rotate(operator: Callable, code: str) -> None:
    """Let inductor generate C++ from a template where a graph has `operator`, which is `compiled_norm_rotate`.

    The operator itself is called for other dtypes than fp32 and bf16, if the channels of a head are not 32·n, and on
    a processor without vectors.
    """
    from torch._inductor import ir
    from torch._inductor.codegen.cpp import get_export_declaration
    from torch._inductor.codegen.cpp_template import CppTemplate
    from torch._inductor.codegen.cpp_utils import cexpr_index
    from torch._inductor.lowering import fallback_handler, register_lowering

    generic = fallback_handler(operator, add_to_fallback_set=False)

    class Template(CppTemplate):
        def render(self, kernel, template_buffer_node=None, **_) -> str:
            *streams, cos, sin = self.input_nodes
            out = template_buffer_node or self.output_node
            names = [f"{name}{i}" for i in range(len(streams) // 2) for name in ("x", "scale")] + ["cos", "sin"]
            signature = kernel.def_kernel(dict(zip(names, self.input_nodes, strict=True)), {"out": out})
            number = lambda size: cexpr_index(kernel.rename_indexing(size))  # noqa: E731
            B, H, _, d = map(number, out.get_size())
            angle = ["b" if cos.get_size()[0] != 1 else "0", "h" if cos.get_size()[1] != 1 else "0", "n", "0"]
            values = {"out": kernel.index(out, ["b", "h", "n", "0"]), "streams": []}
            values |= {"cos": kernel.index(cos, angle), "sin": kernel.index(sin, angle)}
            start = 0
            for x, scale in zip(streams[::2], streams[1::2], strict=True):
                end = start + x.get_size()[1]
                places = {"x": kernel.index(x, ["b", "l", "h", "0"]), "scale": kernel.index(scale, ["0"])}
                values["streams"].append(places | {"start": number(start), "end": number(end)})
                start = end
            values |= {"export": get_export_declaration(), "profile": kernel.maybe_codegen_profile()}
            return self.header().getvalue() + self._template_from_string(code).render(
                **values, signature=signature, B=B, H=H, d=d
            )

    @register_lowering(operator, type_promotion_kind=None)
    def lowering(x, scale, x2, scale2, cos, sin, dtype, by_token):
        tensors = [tensor for tensor in (x, scale, x2, scale2, cos, sin) if tensor is not None]
        B, L, H, d = x.get_size()
        dtypes = {dtype, *(tensor.get_dtype() for tensor in tensors)}
        known = dtypes <= {torch.float32, torch.bfloat16} and cos.get_dtype() == torch.float32
        if not (known and d % 32 == 0 and inductor_vector_bits()):
            return generic(x, scale, x2, scale2, cos, sin, dtype, by_token)
        N = L if x2 is None else L + x2.get_size()[1]
        stride = [H * N * d, d, H * d, 1] if by_token else None
        inputs = [ir.ExternKernel.require_stride1(ir.ExternKernel.realize_input(tensor)) for tensor in tensors]
        layout = ir.FixedLayout(x.get_device(), dtype, [B, H, N, d], stride)
        template = Template("norm_rotate", inputs, layout, torch.get_num_threads())
        out = template.generate().output_node()
        out.data.data.allow_epilogue_fusion = False
        return out


def inductor_pass(change: Callable[[torch.fx.Graph], None], files: Sequence[str], key: str) -> object:
    """Return a pass of inductor that calls `change`. Inductor keeps its code until files, this file or `key` change."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            change(graph)

        def uuid(self) -> object:
            return get_hash_for_files((*files, __file__), key)

    return Pass()


def inductor_vector_bits() -> int:
    """Return the length in bits of the vectors for which inductor compiles code on this CPU. 0: it uses none."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # loads inductor

    return pick_vec_isa().bit_width()


def lerp_(tensors: list[Tensor], ends: list[Tensor], weight: float | Tensor) -> None:
    """Move each of `tensors` in place towards the tensor in `ends`, by the share `weight` of their difference.

    A tensor `weight` is 0-d and on the device of the others.
    """
    if not isinstance(weight, Tensor):
        torch._foreach_lerp_(tensors, ends, weight)
        return
    differences = torch._foreach_sub(ends, tensors)
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(tensors, differences)


def copy_(tensors: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each tensor of `sources` into the tensor of `tensors`."""
    torch._foreach_copy_(tensors, sources)


def zero_(tensors: list[Tensor]) -> None:
    """Set all `tensors` to zero."""
    torch._foreach_zero_(tensors)


def fused_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output of `F.scaled_dot_product_attention`, and the log-sum-exp of its kernel.

    The kernel is the one that `F.scaled_dot_product_attention` chooses itself. q, k and v are `(B, H, n, d)` in one
    dtype. The output is the same, bit by bit on the CPU. The log-sum-exp is `(B, H, n)` in fp32 or fp64.
    """
    ops, backend = torch.ops.aten, torch.nn.attention.SDPBackend
    scale = 1 / math.sqrt(q.shape[-1])
    choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask)
    if choice == backend.FLASH_ATTENTION.value and q.device.type == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    elif choice == backend.FLASH_ATTENTION.value:
        padded = [F.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v)]  # the kernel needs head widths divisible by 8
        out, lse = ops._scaled_dot_product_flash_attention(*padded, scale=scale)[:2]
    elif choice == backend.EFFICIENT_ATTENTION.value:
        out, lse = ops._scaled_dot_product_efficient_attention(q, k, v, _aligned(mask, q, k), True)[:2]
    elif choice == backend.CUDNN_ATTENTION.value:
        out, lse = ops._scaled_dot_product_cudnn_attention(q, k, v, mask, True)[:2]
    else:  # no fused kernel, for instance for some mask shapes: the formula has no log-sum-exp to return
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        lse = _log_sum_exp(q, k, mask)
    return out[..., : v.shape[-1]], lse.detach().flatten(2)[..., : q.shape[2]]  # some kernels pad


def _aligned(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return a mask as the memory-efficient kernel needs it: expanded, with rows that start at multiples of 16."""
    if mask is None:
        return None
    keys = k.shape[2]
    return F.pad(mask, (0, -keys % 16))[..., :keys].expand(*q.shape[:3], keys)


@torch.no_grad()
def _log_sum_exp(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(exact) @ k.to(exact).mT / math.sqrt(q.shape[-1])
    return torch.logsumexp(scores if mask is None else scores + mask, dim=-1)
