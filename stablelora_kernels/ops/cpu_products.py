"""Matrix products of the PyTorch path: which of PyTorch's CPU libraries multiplies, and in which
dtype.

On x86, PyTorch uses MKL for float32 and oneDNN for bfloat16. On AMD processors with AVX-512, oneDNN
takes half of MKL's time: MKL uses only AVX2 on processors that are not Intel's.
Inductor calls the same operator.
``torch.backends.mkldnn.flags(enabled=False)`` turns oneDNN off here as everywhere in PyTorch. Where
oneDNN does not multiply bfloat16 or float16, products run in float32.
"""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stablelora_kernels.ops.matrices import row_count
from stablelora_kernels.ops.plans import define_op

# From this many multiplications on, oneDNN is faster; it takes some microseconds longer to start.
ONEDNN_FROM = 1 << 22
# From this many on, it saves more time than a Python autograd function around it costs.
FUNCTION_FROM = 1 << 24
# Below this many rows, call plain operators under ordinary autograd, which take less time than a
# Python autograd function. They save as much without dropout; with it they also save the masked x.
FEW_ROWS = 64
FEW_ROWS_WITHOUT_DROPOUT = 512
# From this many rows on, float32 copies pay where the processor does not multiply a dtype of low
# precision.
FLOAT32_ROWS = 8
# MKL's dtypes. It is up to several times faster with a thin product's small operand first: in dB
# from this many multiplications on, and on AMD's processors in dS. oneDNN is faster with the tall
# one first.
_OF_MKL = (torch.float32, torch.float64)
SMALL_FIRST_FROM = 1 << 22

# The processor.


def _is_amd() -> bool:
    try:
        first_core = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return "AuthenticAMD" in platform.processor()
    return "AuthenticAMD" in first_core


def onednn_helps(is_amd: bool) -> bool:
    """Whether oneDNN is there and multiplies float32 faster than MKL, on a processor of AMD's or of
    another vendor.
    """
    return (
        is_amd
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


# Module constants, because torch.compile reads them as such.
IS_AMD = _is_amd()
ONEDNN_HELPS = onednn_helps(IS_AMD)


def _is_multiplied(name: str) -> bool:
    """Whether oneDNN has the processor's instructions for a dtype. PyTorch builds without oneDNN
    lack the query.
    """
    query = f"_is_mkldnn_{name}_supported"
    return hasattr(torch.ops.mkldnn, query) and bool(getattr(torch.ops.mkldnn, query)())


MULTIPLIED = {torch.bfloat16: _is_multiplied("bf16"), torch.float16: _is_multiplied("fp16")}


def by_float32(x: Tensor) -> bool:
    """Whether products of x's low precision run in float32: PyTorch's own loops take many times as
    long.
    """
    if x.dtype not in MULTIPLIED or x.device.type != "cpu":
        return False
    # A compiled graph keeps what held as it was traced.
    return not (
        MULTIPLIED[x.dtype] and (torch.compiler.is_compiling() or torch._C._get_mkldnn_enabled())
    )


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """For float32 copies, which autocast would cast back."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def by_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether wide products run on oneDNN although PyTorch would use MKL."""
    if not ONEDNN_HELPS or dtype != torch.float32 or device.type != "cpu":
        return False
    if torch.compiler.is_compiling():
        # An exported program must run without this package. A compiled graph checks PyTorch's
        # switch when it runs.
        return not torch.compiler.is_exporting()
    # oneDNN's operator has no forward derivative: PyTorch would take the product for a constant.
    return torch._C._get_mkldnn_enabled() and forward_ad._current_level < 0


# Products. None of them has gradients.


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a b + bias`` for a [M, K], b [K, N] and bias [N] of one dtype."""
    # MKL takes a single row times strided columns: oneDNN would copy the matrix.
    if (
        # First, because it takes no time.
        ONEDNN_HELPS
        and not torch.compiler.is_compiling()
        and a.shape[0] * a.shape[1] * b.shape[1] >= ONEDNN_FROM
        and (a.shape[0] > 1 or b.stride(0) == 1)
        and by_onednn(a.dtype, a.device)
    ):
        # oneDNN reads a bias without regard to its stride.
        bias = None if bias is None else bias.contiguous()
        y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
        return y
    if bias is None:
        return torch.mm(a, b)
    return torch.addmm(bias, a, b)


def multiply_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """:func:`product` in the memory of ``out``."""
    if by_onednn(a.dtype, a.device):
        out.copy_(product(a, b, bias))
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``scaling · a b`` for a [M, K] and b [K, N] of one dtype."""
    if a.dtype == torch.float16 and scaling != 0:
        # Scale the sum before it is rounded: what float16 holds as zero, or as infinity, may be an
        # ordinary number after it. Zeros, although beta is 0: Inductor's addmm multiplies them by
        # it.
        return torch.addmm(a.new_zeros(1, b.shape[1]), a, b, beta=0, alpha=scaling)
    return product(a, b).mul_(scaling)


def _wide_product_fake(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


# A compiled graph needs an op that chooses at run time: sizes may be symbolic while tracing, and
# Inductor knows PyTorch's own operator for inference only.
wide_product_op = define_op(
    "wide_product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor", _wide_product_fake, ("cpu",)
)(product)


def wide_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`product` with a weight, which also runs on oneDNN in a compiled graph."""
    if ONEDNN_HELPS and torch.compiler.is_compiling() and by_onednn(a.dtype, a.device):
        return wide_product_op(a, b, bias)
    return product(a, b, bias)


def add_wide_product(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add ``a b`` to ``to`` in place."""
    if by_onednn(a.dtype, a.device):
        # oneDNN's operator cannot accumulate, but even with a separate addition it is faster than
        # MKL.
        return to.add_(wide_product(a, b))
    return to.addmm_(a, b)


def ds_product(grad: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """dS = scaling dY B, [M, r]. All tensors have one dtype."""
    if scaling != 1.0:
        return scaled_product(grad, lora_B, scaling)
    if IS_AMD and grad.dtype in _OF_MKL and not by_onednn(grad.dtype, grad.device):
        return product(lora_B.t(), grad.t()).t()
    return product(grad, lora_B)


def db_product(grad: Tensor, s: Tensor, scaling: float, lora_dtype: torch.dtype) -> Tensor:
    """dB = scaling dY^T S, [N, r], of a dtype that holds sums over all rows which fit in
    ``lora_dtype``.
    """
    if grad.dtype in _OF_MKL and (
        # First, because a compiled graph compares no sizes.
        torch.compiler.is_compiling()
        or grad.shape[0] * grad.shape[1] * s.shape[1] >= SMALL_FIRST_FROM
    ):
        db = product(s.t(), grad).t().contiguous()
    elif grad.dtype == torch.float16 and lora_dtype != torch.float16:
        # Sums over all rows may be beyond float16, which their dtype is not.
        db = product(grad.t().to(lora_dtype), s.to(lora_dtype))
    elif scaling != 1.0:
        return scaled_product(grad.t(), s, scaling)
    else:
        db = product(grad.t(), s)
    return db if scaling == 1.0 else db.mul_(scaling)


# Few rows.


def is_few(x: Tensor, *weights: Tensor | None, limit: int = FEW_ROWS) -> bool:
    """Whether a call on x [..., K] is fastest as plain operators under ordinary autograd."""
    # A compiled graph serves any number of rows and has no Python overhead.
    if torch.compiler.is_compiling() or row_count(x) >= limit:
        return False
    # A wide product on oneDNN saves more time than the autograd function costs, and autograd does
    # not support it.
    wide = any(w is not None and row_count(x) * w.numel() >= FUNCTION_FROM for w in weights)
    return not (wide and by_onednn(x.dtype, x.device))


def few_rows(x: Tensor, dropout_p: float, needs_gradients: bool) -> int:
    """The ``limit`` of :func:`is_few` for a single projection."""
    if x.dtype == torch.float16 and needs_gradients:
        # Autograd would round dY B and dY^T S before it scales them; in float16 that loses what
        # scaled_product keeps.
        return 0
    if by_float32(x):
        return FLOAT32_ROWS
    if dropout_p:
        return FEW_ROWS
    return FEW_ROWS_WITHOUT_DROPOUT
