"""Matrix products on PyTorch's operators: the one place that chooses between PyTorch's CPU libraries.

On x86, PyTorch uses MKL for float32 and oneDNN for bfloat16. On AMD processors with AVX-512, oneDNN takes half of MKL's time:
MKL uses only AVX2 on processors that are not Intel's (docs/internals/architecture.md). Inductor calls the same operator.
``torch.backends.mkldnn.flags(enabled=False)`` turns oneDNN off here as everywhere in PyTorch.
"""

from __future__ import annotations

import math
import platform
from pathlib import Path

import torch
from torch import Tensor

from stablelora_kernels.ops.library import define_op

# From this many multiplications on, oneDNN is faster; it takes some microseconds longer to start.
ONEDNN_FROM = 1 << 22
# From this many on, it saves more time than a Python autograd function around it costs.
FUNCTION_FROM = 1 << 24


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return "AuthenticAMD" in platform.processor()


# A module constant, because torch.compile reads it as one.
ONEDNN_HELPS = (
    torch.backends.mkl.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and _is_amd()
)


def by_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether wide products run on oneDNN although PyTorch would use MKL."""
    if not ONEDNN_HELPS or dtype != torch.float32 or device.type != "cpu":
        return False
    if torch.compiler.is_compiling():
        # An exported program must run without this package. A compiled graph checks PyTorch's switch when it runs.
        return not torch.compiler.is_exporting()
    return torch._C._get_mkldnn_enabled()


def onednn_outweighs_function(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN saves more on the product of x [..., K] and weight [N, K] than an autograd function costs."""
    return row_count(x) * weight.numel() >= FUNCTION_FROM and by_onednn(x.dtype, x.device)


def row_count(x: Tensor) -> int:
    """M of x [..., K]."""
    # Not Size.numel(), which turns symbolic sizes into numbers.
    return math.prod(x.shape[:-1])


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a b + bias`` for a [M, K], b [K, N] and bias [N] of one dtype. No gradients."""
    # MKL takes a single row times strided columns: oneDNN would copy the matrix.
    if (
        not torch.compiler.is_compiling()
        and a.shape[0] * a.shape[1] * b.shape[1] >= ONEDNN_FROM
        and (a.shape[0] > 1 or b.stride(0) == 1)
        and by_onednn(a.dtype, a.device)
    ):
        # oneDNN reads a bias without regard to its stride.
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``scaling · a b`` for a [M, K] and b [K, N] of one dtype. No gradients."""
    if a.dtype == torch.float16 and scaling != 0:
        # Scale the sum before it is rounded: what float16 holds as zero, or as infinity, may be an ordinary number after it.
        # Zeros, although beta is 0: Inductor's addmm multiplies them by it.
        return torch.addmm(a.new_zeros(1, b.shape[1]), a, b, beta=0, alpha=scaling)
    return product(a, b).mul_(scaling)


def _wide_product_fake(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


# A compiled graph needs an op that chooses at run time: sizes may be symbolic while tracing, and Inductor knows PyTorch's own
# operator for inference only.
@define_op("wide_product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor", _wide_product_fake, ("cpu",))
def wide_product_op(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return product(a, b, bias)


def wide_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`product` with a weight, which also runs on oneDNN in a compiled graph."""
    if torch.compiler.is_compiling() and by_onednn(a.dtype, a.device):
        return wide_product_op(a, b, bias)
    return product(a, b, bias)


def add_wide_product(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add ``a b`` to ``to`` in place. No gradients."""
    # oneDNN's operator cannot accumulate, but even with a separate addition it is faster than MKL.
    return to.add_(wide_product(a, b)) if by_onednn(a.dtype, a.device) else to.addmm_(a, b)
