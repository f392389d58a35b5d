"""Products of matrices on PyTorch's operators: the one place that decides which library of PyTorch's computes them.

On x86 PyTorch hands float32 to MKL and bfloat16 to oneDNN. MKL keeps to AVX2 on processors that are not Intel's, where oneDNN
uses AVX-512: on AMD's with AVX-512 its products take half the time (docs/architecture.md). ``torch.compile``'s Inductor calls the
same operator. ``torch.backends.mkldnn.flags(enabled=False)`` turns it off here as everywhere in PyTorch.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

from stablelora_kernels.ops.library import NAMESPACE

# Multiplications from which oneDNN is the faster, as it takes some microseconds more to start; and from which it saves more
# than a Python autograd function around it costs.
ONEDNN_FROM = 1 << 22
FUNCTION_FROM = 1 << 24
# Of PyTorch 2.7.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return "AuthenticAMD" in platform.processor()


# Plain module state, which torch.compile takes as it is.
ONEDNN_HELPS = (
    torch.backends.mkl.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and _is_amd()
)


def by_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether wide products are oneDNN's against what PyTorch would take."""
    if not ONEDNN_HELPS or dtype != torch.float32 or device.type != "cpu":
        return False
    if torch.compiler.is_compiling():
        # An exported program is to run where this package is not. The switch is asked as the graph runs.
        return not _is_exporting()
    return torch._C._get_mkldnn_enabled()


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether so much is saved on a product of x [..., K] and weight [N, K]."""
    rows = x.numel() // x.shape[-1]
    return rows * weight.numel() >= FUNCTION_FROM and by_onednn(x.dtype, x.device)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a b + bias``: [M, K] by [K, N], of one dtype; bias [N]. No gradients."""
    # A single row by columns that lie apart is MKL's: oneDNN would copy the matrix.
    if (
        not torch.compiler.is_compiling()
        and a.shape[0] * a.shape[1] * b.shape[1] >= ONEDNN_FROM
        and (a.shape[0] > 1 or b.stride(0) == 1)
        and by_onednn(a.dtype, a.device)
    ):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


# In a compiled graph a product with the weight is an op that chooses as it runs: sizes may be symbols there, of which nothing
# can be asked, and Inductor knows PyTorch's operator for inference alone.

torch.library.define(f"{NAMESPACE}::wide_product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor")


@torch.library.impl(f"{NAMESPACE}::wide_product", "cpu")
def _wide_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return product(a, b, bias)


@torch.library.register_fake(f"{NAMESPACE}::wide_product")
def _wide_product_fake(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def wide_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`product` with a weight."""
    if torch.compiler.is_compiling() and by_onednn(a.dtype, a.device):
        return torch.ops.stablelora_kernels.wide_product(a, b, bias)
    return product(a, b, bias)


def add_wide_product(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``to + a b``, stored in ``to``. No gradients."""
    # oneDNN's has no such form; adding costs less than the other library would.
    return to.add_(wide_product(a, b)) if by_onednn(a.dtype, a.device) else to.addmm_(a, b)
