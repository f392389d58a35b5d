"""The PyTorch path of the ops: the formulas on PyTorch's own operators, their matrix products, and
dropout's mask.

The products choose between PyTorch's CPU libraries. On x86, PyTorch uses MKL for float32 and oneDNN
for bfloat16. On AMD processors with AVX-512, oneDNN takes half of MKL's time: MKL uses only AVX2 on
processors that are not Intel's (docs/internals/architecture.md). Inductor calls the same operator.
``torch.backends.mkldnn.flags(enabled=False)`` turns oneDNN off here as everywhere in PyTorch. Where
oneDNN does not multiply bfloat16 or float16, products run in float32.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.ops.plans import define_op
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import as_plain
from stablelora_kernels.utils.tensors import drop_share

# From this many multiplications on, oneDNN is faster; it takes some microseconds longer to start.
ONEDNN_FROM = 1 << 22
# From this many on, it saves more time than a Python autograd function around it costs.
FUNCTION_FROM = 1 << 24
# Below this many rows, call plain operators under ordinary autograd, which take less time than a
# Python autograd function. They save as much without dropout; with it they also save the masked x.
FEW_ROWS, FEW_ROWS_WITHOUT_DROPOUT = 64, 512
# From this many rows on, float32 copies pay where the processor does not multiply a dtype of low
# precision.
FLOAT32_ROWS = 8
# Up to so many elements of a mask, fewer operators are faster.
BERNOULLI_UP_TO = 8192
_unsafe_view = torch.ops.aten._unsafe_view.default


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return "AuthenticAMD" in platform.processor()


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


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For float32 copies, which autocast would cast back."""
    is_on = torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()
    return torch.autocast(x.device.type, enabled=False) if is_on else nullcontext()


def by_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether wide products run on oneDNN although PyTorch would use MKL."""
    if not ONEDNN_HELPS or dtype != torch.float32 or device.type != "cpu":
        return False
    if torch.compiler.is_compiling():
        # An exported program must run without this package. A compiled graph checks PyTorch's
        # switch when it runs.
        return not torch.compiler.is_exporting()
    return torch._C._get_mkldnn_enabled()


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
        # Scale the sum before it is rounded: what float16 holds as zero, or as infinity, may be an
        # ordinary number after it. Zeros, although beta is 0: Inductor's addmm multiplies them by
        # it.
        return torch.addmm(a.new_zeros(1, b.shape[1]), a, b, beta=0, alpha=scaling)
    return product(a, b).mul_(scaling)


# A compiled graph needs an op that chooses at run time: sizes may be symbolic while tracing, and
# Inductor knows PyTorch's own operator for inference only.
wide_product_op = define_op(
    "wide_product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor",
    lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]), ("cpu",),
)(product)  # fmt: skip


def wide_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`product` with a weight, which also runs on oneDNN in a compiled graph."""
    if torch.compiler.is_compiling() and by_onednn(a.dtype, a.device):
        return wide_product_op(a, b, bias)
    return product(a, b, bias)


def add_wide_product(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add ``a b`` to ``to`` in place. No gradients."""
    # oneDNN's operator cannot accumulate, but even with a separate addition it is faster than MKL.
    return to.add_(wide_product(a, b)) if by_onednn(a.dtype, a.device) else to.addmm_(a, b)


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
    return FEW_ROWS if dropout_p else FEW_ROWS_WITHOUT_DROPOUT


def as_matrix(x: Tensor) -> Tensor:
    """View [..., K] as [M, K]."""
    # Return a matrix itself: a view would be a node of the autograd graph and cost a third of a
    # small product. Count the rows: PyTorch cannot infer them where K is 0.
    return x if x.dim() == 2 else x.reshape(row_count(x), x.shape[-1])


def like_rows_of(y: Tensor, x: Tensor) -> Tensor:
    """``y`` [M, N], of a custom autograd function, with the leading sizes of x [..., K]: [..., N]."""
    # Not a view to autograd, which forbids changing such a function's views in place.
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _is_small(size: int) -> bool:
    """Whether a mask of so many elements takes its time for calls of operators, rather than for its
    elements.
    """
    return not torch.compiler.is_compiling() and size <= BERNOULLI_UP_TO


def draw_keep(x: Tensor, dropout_p: float) -> tuple[Tensor, float]:
    """Draw a bool keep-mask of x's shape from torch's generator. Return it with its exact dropout
    probability.
    """
    return _draw(x.shape, x.device, dropout_p)


def _draw(
    shape: Sequence[int],
    device: torch.device,
    dropout_p: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float]:
    size, dropout_p = math.prod(shape), drop_share(dropout_p)
    if device.type != "cpu" or _is_small(size):
        keep = torch.empty(shape, dtype=torch.bool, device=device)
        return keep.bernoulli_(1 - dropout_p, generator=generator), dropout_p
    # On a CPU, bernoulli_ draws one double per element sequentially. 16 bits per element, four
    # elements per int64 word, are several times faster.
    count = -(-size // 4)
    if torch.compiler.is_compiling():
        # torch.compile does not support random_(). These are the same bits: randint's offset flips
        # a word's highest bit.
        words = torch.randint(-(2**63), 2**63 - 1, (count,), device="cpu") ^ -(2**63)
    else:
        words = torch.empty(count, dtype=torch.int64, device="cpu").random_(
            -(2**63), None, generator=generator
        )
    return words.view(torch.int16)[:size].view(shape) >= round(dropout_p * 65536) - 32768, dropout_p


def can_redraw(x: Tensor) -> bool:
    """Whether :func:`draw_keep_again` can draw the mask of x."""
    # A compiled graph keeps no state of a generator, and a CUDA graph can't read it.
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def draw_keep_and_state(shape: Sequence[int], dropout_p: float) -> tuple[Tensor, Tensor, float]:
    """:func:`draw_keep` on a CPU, and between its results the state that :func:`draw_keep_again`
    draws the same mask from.

    Other threads draw from torch's generator too. A generator of the mask's own makes the mask
    follow from the state alone, whatever they draw meanwhile; torch's generator then continues
    behind it.
    """
    state = torch.get_rng_state()
    generator = torch.Generator()
    generator.set_state(state)
    keep, dropout_p = _draw(shape, torch.device("cpu"), dropout_p, generator)
    torch.set_rng_state(generator.get_state())
    return keep, state, dropout_p


def draw_keep_again(state: Tensor, shape: Sequence[int], dropout_p: float) -> Tensor:
    """The keep-mask that :func:`draw_keep_and_state` returned with ``state``."""
    generator = torch.Generator()
    generator.set_state(state)
    return _draw(shape, torch.device("cpu"), dropout_p, generator)[0]


def draw_dropout(x: Tensor, dropout_p: float, scaling: float) -> tuple[Tensor | None, float]:
    """The keep-mask, None without dropout, and s' = scaling / (1 - p)."""
    if not dropout_p:
        return None, scaling
    keep, dropout_p = draw_keep(x, dropout_p)
    return keep, scaling / (1 - dropout_p)


def as_float(keep: Tensor, dtype: torch.dtype) -> Tensor:
    # PyTorch vectorizes the conversion from uint8, but not from bool.
    return keep.view(torch.uint8).to(dtype)


def masked(x: Tensor, keep: Tensor | None) -> Tensor:
    """X ∘ keep."""
    if keep is None:
        return x
    return x * (keep if _is_small(keep.numel()) else as_float(keep, x.dtype))


def with_branch(base: Tensor, s: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``base + scaling S B^T`` of matrices of one dtype."""
    if scaling == 0:
        # With alpha 0, BLAS does not read S and B, whatever they hold.
        return base + torch.mm(s, lora_B.t()) * 0.0
    return torch.addmm(base, s, lora_B.t(), alpha=scaling)


# MKL's dtypes. It is up to several times faster with a thin product's small operand first: in dB,
# and on AMD's processors in dS. oneDNN is faster with the tall one first.
_OF_MKL = (torch.float32, torch.float64)


def torch_ds(grad: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """dS = s' dY B, [M, r]. All tensors have one dtype."""
    if IS_AMD and grad.dtype in _OF_MKL and not by_onednn(grad.dtype, grad.device):
        return product(lora_B.t(), grad.t()).mul_(scaling).t()
    return scaled_product(grad, lora_B, scaling)


def torch_db(grad: Tensor, s: Tensor, scaling: float, lora_dtype: torch.dtype) -> Tensor:
    """dB = s' dY^T S, [N, r], in ``lora_dtype``."""
    if grad.dtype in _OF_MKL:
        # Scale before float16, which may be the dtype of A and B, rounds the sum.
        db = product(s.t(), grad).mul_(scaling)
        return db.t().to(lora_dtype, memory_format=torch.contiguous_format)
    if grad.dtype != torch.float16:
        return product(grad.t(), s).to(lora_dtype).mul_(scaling)
    if lora_dtype == torch.float16:
        return scaled_product(grad.t(), s, scaling)
    # Sums over all rows may be beyond float16, which their dtype is not.
    return product(grad.t().to(lora_dtype), s.to(lora_dtype)).mul_(scaling)


def _in_float32(p: Projection) -> Projection:
    """Without a copy of the weight, which is made when it is read."""
    bias, lora_A, lora_B = (None if t is None else t.float() for t in p[1:4])
    return Projection(p.weight, bias, lora_A, lora_B, p.scaling)


def torch_fwd(
    x: Tensor, projections: Sequence[Projection], keeps: Sequence[Tensor | None], base: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The Y's, and the unscaled S = (X ∘ keep) A^T. All tensors but ``base`` have one dtype; the
    scalings are s'.

    ``weight_dtype``: what the values of a quantized weight are rounded to, if it is not x's dtype.
    """
    if by_float32(x):
        with without_autocast(x):
            ys, every_s = torch_fwd(
                x.float(), [_in_float32(p) for p in projections], keeps, base, x.dtype
            )
        return [y.to(x.dtype if base is None else base.dtype) for y in ys], [
            s.to(x.dtype) for s in every_s
        ]
    lora_As: list[Any] = [p.lora_A for p in projections]
    # S first: then X is in the cache for the wide products.
    if len(lora_As) > 1 and not any(keep is not None for keep in keeps):
        every_s = [*product(x, torch.cat(lora_As).t()).split([a.shape[0] for a in lora_As], 1)]
    else:
        every_s = [product(masked(x, keep), a.t()) for a, keep in zip(lora_As, keeps, strict=True)]
    ys = []
    for (weight, bias, _, lora_B, scaling), s in zip(projections, every_s, strict=True):
        assert lora_B is not None
        if base is None:
            assert weight is not None
            y = wide_product(x, as_plain(weight, weight_dtype or x.dtype).to(x.dtype).t(), bias)
            # In place, the branch needs no second activation.
            ys.append(
                y.addmm_(s, lora_B.t(), alpha=scaling)
                if scaling != 0
                else with_branch(y, s, lora_B, scaling)
            )
        elif base.dtype == s.dtype:
            ys.append(with_branch(base, s, lora_B, scaling))
        else:
            ys.append(base.add(torch.mm(s, lora_B.t()), alpha=scaling).to(base.dtype))
    return ys, every_s


def expanded(grad: Tensor) -> Tensor:
    """Give a broadcast gradient, such as sum()'s, its own memory; otherwise each product would
    expand it again.
    """
    # Older versions of torch.compile cannot ask for strides.
    return grad.contiguous() if not torch.compiler.is_compiling() and 0 in grad.stride() else grad


def torch_bwd(
    x: Any, grads: Sequence[Tensor], projections: Sequence[Projection], s: Sequence[Any], keeps: Sequence[Tensor | None],
    lora_dtype: torch.dtype, need_x: bool, need_a: bool, need_b: bool, weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:  # fmt: skip
    """dX, and the dA's and dB's in ``lora_dtype``. All tensors have one dtype; the scalings are s'.

    Without a weight, dX is the branch's part alone. ``weight_dtype`` is that of :func:`torch_fwd`.
    """
    if by_float32(grads[0]):
        x, *s = (None if t is None else t.float() for t in (x, *s))
        projections = [_in_float32(p) for p in projections]
        in_float32, needs = [grad.float() for grad in grads], (need_x, need_a, need_b)
        found, *rest = torch_bwd(
            x, in_float32, projections, s, keeps, lora_dtype, *needs, grads[0].dtype
        )
        return None if found is None else found.to(grads[0].dtype), *rest  # type: ignore[return-value]
    dx: Tensor | None = None
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    every_ds: list[Tensor] = []
    masks = [None if keep is None else as_float(keep, grads[0].dtype) for keep in keeps]
    lora_As: list[Any] = [p.lora_A for p in projections]
    # Products that read only dY come before the wide product, while dY is in the cache.
    for i, (grad, p, mask) in enumerate(zip(grads, projections, masks, strict=True)):
        assert p.lora_B is not None
        if need_x or need_a:
            every_ds.append(torch_ds(grad, p.lora_B, p.scaling))
        if need_b:
            dbs.append(torch_db(grad, s[i], p.scaling, lora_dtype))
        if not need_x:
            continue
        if p.weight is None:
            dx = product(every_ds[i], lora_As[i])
            dx = dx if mask is None else dx.mul_(mask)
        else:
            weight = as_plain(p.weight, weight_dtype or grad.dtype).to(grad.dtype)
            dx = wide_product(grad, weight) if dx is None else add_wide_product(dx, grad, weight)
            # In a call with dropout, a projection without a mask has no branch.
            dx = dx if mask is None else dx.addcmul_(product(every_ds[i], lora_As[i]), mask)
    if (
        dx is not None
        and projections[0].weight is not None
        and not any(mask is not None for mask in masks)
    ):
        dx.addmm_(_joined(every_ds, 1), _joined(lora_As, 0))
    if need_a:
        for ds, mask in zip(every_ds, masks, strict=True):
            das.append(product(ds.t(), x if mask is None else x * mask).to(lora_dtype))
    return dx, das, dbs


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
