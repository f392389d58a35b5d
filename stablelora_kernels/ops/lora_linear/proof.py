"""What ``lora_linear``'s kernels are proven against at their first use: PyTorch's operators, and the
analysis of rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stablelora_kernels.dispatch import rules
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.formats import Stored
from stablelora_kernels.ops.cpu_products import product
from stablelora_kernels.ops.formulas import Wanted, gradients_of, project, to_multiply
from stablelora_kernels.ops.lora_linear.call import (
    LinearBackwardCall,
    LinearBackwardResults,
    LinearForwardCall,
    LinearForwardResults,
    branches_in,
    split_s,
)
from stablelora_kernels.ops.matrices import as_matrix, row_count, with_own_memory
from stablelora_kernels.ops.proofs import (
    Compared,
    Oracle,
    StandIns,
    arithmetic_of,
    blocks_of,
    drawn_mask,
    frozen,
    is_expanded,
    kept_rows,
    multiplied,
    packed,
    sample_of,
    sample_of_sums,
    side_by_side,
    with_stand_ins,
)
from stablelora_kernels.projection import LORA_AS, Projection, projections_of, s_unit
from stablelora_kernels.reference import unpack_mask
from stablelora_kernels.reference.rounding import Arithmetic, Rounded, RoundedLayer, operand


def _projections(call: LinearForwardCall | LinearBackwardCall) -> list[Projection]:
    settings = call.settings
    return projections_of(call.operands, call.scales, settings.layouts, settings.scalings)


def forward_stand_ins(call: LinearForwardCall) -> LinearForwardCall:
    """``call`` on stand-ins of its own layouts."""
    draw = StandIns(call.x.device)
    return call._replace(
        x=draw.normal(call.x),
        base=draw.of(call.base),
        operands=with_stand_ins(draw, call.operands, _projections(call)),
    )


def rounded_output(
    arithmetic: Arithmetic,
    x: Rounded,
    p: Projection,
    keep: Tensor | None,
    base: Rounded | None = None,
    dtype: torch.dtype | None = None,
) -> Rounded:
    """Y [rows, N] of x [rows, K], a block of columns at a time; arguments as for
    :meth:`~.RoundedLayer.forward`.
    """
    storage = arithmetic.storage
    assert p.lora_A is not None and p.lora_B is not None
    lora_A = operand(p.lora_A, storage)
    weight = frozen(p)
    parts = []
    for columns in blocks_of(p.lora_B.shape[0], max(p.lora_A.shape[1], x.exact.shape[0])):
        bias = None if p.bias is None else operand(p.bias[columns], storage)
        w = multiplied(None if weight is None else weight[columns], p, storage)
        lora_B = operand(p.lora_B[columns], storage)
        layer = RoundedLayer(arithmetic, w, bias, lora_A, lora_B, p.scaling, keep)
        part = None if base is None else Rounded(base.value[:, columns], base.deviation[:, columns])
        parts.append(layer.forward(x, part, dtype))
    return side_by_side(parts)


def rounded_s(arithmetic: Arithmetic, x: Rounded, p: Projection, keep: Tensor | None) -> Rounded:
    """S [rows, r] as it is saved."""
    assert p.lora_A is not None
    dropped = x if keep is None else x * keep.double()
    s = arithmetic.product(dropped, operand(p.lora_A, arithmetic.storage).T)
    return (s * (p.scaling / s_unit(arithmetic.storage, p.scaling))).stored(arithmetic.storage)


def compare_forward(
    call: LinearForwardCall, results: LinearForwardResults, written: Sequence[Tensor]
) -> Iterator[Compared | str]:
    """A sample of each result with what it must be, and faults in words."""
    settings = call.settings
    x = as_matrix(call.x)
    rows = sample_of(x.shape[0], x.device)
    arithmetic = arithmetic_of(x.dtype)
    sample = operand(x[rows], x.dtype)
    base = None
    if call.base is not None:
        base = operand(as_matrix(call.base)[rows], call.base.dtype)
    projections = _projections(call)
    every_s: Sequence[Tensor | None] = [None] * len(projections)
    if settings.save_s:
        every_s = split_s(results.s, branches_in(call.operands, LORA_AS))
    for i, p in enumerate(projections):
        keep = None
        seed = call.seeds[i]
        if settings.dropout_p and seed is not None:
            mask = results.masks[i] if results.masks else None
            kept = kept_rows(mask, seed, rows, x.shape[1], settings.dropout_p)
            keep = kept.keep
            yield kept.fault
        y = as_matrix(results.ys[i])
        expected = rounded_output(arithmetic, sample, p, keep, base, y.dtype)
        yield Compared(f"Y{i}", y[rows], expected, arithmetic)
        s = every_s[i]
        if s is not None:
            yield Compared(f"S{i}", s[rows], rounded_s(arithmetic, sample, p, keep), arithmetic)


def forward_by_operators(call: LinearForwardCall) -> LinearForwardResults:
    """The results by PyTorch's operators."""
    settings = call.settings
    x = as_matrix(call.x)
    base = None if call.base is None else as_matrix(call.base)
    ys: list[Tensor] = []
    every_s: list[Tensor] = []
    masks: list[Tensor | None] = []
    for p, seed in zip(_projections(call), call.seeds, strict=True):
        keep = drawn_mask(x, seed, settings.dropout_p)
        y, s = project(x, to_multiply(p, x.dtype), keep, base)
        ys.append(y.view(*call.x.shape[:-1], y.shape[1]))
        every_s.append(saved_s(s, p.scaling))
        if settings.save_mask:
            assert keep is not None
            masks.append(packed(keep))
    s = (
        torch.cat(every_s, 1)
        if settings.save_s
        else x.new_empty(0, sum(s.shape[1] for s in every_s))
    )
    return LinearForwardResults(ys, [s], masks)


def saved_s(s: Tensor, scaling: float) -> Tensor:
    """S as kernels save it, of the unscaled one."""
    return s * (scaling / s_unit(s.dtype, scaling))


def backward_stand_ins(call: LinearBackwardCall) -> LinearBackwardCall:
    """``call`` on stand-ins of its own layouts; all but the sampled rows of gradients are zero."""
    grad = call.grads[0]
    draw = StandIns(grad.device)
    rows = _sample_of_backward(call)
    projections = _projections(call)
    return call._replace(
        x=draw.of(call.x),
        grads=[draw.sampled(grad, rows) for grad in call.grads],
        operands=with_stand_ins(draw, call.operands, projections),
        s=[draw.normal(s) for s in call.s],
    )


def _sample_of_backward(call: LinearBackwardCall) -> Tensor:
    grad = call.grads[0]
    count = row_count(grad)
    if any(is_expanded(grad) for grad in call.grads):
        # All rows have numbers.
        return torch.arange(count, device=grad.device)
    return sample_of_sums(count, grad.device)


def rounded_grad_x(
    arithmetic: Arithmetic, grad: Rounded, ds: Rounded, p: Projection, keep: Tensor | None
) -> Rounded:
    """dX [rows, K] of dY [rows, N], a block of columns at a time."""
    storage = arithmetic.storage
    assert p.lora_A is not None
    weight = frozen(p)
    parts = []
    for columns in blocks_of(p.lora_A.shape[1], max(grad.exact.shape)):
        w = multiplied(None if weight is None else weight[:, columns], p, storage)
        lora_A = operand(p.lora_A[:, columns], storage)
        mask = None if keep is None else keep[:, columns]
        layer = RoundedLayer(arithmetic, w, None, lora_A, None, p.scaling, mask)
        parts.append(layer.grad_x(grad, ds))
    return side_by_side(parts)


def rounded_grad_s(arithmetic: Arithmetic, grad: Rounded, p: Projection) -> Rounded:
    """dS [rows, r] of dY [rows, N]."""
    assert p.lora_B is not None
    lora_B = operand(p.lora_B, arithmetic.storage)
    return RoundedLayer(arithmetic, None, None, None, lora_B, p.scaling).grad_s(grad)


def rounded_grad_b(arithmetic: Arithmetic, grad: Rounded, s: Tensor, p: Projection) -> Rounded:
    """dB [N, r] of dY [rows, N] and the saved S [rows, r]."""
    assert p.lora_B is not None
    unit = s_unit(arithmetic.storage, p.scaling)
    db = arithmetic.product(grad.T, operand(s, arithmetic.storage)) * unit
    return db.stored(p.lora_B.dtype)


def compare_backward(
    call: LinearBackwardCall, results: LinearBackwardResults, written: Sequence[Tensor]
) -> Iterator[Compared | str]:
    """A sample of dX, and each dA and dB whole, with what they must be."""
    settings = call.settings
    rows = _sample_of_backward(call)
    dtype = call.grads[0].dtype
    arithmetic = arithmetic_of(dtype)
    x = None if call.x is None else operand(as_matrix(call.x)[rows], dtype)
    projections = _projections(call)
    every_s: Sequence[Tensor | None] = split_s(call.s, branches_in(call.operands, LORA_AS))
    of_x: list[Rounded] = []
    for i, p in enumerate(projections):
        assert p.lora_A is not None
        grad = operand(as_matrix(call.grads[i])[rows], dtype)
        mask = call.masks[i]
        keep = None if mask is None else unpack_mask(mask[rows], p.lora_A.shape[1])
        ds = rounded_grad_s(arithmetic, grad, p)
        if settings.need_x:
            of_x.append(rounded_grad_x(arithmetic, grad, ds, p, keep))
        if settings.need_a:
            assert x is not None
            dropped = x if keep is None else x * keep.double()
            layer = RoundedLayer(arithmetic, None, None, None, None, p.scaling)
            da = layer.grad_a(ds, dropped, p.lora_A.dtype)
            yield Compared(f"dA{i}", results.das[i], da, arithmetic)
        if settings.need_b:
            s = every_s[i]
            assert s is not None
            yield Compared(
                f"dB{i}", results.dbs[i], rounded_grad_b(arithmetic, grad, s[rows], p), arithmetic
            )
    if settings.need_x:
        dx = arithmetic.total(of_x, [grad.shape[-1] for grad in call.grads])
        yield Compared("dX", as_matrix(results.dx)[rows], dx, arithmetic)


def backward_by_operators(call: LinearBackwardCall) -> LinearBackwardResults:
    """The results by PyTorch's operators."""
    settings = call.settings
    x = None if call.x is None else as_matrix(call.x)
    projections = _projections(call)
    every_s: Sequence[Tensor | None] = split_s(call.s, branches_in(call.operands, LORA_AS))
    dx = None
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    wanted = Wanted(settings.need_x, settings.need_a, b=False)
    for i, p in enumerate(projections):
        assert p.lora_A is not None and p.lora_B is not None
        grad = with_own_memory(as_matrix(call.grads[i]))
        mask = call.masks[i]
        keep = None if mask is None else unpack_mask(mask, p.lora_A.shape[1])
        if wanted.x or wanted.a:
            multiply = to_multiply(p, grad.dtype)
            dx, da, _ = gradients_of(x, grad, multiply, None, keep, p.lora_A.dtype, wanted, dx)
            if da is not None:
                das.append(da.contiguous())
        if settings.need_b:
            s = every_s[i]
            assert s is not None
            unit = s_unit(grad.dtype, p.scaling)
            dbs.append(db_of(grad, s, unit, p.lora_B.dtype))
    return LinearBackwardResults(as_grad_x(dx, call.grads[0], projections[0]), das, dbs)


def as_grad_x(dx: Tensor | None, grad: Tensor, p: Projection) -> Tensor:
    """dX [M, K] with the leading sizes and the dtype of dY [..., N]; empty if it is not wanted."""
    columns = branch_sizes(p)[1]
    if dx is None:
        return grad.new_empty(0, columns)
    return dx.to(grad.dtype).view(*grad.shape[:-1], columns)


def db_of(grad: Tensor, s: Tensor, unit: float, dtype: torch.dtype) -> Tensor:
    """dB [N, r] of dY [M, N] and the saved S [M, r]."""
    return product(grad.t(), s).to(dtype).mul_(unit)


def products_of(
    direction: str, like: Tensor, projections: Sequence[Projection], dropout_p: float
) -> list[Call]:
    """What dispatch knows of each projection's product. ``like``: x, or in backward dY."""
    products = []
    for p in projections:
        n, k = branch_sizes(p)
        if direction == "backward":
            n, k = k, n
        dtype = like.dtype if p.lora_A is None else p.lora_A.dtype
        dropout = dropout_p > 0 and p.rank > 0
        products.append(Call(direction, row_count(like), n, k, p.rank, like.dtype, dtype, dropout))
    return products


def _forward_products(call: LinearForwardCall) -> list[Call]:
    return products_of("forward", call.x, _projections(call), call.settings.dropout_p)


def _backward_products(call: LinearBackwardCall) -> list[Call]:
    return products_of("backward", call.grads[0], _projections(call), call.settings.dropout_p)


def _forward_strategies(call: LinearForwardCall) -> list[str]:
    if call.base is not None:
        return [rules.choose_branch(_forward_products(call)[0]).strategy]
    return strategies_of(_forward_products(call), _projections(call))


def _backward_strategies(call: LinearBackwardCall) -> list[str]:
    if not call.settings.need_x:
        return ["gradients"]
    projections = _projections(call)
    if projections[0].weight is None:
        return [rules.choose_branch(_backward_products(call)[0]).strategy]
    return strategies_of(_backward_products(call), projections)


def branch_sizes(p: Projection) -> tuple[int, int]:
    """N and K of a projection with a branch."""
    assert p.lora_A is not None and p.lora_B is not None
    return p.lora_B.shape[0], p.lora_A.shape[1]


def strategies_of(products: Sequence[Call], projections: Sequence[Projection]) -> list[str]:
    """The strategies that first use may choose from, for these projections: the table's, and the one
    that may be faster.
    """
    choices = [rules.choose(product).strategy for product in products]
    weight = projections[0].weight
    if len(products) == 1 and isinstance(weight, Stored):
        reading = rules.choose_quantized(products[0], weight.layout.bits, weight.layout.aligned)
        if reading.strategy == "in_loop":
            choices = ["in_loop"]
    others = ["branch_first"] if {*choices} != {"branch_first"} else []
    return [choices[0], *others]


FORWARD = Oracle(
    stand_ins=forward_stand_ins,
    compare=compare_forward,
    by_operators=forward_by_operators,
    strategies=_forward_strategies,
    products=_forward_products,
)
BACKWARD = Oracle(
    stand_ins=backward_stand_ins,
    compare=compare_backward,
    by_operators=backward_by_operators,
    strategies=_backward_strategies,
    products=_backward_products,
)
