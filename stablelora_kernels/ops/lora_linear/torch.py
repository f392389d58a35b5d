"""``lora_linear`` on the PyTorch path: one projection, a lone branch, or a projection group, with
their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stablelora_kernels.ops.autograd import (
    Context,
    apply_of_known_calls,
    bias_gradient,
    first_derivative,
    weight_gradient,
)
from stablelora_kernels.ops.dropout import draw_to_keep
from stablelora_kernels.ops.formulas import Projected, Saved, Wanted, gradients_of, project_drawn
from stablelora_kernels.ops.lora_linear.facts import LinearFacts, Needs
from stablelora_kernels.ops.matrices import as_matrix, like_rows_of, with_own_memory
from stablelora_kernels.projection import (
    Projection,
    in_groups,
    operands_of,
    projections_of,
    with_stored,
)
from stablelora_kernels.quantized import Stored
from stablelora_kernels.utils.tensors import cast


def _project(x: Tensor, p: Projection, dropout_p: float, base: Tensor | None = None) -> Projected:
    """One projection of x [..., K], or a lone branch onto ``base``, with a mask of its own."""
    rows = as_matrix(x)
    onto = None if base is None else as_matrix(base)
    return project_drawn(rows, p, draw_to_keep(rows, dropout_p), onto)


def _saved(projected: Projected, weight: Tensor | None, needs: Needs) -> Saved:
    """``weight``: a quantized weight's bytes."""
    return projected.saved(weight if needs.x else None, needs.b, needs.x or needs.a)


class _ProjectionContext(Context, Protocol):
    facts: LinearFacts
    # s'.
    scaling: float


class _LoRALinear(torch.autograd.Function):
    """One projection, or a lone branch onto ``base``. ``scales``: a quantized weight's."""

    @staticmethod
    def forward(
        ctx: _ProjectionContext,
        facts: LinearFacts,
        x: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        *scales: Tensor,
    ) -> Tensor:
        settings = facts.forward
        p = Projection(weight, bias, lora_A, lora_B, settings.scalings[0])
        if settings.layouts:
            p = with_stored([p], scales, settings.layouts)[0]
        projected = _project(x, p, settings.dropout_p, base)
        # x itself, not its rows: the surrounding graph already holds it.
        reads_x = facts.needs.a or facts.needs.weights[0]
        saved = _saved(projected, weight, facts.needs)
        read_scales = scales if facts.needs.x else ()
        ctx.save_for_backward(x if reads_x else None, *saved, *read_scales)
        ctx.facts = facts
        ctx.scaling = projected.p.scaling
        return like_rows_of(projected.y, x if base is None else base)

    @staticmethod
    @first_derivative
    def backward(ctx: _ProjectionContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        facts = ctx.facts
        needs = facts.needs
        tensors = ctx.saved_tensors
        x = tensors[0]
        saved = Saved(*tensors[1:6])
        # A lone branch computes in x's dtype.
        grad = with_own_memory(as_matrix(cast(dy, facts.x_dtype)))
        dx = None
        da = None
        db = None
        if needs.x or needs.a or needs.b:
            p = saved.as_projection(ctx.scaling)
            if facts.backward.layouts:
                scales = [scale for scale in tensors[6:] if scale is not None]
                p = with_stored([p], scales, facts.backward.layouts)[0]
            dx, da, db = gradients_of(
                None if x is None else as_matrix(x),
                grad,
                p,
                saved.s,
                saved.recipe,
                facts.lora_dtype,
                Wanted(needs.x, needs.a, needs.b),
            )
            dx = _like_x(dx, dy, facts)
        dbase = dy if facts.is_branch else None
        dweight = weight_gradient(x, dy) if needs.weights[0] else None
        dbias = bias_gradient(dy) if needs.biases[0] else None
        return (None, dx, dbase, dweight, dbias, da, db, *[None] * facts.scale_count)


def _like_x(dx: Tensor | None, dy: Tensor, facts: LinearFacts) -> Tensor | None:
    """dX [M, K] in x's dtype, with the leading sizes of dY."""
    return None if dx is None else like_rows_of(cast(dx, facts.x_dtype), dy)


class _GroupContext(Context, Protocol):
    facts: LinearFacts
    scalings: tuple[float, ...]


class _LoRALinearGroup(torch.autograd.Function):
    """A projection group, without quantized weights. ``operands``: those of its projections."""

    @staticmethod
    def forward(
        ctx: _GroupContext, facts: LinearFacts, x: Tensor, *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        settings = facts.forward
        projections = projections_of(operands, (), (), settings.scalings)
        members = [_project(x, p, settings.dropout_p) for p in projections]
        saved: list[Tensor | None] = []
        for member in members:
            weight = member.p.weight
            assert isinstance(weight, Tensor)
            saved += _saved(member, weight, facts.needs)
        reads_x = facts.needs.a or True in facts.needs.weights
        ctx.save_for_backward(x if reads_x else None, *saved)
        ctx.set_materialize_grads(False)
        ctx.facts = facts
        ctx.scalings = tuple([member.p.scaling for member in members])
        return tuple([like_rows_of(member.y, x) for member in members])

    @staticmethod
    @first_derivative
    def backward(ctx: _GroupContext, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        facts = ctx.facts
        needs = facts.needs
        x, *tensors = ctx.saved_tensors
        members = in_groups(tensors, len(Saved._fields))
        dx = None
        of_operands: list[Tensor | None] = []
        for place, (dy, member) in enumerate(zip(dys, members, strict=True)):
            if dy is None:
                # This projection's output was not used.
                of_operands += [None] * 4
                continue
            saved = Saved(*member)
            da = None
            db = None
            if needs.x or needs.a or needs.b:
                dx, da, db = gradients_of(
                    None if x is None else as_matrix(x),
                    with_own_memory(as_matrix(dy)),
                    saved.as_projection(ctx.scalings[place]),
                    saved.s,
                    saved.recipe,
                    facts.lora_dtype,
                    Wanted(needs.x, needs.a, needs.b),
                    dx,
                )
            dweight = weight_gradient(x, dy) if needs.weights[place] else None
            dbias = bias_gradient(dy) if needs.biases[place] else None
            of_operands += (dweight, dbias, da, db)
        if dx is not None:
            dx = _like_x(dx, next(dy for dy in dys if dy is not None), facts)
        return (None, dx, *of_operands)


_apply_known_projection = apply_of_known_calls(_LoRALinear)
_apply_known_group = apply_of_known_calls(_LoRALinearGroup)


def lora_linear_torch(
    facts: LinearFacts,
    is_known: bool,
    x: Tensor,
    projections: Sequence[Projection],
    base: Tensor | None,
) -> Sequence[Tensor]:
    """The projections' outputs, or that of a lone branch onto ``base``. ``is_known``: whether the
    call has a key.
    """
    if facts.strategy == "without gradients":
        like = x if base is None else base
        members = [_project(x, p, facts.forward.dropout_p, base) for p in projections]
        return [like_rows_of(member.y, like) for member in members]
    apply: Callable[..., Any]
    if len(projections) > 1:
        apply = _apply_known_group if is_known else _LoRALinearGroup.apply
        ys: tuple[Tensor, ...] = apply(facts, x, *operands_of(projections))
        return ys
    apply = _apply_known_projection if is_known else _LoRALinear.apply
    p = projections[0]
    if isinstance(p.weight, Stored):
        data = p.weight.data
        return (apply(facts, x, base, data, p.bias, p.lora_A, p.lora_B, *p.weight.scales),)
    return (apply(facts, x, base, p.weight, p.bias, p.lora_A, p.lora_B),)
