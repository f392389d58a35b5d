"""``lora_linear`` with its gradients: autograd around its two calls, which ``triton.py`` and
``torch.py`` compute.

    forward   S_g  = s'_g (X ∘ keep_g) A_g^T           Y_g = X W_g^T + bias_g + S_g B_g^T
    backward  dS_g = s'_g dY_g B_g                     dX  = Σ_g dY_g W_g + (dS_g A_g) ∘ keep_g
              dA_g = dS_g^T (X ∘ keep_g)               dB_g = dY_g^T S_g

g is one projection, or each of a projection group: up to three projections of one X (q, k and v;
gate and up). On Triton a group reads X once for all S and once for all dA. Each projection adds its
dX to the stored sum. Its seeds are drawn at once, also where the projections are computed one by
one.

A lone branch (``lora_branch``) has a base product BASE in place of X W^T, which another layer has
computed; its dX has no dY W. The op does not write to BASE: another backward may need it, and the
traffic is the same out of place.

Autograd saves X, which the surrounding graph usually holds anyway, and S. For dropout it saves the
mask: a bit an element on Triton; on the PyTorch path a byte an element, or 4 bytes for each element
that a large mask drops (``ops/dropout.py``). For a quantized weight it saves the stored form, never
the whole W; the PyTorch path dequantizes it again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stablelora_kernels.dispatch.first_use import is_on
from stablelora_kernels.formats import Stored
from stablelora_kernels.ops.autograd import (
    Context,
    apply_of_known_calls,
    bias_gradient,
    first_derivative,
    read_by_backward,
    weight_gradient,
)
from stablelora_kernels.ops.cpu_products import few_rows, is_few
from stablelora_kernels.ops.dropout import draw_seeds, scalings_after_dropout
from stablelora_kernels.ops.formulas import plain_operators
from stablelora_kernels.ops.lora_linear.call import (
    LinearBackwardCall,
    LinearBackwardSettings,
    LinearFacts,
    LinearForwardCall,
    LinearForwardSettings,
    branches_in,
    split_s,
)
from stablelora_kernels.ops.lora_linear.torch import linear_backward_torch, linear_forward_torch
from stablelora_kernels.ops.lora_linear.triton import lora_linear_bwd, lora_linear_fwd
from stablelora_kernels.ops.plans import (
    Backend,
    Entry,
    on_torch,
    tally_of_operators,
    tensors_of,
)
from stablelora_kernels.projection import (
    BIASES,
    LORA_AS,
    LORA_BS,
    WEIGHTS,
    Projection,
    by_projection,
    layouts_of,
    operands_of,
    scales_of,
)

_BACKENDS = {
    "triton": Backend(lora_linear_fwd, lora_linear_bwd),
    "torch": Backend(
        on_torch(LinearForwardCall.of, linear_forward_torch),
        on_torch(LinearBackwardCall.of, linear_backward_torch),
    ),
}


class _LinearContext(Context, Protocol):
    facts: LinearFacts


class _LoRALinear(torch.autograd.Function):
    """Gradients of x, the A's and the B's by the formulas; those of weights and biases, if
    required, by plain products.

    ``tensors``: what ``operands_of`` makes of the projections, then all scales, and the
    projections' seeds. Either all A's require gradients or none; so do the B's.
    """

    @staticmethod
    def forward(
        ctx: _LinearContext,
        entry: Entry | None,
        facts: LinearFacts,
        x: Tensor,
        base: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        needs = facts.backward
        forward = _BACKENDS[facts.backend].forward
        results = forward(entry, [x, base, *tensors], facts.forward)
        scales = tensors[facts.operand_count : facts.operand_count + facts.scale_count]
        masks = results.masks
        if not (masks and (needs.need_x or needs.need_a)):
            masks = [None] * len(results.ys)
        # Save only what backward reads, as LinearBackwardCall's tensors. Save x itself, not its
        # rows: the surrounding graph already holds it.
        ctx.save_for_backward(
            x if needs.need_a or True in facts.need_weights else None,
            *read_by_backward(tensors[: facts.operand_count], weights=needs.need_x),
            *(scales if needs.need_x else ()),
            *(results.s if needs.need_b else ()),
            *masks,
        )
        if len(results.ys) > 1:
            ctx.set_materialize_grads(False)
        ctx.facts = facts
        return tuple(results.ys)

    @staticmethod
    @first_derivative
    def backward(ctx: _LinearContext, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        facts = ctx.facts
        x, *tensors = ctx.saved_tensors
        grads: Sequence[Tensor | None] = dys
        if facts.is_branch:
            # A lone branch computes in x's dtype.
            grads = [dy.to(facts.x_dtype) for dy in dys if dy is not None]
        saved_call = [x, *grads, *tensors]
        settings = facts.backward
        used: Sequence[int] = range(len(dys))
        if len(dys) > 1:
            used = [place for place, dy in enumerate(dys) if dy is not None]
        if len(used) < len(dys):
            # The outputs of a group's other projections were not used.
            call = _of_used(used, LinearBackwardCall.of(saved_call, settings))
            saved_call = tensors_of(call)
            settings = call.settings
        count = len(dys)
        dx = None
        of_operands: list[Tensor | None] = [None] * facts.operand_count
        if used and (settings.need_x or settings.need_a or settings.need_b):
            gradients = _BACKENDS[facts.backend].backward(None, saved_call, settings)
            if settings.need_x:
                dx = gradients.dx
            if settings.need_a:
                of_operands[LORA_AS] = _at_places(used, gradients.das, count)
            if settings.need_b:
                of_operands[LORA_BS] = _at_places(used, gradients.dbs, count)
        if True in facts.need_weights:
            of_operands[WEIGHTS] = [
                weight_gradient(x, dy) if is_needed and dy is not None else None
                for dy, is_needed in zip(dys, facts.need_weights, strict=True)
            ]
        if True in facts.need_biases:
            of_operands[BIASES] = [
                bias_gradient(dy) if is_needed and dy is not None else None
                for dy, is_needed in zip(dys, facts.need_biases, strict=True)
            ]
        dbase = dys[0] if facts.is_branch else None
        without_gradient = facts.scale_count + count
        return (None, None, dx, dbase, *of_operands, *[None] * without_gradient)


_apply_known = apply_of_known_calls(_LoRALinear)


def _at_places(
    places: Sequence[int], values: Sequence[Tensor | None], count: int
) -> Sequence[Tensor | None]:
    """A list of ``count`` with ``values`` at ``places``, and None elsewhere."""
    if len(values) == count:
        return values
    filled: list[Tensor | None] = [None] * count
    for place, value in zip(places, values, strict=False):
        filled[place] = value
    return filled


def _of_used(used: Sequence[int], call: LinearBackwardCall) -> LinearBackwardCall:
    """``call`` for those projections of a group alone whose outputs were ``used``."""
    operands = by_projection(call.operands)
    every_s = split_s(call.s, branches_in(call.operands, LORA_AS))
    scalings = tuple([call.settings.scalings[place] for place in used])
    # The weights of a group are not quantized: there are no scales.
    return call._replace(
        grads=[call.grads[place] for place in used],
        operands=[t for place in used for t in operands[place]],
        s=[every_s[place] for place in used] if every_s else [],
        masks=[call.masks[place] for place in used],
        settings=call.settings._replace(scalings=scalings),
    )


def lora_linear_op(
    x: Tensor,
    projections: Sequence[Projection],
    base: Tensor | None,
    dropout_p: float,
    backend: str,
    entry: Entry | None = None,
    seeds: Sequence[Tensor | None] | None = None,
) -> Sequence[Tensor]:
    """The projections' outputs, for checked arguments and a chosen backend; with ``base``, that of
    a lone branch.

    ``entry``: that of the call's key. ``seeds``: of the projections' masks on Triton, if the call
    is a part of one that has drawn them.
    """
    facts: LinearFacts | None = None if entry is None else entry.facts
    if facts is None:
        facts = _facts_of(x, projections, base, dropout_p, backend)
        if entry is not None:
            if _prefers_operators(facts, x, projections, base):
                facts = _facts_of(x, projections, base, dropout_p, "torch")
            if facts.backend == "torch" and facts.strategy != "one by one":
                facts = facts._replace(tally=tally_of_operators("lora_linear", x.device))
            entry.facts = facts
    if seeds is None and facts.backend == "triton":
        # For every strategy: the first forward of a checkpoint, without gradients, may take another
        # than the second.
        seeds = draw_seeds(x.device, [dropout_p] * len(projections))
    if facts.strategy == "one by one":
        # An entry also says that the call is not traced.
        members = [None] * len(projections) if entry is None else facts.members
        return [
            lora_linear_op(
                x, (p,), None, dropout_p, backend, members[i], seeds and seeds[i : i + 1]
            )[0]
            for i, p in enumerate(projections)
        ]
    if facts.tally is not None:
        facts.tally.calls += 1
    if facts.strategy == "plain operators":
        return (plain_operators(x, projections[0], base, dropout_p),)
    scales = scales_of(projections, facts.forward.layouts)
    tensors = [*operands_of(projections), *scales, *(seeds or [None] * len(projections))]
    if facts.strategy == "with gradients":
        apply: Callable[..., Any] = _LoRALinear.apply if entry is None else _apply_known
        ys: tuple[Tensor, ...] = apply(entry, facts, x, base, *tensors)
        return ys
    return _BACKENDS[facts.backend].forward(entry, [x, base, *tensors], facts.forward).ys


def _prefers_operators(
    facts: LinearFacts, x: Tensor, projections: Sequence[Projection], base: Tensor | None
) -> bool:
    """Whether first use has found that the PyTorch path should take the call."""
    if facts.backend == "torch" or facts.strategy == "one by one" or not is_on(x.device):
        return False
    tensors = [*operands_of(projections), *scales_of(projections, facts.forward.layouts)]
    seeds = [None] * len(projections)
    return lora_linear_fwd.prefers_operators([x, base, *tensors, *seeds], facts.forward)


def _facts_of(
    x: Tensor,
    projections: Sequence[Projection],
    base: Tensor | None,
    dropout_p: float,
    backend: str,
) -> LinearFacts:
    """What follows from the layouts and settings of a call, computed once for each key."""
    layouts = layouts_of(projections)
    scalings = scalings_after_dropout([p.scaling for p in projections], dropout_p)
    need_x = _needs_gradient(x)
    need_a = _needs_gradient(*[p.lora_A for p in projections])
    need_b = _needs_gradient(*[p.lora_B for p in projections])
    need_weights = tuple([_needs_gradient(p.weight) for p in projections])
    need_biases = tuple([_needs_gradient(p.bias) for p in projections])
    operands_train = True in (need_x, need_a, need_b, *need_weights, *need_biases)
    strategy = _strategy_of(x, projections, base, dropout_p, backend, operands_train)
    members: tuple[Entry, ...] = ()
    if strategy == "one by one":
        members = tuple([Entry(backend) for _ in projections])
    return LinearFacts(
        strategy=strategy,
        backend=backend,
        x_dtype=x.dtype,
        is_branch=base is not None,
        operand_count=len(operands_of(projections)),
        scale_count=len(scales_of(projections, layouts)),
        forward=LinearForwardSettings(
            layouts,
            scalings,
            dropout_p,
            save_s=need_b,
            save_mask=dropout_p > 0 and (need_x or need_a),
        ),
        backward=LinearBackwardSettings(
            layouts if need_x else (), scalings, dropout_p, need_x, need_a, need_b
        ),
        need_weights=need_weights,
        need_biases=need_biases,
        members=members,
    )


def _needs_gradient(*tensors: object) -> bool:
    """Whether a gradient of one of ``tensors`` is required. Quantized weights have none."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _strategy_of(
    x: Tensor,
    projections: Sequence[Projection],
    base: Tensor | None,
    dropout_p: float,
    backend: str,
    operands_train: bool,
) -> str:
    """See :class:`LinearFacts`. ``operands_train``: whether a gradient of x or of the projections is
    needed.
    """
    trains = operands_train or _needs_gradient(base)
    usual = "with gradients" if trains else "without gradients"
    plain: list[Any] = [p.weight for p in projections if not isinstance(p.weight, Stored)]
    if len(projections) > 1:
        by_function = (
            _is_uniform([p.lora_A for p in projections])
            and _is_uniform([p.lora_B for p in projections])
            and len(plain) == len(projections)
            and not (backend == "torch" and is_few(x, *plain))
        )
        return usual if by_function else "one by one"
    # Ordinary autograd would save a dequantized weight, and plain operators would round a branch to
    # x's dtype.
    if (
        backend == "torch"
        and (plain or not trains)
        and (base is None or base.dtype == x.dtype)
        and is_few(x, *plain, limit=few_rows(x, dropout_p, operands_train))
    ):
        return "plain operators"
    return usual


def _is_uniform(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all of ``tensors`` require gradients, or none."""
    return len({t.requires_grad for t in tensors if t is not None}) < 2
