"""What ``lora_mlp``'s kernels are proven against at their first use: as ``lora_linear_proof``, for
gate, up and down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.activations import ACTIVATIONS
from stablelora_kernels.ops.formulas import Gradients, Wanted, gradients_of, project, to_multiply
from stablelora_kernels.ops.lora_linear.proof import (
    as_grad_x,
    branch_sizes,
    db_of,
    products_of,
    rounded_grad_b,
    rounded_grad_s,
    rounded_grad_x,
    rounded_output,
    rounded_s,
    saved_s,
    strategies_of,
)
from stablelora_kernels.ops.lora_mlp.call import (
    MLPBackwardCall,
    MLPBackwardResults,
    MLPForwardCall,
    MLPForwardResults,
    each_mask,
    with_branches,
)
from stablelora_kernels.ops.matrices import as_matrix, row_count, with_own_memory
from stablelora_kernels.ops.proofs import (
    Compared,
    Oracle,
    StandIns,
    arithmetic_of,
    drawn_mask,
    is_expanded,
    kept_rows,
    packed,
    sample_of,
    sample_of_sums,
    with_stand_ins,
)
from stablelora_kernels.projection import Projection, projections_of, s_unit
from stablelora_kernels.reference import unpack_mask
from stablelora_kernels.reference.rounding import (
    Arithmetic,
    Rounded,
    RoundedLayer,
    activated,
    operand,
)


def _stored(call: MLPForwardCall | MLPBackwardCall) -> list[Projection]:
    """The projections, some without a branch."""
    settings = call.settings
    return projections_of(call.operands, call.scales, settings.layouts, settings.scalings)


def _projections(call: MLPForwardCall | MLPBackwardCall) -> list[Projection]:
    """The projections, with a branch of rank 0 where there is none."""
    like = call.x if isinstance(call, MLPForwardCall) else call.grad
    return with_branches(_stored(call), like)


def forward_stand_ins(call: MLPForwardCall) -> MLPForwardCall:
    """``call`` on stand-ins of its own layouts."""
    draw = StandIns(call.x.device)
    return call._replace(
        x=draw.normal(call.x), operands=with_stand_ins(draw, call.operands, _stored(call))
    )


def _masks_of(call: MLPForwardCall, results: MLPForwardResults) -> list[Tensor | None]:
    return each_mask(results.masks, call.settings.stores_mask)


def compare_forward(
    call: MLPForwardCall, results: MLPForwardResults, written: Sequence[Tensor]
) -> Iterator[Compared | str]:
    """A sample of each result with what it must be, and faults in words."""
    settings = call.settings
    x = as_matrix(call.x)
    rows = sample_of(x.shape[0], x.device)
    arithmetic = arithmetic_of(x.dtype)
    sample = operand(x[rows], x.dtype)
    projections = _projections(call)
    gate, up, down = projections
    widths = [branch_sizes(p)[1] for p in projections]
    keeps: list[Tensor | None] = [None, None, None]
    for i, mask in enumerate(_masks_of(call, results)):
        seed = call.seeds[i]
        if settings.dropout_p and seed is not None and projections[i].rank:
            kept = kept_rows(mask, seed, rows, widths[i], settings.dropout_p)
            keeps[i] = kept.keep
            yield kept.fault
    g = rounded_output(arithmetic, sample, gate, keeps[0])
    u = rounded_output(arithmetic, sample, up, keeps[1])
    act = activated(g, settings.activation, arithmetic).act
    h = (act * u).stored(arithmetic.storage)
    if settings.save:
        yield Compared("G", as_matrix(results.g)[rows], g, arithmetic)
        yield Compared("U", as_matrix(results.u)[rows], u, arithmetic)
        s_of_gate, s_of_up = results.s[0].split_with_sizes([gate.rank, up.rank], 1)
        for name, s, read, p, keep in (
            ("S of gate", s_of_gate, sample, gate, keeps[0]),
            ("S of up", s_of_up, sample, up, keeps[1]),
            ("S of down", results.s_down, h, down, keeps[2]),
        ):
            yield Compared(name, s[rows], rounded_s(arithmetic, read, p, keep), arithmetic)
    if settings.output:
        y = rounded_output(arithmetic, h, down, keeps[2])
        yield Compared("Y", as_matrix(results.y)[rows], y, arithmetic)


class _Output(NamedTuple):
    y: Tensor
    # As it is saved.
    s: Tensor
    # Packed; None without dropout.
    mask: Tensor | None


def _by_operators(x: Tensor, p: Projection, seed: Tensor | None, dropout_p: float) -> _Output:
    keep = drawn_mask(x, seed, dropout_p) if p.rank else None
    y, s = project(x, to_multiply(p, x.dtype), keep)
    return _Output(y, saved_s(s, p.scaling), None if keep is None else packed(keep))


def forward_by_operators(call: MLPForwardCall) -> MLPForwardResults:
    """The results by PyTorch's operators."""
    settings = call.settings
    x = as_matrix(call.x)
    gate, up, down = _projections(call)
    of_gate = _by_operators(x, gate, call.seeds[0], settings.dropout_p)
    of_up = _by_operators(x, up, call.seeds[1], settings.dropout_p)
    h = ACTIVATIONS[settings.activation].forward(of_gate.y).mul_(of_up.y)
    of_down = _by_operators(h, down, call.seeds[2], settings.dropout_p)
    leading = call.x.shape[:-1]
    masks = [
        of_projection.mask
        for of_projection, is_stored in zip(
            (of_gate, of_up, of_down), settings.stores_mask, strict=True
        )
        if is_stored and of_projection.mask is not None
    ]
    y = of_down.y.view(*leading, of_down.y.shape[1]) if settings.output else x.new_empty(0)
    if not settings.save:
        inner = of_gate.y.shape[1]
        return MLPForwardResults(
            y,
            x.new_empty(0, inner),
            x.new_empty(0, inner),
            [x.new_empty(0, gate.rank + up.rank)],
            x.new_empty(0, down.rank),
            masks,
        )
    return MLPForwardResults(
        y,
        of_gate.y.view(*leading, of_gate.y.shape[1]),
        of_up.y.view(*leading, of_up.y.shape[1]),
        [torch.cat([of_gate.s, of_up.s], 1)],
        of_down.s,
        masks,
    )


def _sample_of_backward(call: MLPBackwardCall) -> Tensor:
    count = row_count(call.grad)
    if is_expanded(call.grad):
        # All rows have numbers.
        return torch.arange(count, device=call.grad.device)
    return sample_of_sums(count, call.grad.device)


def backward_stand_ins(call: MLPBackwardCall) -> MLPBackwardCall:
    """``call`` on stand-ins of its own layouts; all but the sampled rows of dY are zero."""
    draw = StandIns(call.grad.device)
    return call._replace(
        grad=draw.sampled(call.grad, _sample_of_backward(call)),
        x=draw.of(call.x),
        g=draw.normal(call.g),
        u=draw.normal(call.u),
        s=[draw.normal(s) for s in call.s],
        s_down=draw.of(call.s_down),
        operands=with_stand_ins(draw, call.operands, _stored(call)),
    )


class _Backward(NamedTuple):
    """A projection in backward: what it has read, on the sampled rows."""

    name: str
    p: Projection
    read: Rounded | None
    s: Tensor | None
    keep: Tensor | None


def _compare_branch(
    arithmetic: Arithmetic,
    grad: Rounded,
    ds: Rounded,
    member: _Backward,
    da: Tensor,
    db: Tensor,
) -> Iterator[Compared]:
    """dA and dB of a projection, those that are wanted."""
    p = member.p
    assert p.lora_A is not None
    if da.numel():
        assert member.read is not None
        dropped = member.read if member.keep is None else member.read * member.keep.double()
        layer = RoundedLayer(arithmetic, None, None, None, None, p.scaling)
        expected = layer.grad_a(ds, dropped, p.lora_A.dtype)
        yield Compared(f"dA of {member.name}", da, expected, arithmetic)
    if db.numel():
        assert member.s is not None
        expected = rounded_grad_b(arithmetic, grad, member.s, p)
        yield Compared(f"dB of {member.name}", db, expected, arithmetic)


def compare_backward(
    call: MLPBackwardCall, results: MLPBackwardResults, written: Sequence[Tensor]
) -> Iterator[Compared | str]:
    """A sample of dX, and each dA and dB whole, with what they must be."""
    settings = call.settings
    rows = _sample_of_backward(call)
    dtype = call.grad.dtype
    arithmetic = arithmetic_of(dtype)
    storage = arithmetic.storage
    projections = _projections(call)
    gate, up, down = projections
    keeps = [
        None if mask is None else unpack_mask(mask[rows], branch_sizes(p)[1])
        for mask, p in zip(call.every_mask, projections, strict=True)
    ]
    grad = operand(as_matrix(call.grad)[rows], dtype)
    g = operand(as_matrix(call.g)[rows], dtype)
    u = operand(as_matrix(call.u)[rows], dtype)
    act, slope = activated(g, settings.activation, arithmetic)
    h = (act * u).stored(storage)
    s_down = None if call.s_down is None else call.s_down[rows]
    of_down = _Backward("down", down, h, s_down, keeps[2])
    ds_down = rounded_grad_s(arithmetic, grad, down)
    yield from _compare_branch(arithmetic, grad, ds_down, of_down, results.das[2], results.dbs[2])
    needs_h = settings.need_x or any((*settings.need_a[:2], *settings.need_b[:2]))
    if not needs_h:
        return
    dh = rounded_grad_x(arithmetic, grad, ds_down, down, keeps[2])
    dg = ((dh * u).stored(storage) * slope).stored(storage)
    du = (dh * act).stored(storage)
    x = None if call.x is None else operand(as_matrix(call.x)[rows], dtype)
    every_s: Sequence[Tensor | None] = [None, None]
    if call.s:
        every_s = call.s[0][rows].split_with_sizes([gate.rank, up.rank], 1)
    of_x: list[Rounded] = []
    for i, (name, p, of_p) in enumerate((("gate", gate, dg), ("up", up, du))):
        ds = rounded_grad_s(arithmetic, of_p, p)
        member = _Backward(name, p, x, every_s[i], keeps[i])
        yield from _compare_branch(arithmetic, of_p, ds, member, results.das[i], results.dbs[i])
        if settings.need_x:
            of_x.append(rounded_grad_x(arithmetic, of_p, ds, p, keeps[i]))
    if settings.need_x:
        dx = arithmetic.total(of_x, [g.exact.shape[1], u.exact.shape[1]])
        yield Compared("dX", as_matrix(results.dx)[rows], dx, arithmetic)


def _gradients_by_operators(
    x: Tensor | None, grad: Tensor, member: _Backward, wanted: Wanted, dx: Tensor | None = None
) -> Gradients:
    """The wanted gradients of a projection. ``x``: what it has read."""
    p = member.p
    assert p.lora_A is not None and p.lora_B is not None
    multiply = to_multiply(p, grad.dtype)
    gradients = gradients_of(
        x, grad, multiply, None, member.keep, p.lora_A.dtype, wanted._replace(b=False), dx
    )
    if not wanted.b:
        return gradients
    assert member.s is not None
    db = db_of(grad, member.s, s_unit(grad.dtype, p.scaling), p.lora_B.dtype)
    return gradients._replace(db=db)


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """As a launch leaves a gradient that is not wanted: empty."""
    return like.new_empty(0) if gradient is None else gradient.contiguous()


def backward_by_operators(call: MLPBackwardCall) -> MLPBackwardResults:
    """The results by PyTorch's operators."""
    settings = call.settings
    projections = _projections(call)
    gate, up, down = projections
    keeps = [
        None if mask is None else unpack_mask(mask, branch_sizes(p)[1])
        for mask, p in zip(call.every_mask, projections, strict=True)
    ]
    grad = with_own_memory(as_matrix(call.grad))
    g, u = as_matrix(call.g), as_matrix(call.u)
    activation = ACTIVATIONS[settings.activation]
    act = activation.forward(g)
    needs_h = settings.need_x or any((*settings.need_a[:2], *settings.need_b[:2]))
    member = _Backward("down", down, None, call.s_down, keeps[2])
    of_down = _gradients_by_operators(
        act * u, grad, member, Wanted(needs_h, settings.need_a[2], settings.need_b[2])
    )
    dx = None
    das = [grad.new_empty(0), grad.new_empty(0), _or_empty(of_down.da, grad)]
    dbs = [grad.new_empty(0), grad.new_empty(0), _or_empty(of_down.db, grad)]
    if of_down.dx is not None:
        dh = of_down.dx.to(grad.dtype)
        x = None if call.x is None else as_matrix(call.x)
        every_s: Sequence[Tensor | None] = [None, None]
        if call.s:
            every_s = call.s[0].split_with_sizes([gate.rank, up.rank], 1)
        of_gate_and_up = (activation.backward(dh * u, g), act * dh)
        for i, (p, of_p) in enumerate(zip((gate, up), of_gate_and_up, strict=True)):
            member = _Backward("", p, None, every_s[i], keeps[i])
            wanted = Wanted(settings.need_x, settings.need_a[i], settings.need_b[i])
            of_member = _gradients_by_operators(x, of_p, member, wanted, dx)
            dx = of_member.dx
            das[i] = _or_empty(of_member.da, grad)
            dbs[i] = _or_empty(of_member.db, grad)
    dx = grad.new_empty(0) if dx is None else as_grad_x(dx, call.grad, gate)
    return MLPBackwardResults(dx, das, dbs)


def _strategies(direction: str, call: MLPForwardCall | MLPBackwardCall, like: Tensor) -> list[str]:
    projections = _projections(call)
    products = products_of(direction, like, projections, call.settings.dropout_p)
    return strategies_of(products, projections)


FORWARD = Oracle(
    stand_ins=forward_stand_ins,
    compare=compare_forward,
    by_operators=forward_by_operators,
    strategies=lambda call: _strategies("forward", call, call.x),
)
BACKWARD = Oracle(
    stand_ins=backward_stand_ins,
    compare=compare_backward,
    by_operators=backward_by_operators,
    strategies=lambda call: _strategies("backward", call, call.grad),
)
