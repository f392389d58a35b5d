"""``lora_linear``, ``lora_linear_group``, ``lora_mlp`` and ``lora_branch``. They check their
arguments once and call the op. ``lora_linear_cross_entropy`` has a file of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.activations import ACTIVATIONS
from stablelora_kernels.cross_entropy import lora_linear_cross_entropy, lora_linear_log_probs
from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.dispatch.problem import MAX_GROUP
from stablelora_kernels.ops.checks import FLOAT_DTYPES, check, check_experts
from stablelora_kernels.ops.lora_experts.autograd import lora_experts_op
from stablelora_kernels.ops.lora_experts.call import ExpertStack
from stablelora_kernels.ops.lora_linear.autograd import lora_linear_op
from stablelora_kernels.ops.lora_mlp.autograd import lora_mlp_op
from stablelora_kernels.ops.lora_mlp.call import Options
from stablelora_kernels.ops.plans import find, key_of, remember
from stablelora_kernels.packed_experts import (
    FP8Experts,
    MXFP4Experts,
    NF4Experts,
    PackedExperts,
)
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import FP4Weight, FP8Weight, NF4Weight, QuantizedWeight
from stablelora_kernels.utils.tensors import autocast_dtype, cast
from stablelora_kernels.utils.validation import check_float, check_tiles

__all__ = [
    "FLOAT_DTYPES",
    "FP4Weight",
    "FP8Experts",
    "FP8Weight",
    "LoRAWeights",
    "MXFP4Experts",
    "NF4Experts",
    "NF4Weight",
    "PackedExperts",
    "lora_branch",
    "lora_experts",
    "lora_linear",
    "lora_linear_cross_entropy",
    "lora_linear_group",
    "lora_linear_log_probs",
    "lora_mlp",
]


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``y = x W^T + bias + scaling · D(x) A^T B^T``. D is inverted dropout, on the LoRA branch
    only.

    Args:
        x: [..., K] with any leading sizes and strides, in bfloat16, float16, float32, or float64
            (PyTorch backend only). Under ``torch.autocast``, x, weight and bias are first cast to
            its dtype, as for ``nn.functional.linear``.
        weight: [N, K] of x's dtype; or an :class:`NF4Weight`, :class:`FP8Weight` or
            :class:`FP4Weight`, which counts as dequantized to x's dtype. On a GPU, the product's
            loop dequantizes it; with many rows, a kernel dequantizes it into N K elements that are
            free after the call. The PyTorch backend takes that memory and about 50 MB more at each
            call, and again in backward if x requires a gradient.
        bias: [N] of x's dtype, or None.
        lora_A: [r, K] of x's dtype or float32. Products are in x's dtype, sums in float32.
        lora_B: [N, r] of lora_A's dtype.
        scaling: s, a number.
        dropout_p: probability of dropping an element, in [0, 1). The mask comes from torch's
            generator of x's device.
        training: whether to apply dropout.

    Returns:
        [..., N] in x's dtype. Only requested gradients are computed.

    Raises:
        ValueError: shapes or devices do not fit, or dropout_p is outside [0, 1).
        TypeError: dtypes do not fit.
        RuntimeError: the Triton backend is forced but can't run.
    """
    return _run(
        x, (Projection(weight, bias, lora_A, lora_B, scaling).stored(),), dropout_p, training
    )[0]


def lora_linear_if(
    fits: Callable[[], bool], x: Tensor, projection: Projection, dropout_p: float
) -> Tensor | None:
    """:func:`lora_linear` in training with a weight that is not quantized, or None if it is a call
    of a new kind that does not satisfy ``fits``.
    """
    ys = _run(x, (projection,), dropout_p, True, fits=fits)
    return ys[0] if ys else None


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, ...]:
    """:func:`lora_linear` for a projection group: up to three projections of one x, such as q, k
    and v, or gate and up.

    It equals separate calls of :func:`lora_linear` in this order up to rounding: it sums x's
    gradients before rounding them, where separate calls round first. Their gradients of x are not
    stored separately. On Triton all projections share one read of x, forward and backward.
    Dropout's masks are those of separate calls too, except with Triton's kernels on a GPU, where
    one launch draws all seeds.

    Up to 64 rows, and above rank 64, the projections are computed one by one; only their gradients
    of x are accumulated in place.

    Args:
        x: [..., K], as in :func:`lora_linear`.
        weights: [N, K] for each projection. N may differ, dtypes may not.
        biases: [N] or None for each projection.
        lora_As: [r, K] for each projection. Ranks may differ, dtypes may not.
        lora_Bs: [N, r] for each projection.
        scalings: s for each projection.
        dropout_p: as in :func:`lora_linear`; each projection draws its own mask.
        training: as in :func:`lora_linear`.

    Returns:
        [..., N] for each projection.

    Raises:
        ValueError: the sequences do not have one length of 1 to 3.
        ValueError, TypeError, RuntimeError: as :func:`lora_linear`.
    """
    lengths = [len(values) for values in (weights, biases, lora_As, lora_Bs, scalings)]
    if len({*lengths}) != 1 or not 1 <= lengths[0] <= MAX_GROUP:
        raise ValueError(
            "weights, biases, lora_As, lora_Bs and scalings must have one length, of 1 to "
            f"{MAX_GROUP}, got {', '.join(map(str, lengths))}"
        )
    of_each = zip(weights, biases, lora_As, lora_Bs, scalings, strict=True)
    projections = [Projection(*arguments).stored() for arguments in of_each]
    return tuple(_run(x, projections, dropout_p, training))


LoRAWeights = Projection


def lora_linear_group_if(
    fits: Callable[[], bool], x: Tensor, projections: Sequence[Projection], dropout_p: float
) -> Sequence[Tensor] | None:
    """:func:`lora_linear_group` in training with weights that are not quantized, or None if it is a
    call of a new kind that does not satisfy ``fits``.
    """
    return _run(x, projections, dropout_p, True, fits=fits) or None


def lora_mlp(
    x: Tensor,
    gate: LoRAWeights,
    up: LoRAWeights,
    down: LoRAWeights,
    activation: str,
    dropout_p: float = 0.0,
    training: bool = True,
    tiled: bool | int = False,
) -> Tensor:
    """``down(act(gate(x)) ∘ up(x))``: a gated MLP of three :func:`lora_linear` projections, as one
    autograd node.

    It keeps x, the outputs G of gate and U of up, each [M, r] product with an A, and dropout's
    masks; backward computes act(G) and act(G) ∘ U again. The PyTorch backend draws masks again that
    would take a byte an element and more than 8 kB. Apart from rounding, it equals separate calls
    of :func:`lora_linear` for gate, up and down in this order, and so do dropout's masks, except
    with Triton's kernels on a GPU, where one launch draws all seeds. If gate and up are given one
    ``lora_A``, as halves of one stacked projection, they share its mask.

    Separate calls with PyTorch's activation, which keep more, take over where a weight or bias
    requires a gradient; where only one of gate's and up's A, or of their B, requires one; below 64
    rows on the PyTorch backend; and up to 128 rows with quantized weights on the Triton backend.

    Args:
        x: [..., K], as in :func:`lora_linear`.
        gate: weight [F, K], bias [F], lora_A [r, K], lora_B [F, r], scaling. Ranks may differ
            between projections, dtypes may not.
        up: as gate.
        down: weight [N, F], bias [N], lora_A [r, F], lora_B [N, r], scaling.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU).
        dropout_p: as in :func:`lora_linear`; each projection draws its own mask.
        training: as in :func:`lora_linear`.
        tiled: keep x and dropout's seeds alone. Forward and backward compute a tile of rows at a
            time, and backward computes G and U again. True takes as many rows as 256 MiB hold of a
            tile's G, U and their gradients (on a CPU 24 MiB), a number so many. Dropout's masks are
            others than without tiles.

    Returns:
        [..., N] in x's dtype. Only requested gradients are computed.

    Raises:
        ValueError: ``activation`` is unknown, ``tiled`` is a number below 1, or the projections do
            not fit x or each other.
        ValueError, TypeError, RuntimeError: as :func:`lora_linear`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}"
        )
    tiled = check_tiles("tiled", tiled)
    projections = [Projection(*p).stored() for p in (gate, up, down)]
    return _run(x, projections, dropout_p, training, activation=activation, tiled=tiled)[0]


def lora_mlp_if(
    fits: Callable[[], bool],
    x: Tensor,
    projections: tuple[Projection, Projection, Projection],
    activation: str,
    dropout_p: float,
    tiled: bool | int = False,
) -> Tensor | None:
    """:func:`lora_mlp` in training with weights that are not quantized, or None if it is a call of
    a new kind that does not satisfy ``fits``. ``projections``: gate, up and down.
    """
    ys = _run(x, projections, dropout_p, True, activation=activation, fits=fits, tiled=tiled)
    return ys[0] if ys else None


def lora_branch(
    base_out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``base_out + scaling · D(x) A^T B^T``: add the LoRA branch to the output of any layer,
    quantized, sharded or transposed.

    ``base_out`` is not changed, and its gradient is the result's. The gradient of x is that of the
    branch; autograd adds the gradient through the layer that computed ``base_out``.

    Args:
        base_out: [..., N] with x's leading sizes, in any of the dtypes of x, not necessarily the
            same.
        x: [..., K], as in :func:`lora_linear`. Under ``torch.autocast``, x is first cast to its
            dtype.
        lora_A: [r, K], as in :func:`lora_linear`.
        lora_B: [N, r], as in :func:`lora_linear`.
        scaling: s, a number.
        dropout_p: as in :func:`lora_linear`.
        training: as in :func:`lora_linear`.

    Returns:
        [..., N] in base_out's dtype. Products are in x's dtype, sums and the addition in float32.
        Only requested gradients are computed.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`lora_linear`.
    """
    branch = Projection(None, None, lora_A, lora_B, scaling)
    return _run(x, (branch,), dropout_p, training, base_out)[0]


def lora_experts(
    x: Tensor,
    weight: Tensor | PackedExperts,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    offsets: Tensor,
    *,
    transposed: bool = False,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """:func:`lora_linear` of each expert of a stack, on the rows of x that are its own: a mixture
    of experts.

    Nothing of the stack's size is made or kept: autograd saves x, S [T, r], the offsets and
    dropout's mask. There is no Triton kernel: every backend computes it by PyTorch's operators. In
    bfloat16 on NVIDIA GPUs from sm_80 on, with K and N that are multiples of 8, that is PyTorch's
    grouped product; otherwise a loop over the experts, which reads the offsets on the host.

    Args:
        x: [T, K], its rows sorted by expert.
        weight: [E, N, K], frozen, in x's dtype; or :class:`PackedExperts`, which count as
            dequantized to x's dtype. One expert at a time is dequantized, and again in backward; for
            a grouped product as many as fit into 256 MiB. If those are not all, a call reads the
            offsets on the host.
        bias: [E, N] or None, frozen, in x's dtype.
        lora_A: [E, r, K] of any strides, float32 or in x's dtype. With an r of 0 there is no
            branch.
        lora_B: [E, N, r] of any strides, in lora_A's dtype.
        scaling: s, a number.
        offsets: [E], int32 or int64: behind which row each expert ends. Rows behind the last
            expert's give zeros, and get a gradient of zeros.
        transposed: the weight is [E, K, N], packed or not.
        dropout_p: as in :func:`lora_linear`.
        training: as in :func:`lora_linear`.

    Returns:
        [T, N] in x's dtype. Only requested gradients are computed. Those of an expert without rows
        are zeros.

    Raises:
        ValueError: shapes or devices do not fit, or weight or bias requires a gradient; on a CPU
            also if offsets descend or exceed T.
        TypeError: dtypes do not fit.
    """
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x = cast(x, dtype)
        weight = cast(weight, dtype)
        bias = cast(bias, dtype)
        if lora_A.dtype != torch.float32:
            lora_A = cast(lora_A, dtype)
            lora_B = cast(lora_B, dtype)
    check_float("dropout_p", dropout_p, low=0.0, high=1.0)
    stack = ExpertStack(
        weight, bias, lora_A, lora_B, scaling, transposed, dropout_p if training else 0.0
    )
    check_experts(x, stack, offsets)
    return lora_experts_op(x, stack, offsets)


def _run(
    x: Tensor,
    projections: Sequence[Projection],
    dropout_p: float,
    training: bool,
    base: Tensor | None = None,
    activation: str = "",
    fits: Callable[[], bool] | None = None,
    tiled: bool | int = False,
) -> Sequence[Tensor]:
    """The outputs of projections of x, of a lone branch onto ``base``, or with ``activation`` of a
    gated MLP.

    No output if it is a call of a new kind that does not satisfy ``fits``.
    """
    dtype = _autocast_dtype(x)
    shared_mask = activation != "" and _share_lora_A(projections)
    # What decides on the checks' answers, on autocast's casts, on the backend and on the launches.
    gradients = torch.is_grad_enabled()
    # True and 1 are equal, and so would their keys be.
    tiles = (tiled is True, tiled)
    kind = ("projections", activation, shared_mask, gradients, fits is None, dtype, tiles)
    values: list[Any] = [x, base, dropout_p, training]
    for p in projections:
        # Not by +=, which torch.compile of torch 2.11 refuses with a NamedTuple.
        values.extend(p)
    key = key_of(kind, values)
    entry = find(key)
    if entry is None and fits is not None and not fits():
        return ()
    is_cast = dtype is not None and (entry is None or entry.is_cast)
    if dtype is not None and is_cast:
        # Autocast does not know custom ops, so the caller has to cast.
        before = (x, *projections)
        x = cast(x, dtype)
        projections = [_autocast_projection(p, dtype) for p in projections]
        is_cast = any(map(operator.is_not, (x, *projections), before))
    if entry is not None:
        backend = entry.backend
    else:
        check(x, projections, base, activation != "")
        _check_dropout(dropout_p)
        backend = _backend_of(x, projections, base)
        entry = remember(key, backend, is_cast)
    dropout_p = dropout_p if training else 0.0
    if activation:
        options = Options(activation, dropout_p, backend, shared_mask, tiled)
        return (lora_mlp_op(x, projections, options, entry),)
    return lora_linear_op(x, projections, base, dropout_p, backend, entry)


def _share_lora_A(projections: Sequence[Projection]) -> bool:
    """Whether gate and up are given one A, as halves of one stacked projection."""
    gate = projections[0]
    up = projections[1]
    return gate.lora_A is not None and gate.lora_A is up.lora_A


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to cast x to, or None."""
    if not (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()):
        return None
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None
    return autocast_dtype(x.device.type)


def _autocast_projection(p: Projection, dtype: torch.dtype) -> Projection:
    """``p`` with operands in ``dtype``; itself if they are."""
    weight = cast(p.weight, dtype)
    bias = cast(p.bias, dtype)
    lora_A = p.lora_A
    lora_B = p.lora_B
    # The op casts float32 A and B on the fly.
    if lora_A is not None and lora_A.dtype != torch.float32:
        lora_A = cast(lora_A, dtype)
        lora_B = cast(lora_B, dtype)
    if weight is p.weight and bias is p.bias and lora_A is p.lora_A and lora_B is p.lora_B:
        return p
    return Projection(weight, bias, lora_A, lora_B, p.scaling)


def _check_dropout(dropout_p: float) -> None:
    if dropout_p != 0.0:
        check_float("dropout_p", dropout_p, low=0.0, high=1.0)


def _backend_of(x: Tensor, projections: Sequence[Projection], base: Tensor | None) -> str:
    """The backend of a call with checked operands: the one in force for x's device, unless an
    operand is empty.
    """
    backend = resolve_backend(x.device)
    if backend != "triton":
        return backend
    _refuse_float64("x", x)
    if base is not None:
        _refuse_float64("base_out", base)
    # Kernels need something to multiply: with K or N of 0, PyTorch's operators return the bias, or
    # nothing.
    return "torch" if _has_empty_adapter(x, projections) else backend


def _refuse_float64(name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.float64:
        raise TypeError(
            f"{name} is torch.float64, which the Triton kernels do not compute in; set slk.settings.backend = 'torch'"
        )


def _has_empty_adapter(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether an A or a B has no elements; without any of them, whether x has none."""
    adapters = [t for p in projections for t in (p.lora_A, p.lora_B) if t is not None]
    return not all(t.numel() for t in adapters or [x])
