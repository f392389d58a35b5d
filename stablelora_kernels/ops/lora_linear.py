"""``lora_linear`` with its gradients: autograd around the ops of ``lora_linear_triton`` and around
the PyTorch path.

    forward   S_g  = s'_g (X ∘ keep_g) A_g^T           Y_g = X W_g^T + bias_g + S_g B_g^T
    backward  dS_g = s'_g dY_g B_g                     dX  = Σ_g dY_g W_g + (dS_g A_g) ∘ keep_g
              dA_g = dS_g^T (X ∘ keep_g)               dB_g = dY_g^T S_g

g is one projection, or each of a projection group: up to three projections of one X (q, k and v;
gate and up). A group reads X once for all S and once for all dA, and each projection adds its dX to
the stored sum. Its masks are those of projections computed one by one.

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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stablelora_kernels.ops.autograd import (
    Context,
    apply_of_known_calls,
    first_derivative,
    read_by_backward,
)
from stablelora_kernels.ops.cpu_products import few_rows, is_few
from stablelora_kernels.ops.dropout import draw_dropout, draw_seed, scalings_after_dropout
from stablelora_kernels.ops.formulas import (
    Gradients,
    Wanted,
    plain_operators,
    torch_bwd,
    torch_fwd,
)
from stablelora_kernels.ops.lora_linear_triton import (
    LinearBackwardCall,
    LinearBackwardResults,
    LinearBackwardSettings,
    LinearForwardCall,
    LinearForwardResults,
    LinearForwardSettings,
    branches_in,
    lora_linear_bwd,
    lora_linear_fwd,
    split_s,
)
from stablelora_kernels.ops.matrices import as_matrix, like_rows_of, with_own_memory
from stablelora_kernels.ops.plans import Entry, tensors_of
from stablelora_kernels.projection import (
    BIASES,
    LORA_AS,
    LORA_BS,
    WEIGHTS,
    Projection,
    by_projection,
    layouts_of,
    operands_of,
    projections_of,
    scales_of,
)
from stablelora_kernels.quantized import Stored
from stablelora_kernels.utils.tensors import cast

_NO_GRADIENTS = Gradients(None, (), ())


class Needs(NamedTuple):
    """Whether gradients are required: of x, of the A's and the B's (of all or none), of each weight
    and of each bias.
    """

    x: bool
    a: bool
    b: bool
    weights: tuple[bool, ...]
    biases: tuple[bool, ...]


class LinearFacts(NamedTuple):
    """What follows from the key of a call."""

    # "one by one", by "plain operators", "with gradients" or "without gradients".
    strategy: str
    backend: str
    x_dtype: torch.dtype
    # Of A and B.
    lora_dtype: torch.dtype
    needs: Needs
    # Whether there is a base product in place of a weight.
    is_branch: bool
    operand_count: int
    scale_count: int
    forward: LinearForwardSettings
    backward: LinearBackwardSettings
    # "one by one": the projections' own entries.
    members: tuple[Entry, ...]


# The results of a forward, the operands and scales that were multiplied, and each s'.
Forward = tuple[LinearForwardResults, Sequence[Tensor | None], tuple[float, ...]]


def _forward(
    facts: LinearFacts,
    entry: Entry | None,
    x: Tensor,
    base: Tensor | None,
    tensors: Sequence[Tensor | None],
) -> Forward:
    """For x [..., K]. ``tensors``: what ``operands_of`` makes of the projections, then all scales."""
    settings = facts.forward
    if facts.backend == "torch":
        nothing = [None] * len(settings.scalings)
        return _torch_forward(LinearForwardCall.of([x, base, *tensors, *nothing], settings))
    seeds: list[Tensor | None] = [None] * len(settings.scalings)
    if settings.dropout_p:
        # One by one, in the order in which separate projections draw theirs.
        seeds = [draw_seed(x.device, settings.dropout_p) for _ in settings.scalings]
    results = lora_linear_fwd(entry, [x, base, *tensors, *seeds], settings)
    return results, tensors, settings.scalings


def _torch_forward(call: LinearForwardCall) -> Forward:
    """The PyTorch path draws its own masks, without seeds."""
    settings = call.settings
    rows = as_matrix(call.x)
    keeps: list[Tensor | None] = []
    scalings: list[float] = []
    for scaling in settings.scalings:
        keep, scaling_after_dropout = draw_dropout(rows, settings.dropout_p, scaling)
        keeps.append(keep)
        scalings.append(scaling_after_dropout)
    # Cast once for forward and backward. The kernels cast in registers.
    operands = _with_branches_in(call.x.dtype, call.operands)
    projections = projections_of(operands, call.scales, settings.layouts, scalings)
    matrices, every_s = torch_fwd(
        rows, projections, keeps, None if call.base is None else as_matrix(call.base)
    )
    like = call.x if call.base is None else call.base
    ys = [like_rows_of(y, like) for y in matrices]
    return LinearForwardResults(ys, every_s, keeps), [*operands, *call.scales], tuple(scalings)


def _with_branches_in(dtype: torch.dtype, operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``operands`` with each A and B in ``dtype``."""
    cast_operands = [*operands]
    cast_operands[LORA_AS] = [cast(lora_A, dtype) for lora_A in operands[LORA_AS]]
    cast_operands[LORA_BS] = [cast(lora_B, dtype) for lora_B in operands[LORA_BS]]
    return cast_operands


class _LinearContext(Context, Protocol):
    facts: LinearFacts
    settings: LinearBackwardSettings


class _LoRALinear(torch.autograd.Function):
    """Gradients of x, the A's and the B's by the formulas; those of weights and biases, if
    required, by plain products.

    ``tensors``: what ``operands_of`` makes of the projections, and then all scales. Either all A's
    require gradients or none; so do the B's.
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
        needs = facts.needs
        results, multiplied, scalings = _forward(facts, entry, x, base, tensors)
        masks = results.masks
        if not (masks and (needs.x or needs.a)):
            masks = [None] * len(results.ys)
        # Save only what backward reads, as LinearBackwardCall's tensors. Save x itself, not its
        # rows: the surrounding graph already holds it.
        ctx.save_for_backward(
            x if needs.a or True in needs.weights else None,
            *read_by_backward(multiplied[: facts.operand_count], weights=needs.x),
            *(multiplied[facts.operand_count :] if needs.x else ()),
            *(results.s if needs.b else ()),
            *masks,
        )
        if len(results.ys) > 1:
            ctx.set_materialize_grads(False)
        ctx.facts = facts
        ctx.settings = facts.backward
        if scalings != facts.backward.scalings:
            # Dropout's, of the PyTorch path.
            ctx.settings = facts.backward._replace(scalings=scalings)
        return tuple(results.ys)

    @staticmethod
    @first_derivative
    def backward(ctx: _LinearContext, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        facts = ctx.facts
        needs = facts.needs
        x, *tensors = ctx.saved_tensors
        grads: Sequence[Tensor | None] = dys
        if facts.is_branch:
            # A lone branch computes in x's dtype.
            grads = [dy.to(facts.x_dtype) for dy in dys if dy is not None]
        saved_call = [x, *grads, *tensors]
        settings = ctx.settings
        used: Sequence[int] = range(len(dys))
        if len(dys) > 1:
            used = [place for place, dy in enumerate(dys) if dy is not None]
        if len(used) < len(dys):
            # The outputs of a group's other projections were not used.
            call = _of_used(used, LinearBackwardCall.of(saved_call, settings))
            saved_call = tensors_of(call)
            settings = call.settings
        gradients: Gradients | LinearBackwardResults = _NO_GRADIENTS
        if used and (needs.x or needs.a or needs.b):
            gradients = _gradients(facts, saved_call, settings)
        count = len(dys)
        of_operands: list[Tensor | None] = [None] * facts.operand_count
        if needs.a:
            of_operands[LORA_AS] = _at_places(used, gradients.das, count)
        if needs.b:
            of_operands[LORA_BS] = _at_places(used, gradients.dbs, count)
        if True in needs.weights:
            of_operands[WEIGHTS] = _weight_gradients(x, dys, needs.weights)
        if True in needs.biases:
            of_operands[BIASES] = _bias_gradients(dys, needs.biases)
        dx = gradients.dx if needs.x else None
        dbase = dys[0] if facts.is_branch else None
        return (None, None, dx, dbase, *of_operands, *[None] * facts.scale_count)


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


def _weight_gradients(
    x: Tensor | None, dys: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """dW = dY^T X for each dY, if it is wanted."""
    assert x is not None
    rows = as_matrix(x)
    return [
        as_matrix(dy).t() @ rows if is_wanted and dy is not None else None
        for dy, is_wanted in zip(dys, wanted, strict=True)
    ]


def _bias_gradients(dys: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The sum of each dY over its rows, if it is wanted."""
    return [
        as_matrix(dy).sum(0) if is_wanted and dy is not None else None
        for dy, is_wanted in zip(dys, wanted, strict=True)
    ]


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


def _gradients(
    facts: LinearFacts, tensors: Sequence[Tensor | None], settings: LinearBackwardSettings
) -> Gradients | LinearBackwardResults:
    """dX, the dA's and the dB's. ``tensors``: those of the call, one after another."""
    if facts.backend == "triton":
        return lora_linear_bwd(None, tensors, settings)
    call = LinearBackwardCall.of(tensors, settings)
    gradients = torch_bwd(
        None if call.x is None else as_matrix(call.x),
        [with_own_memory(as_matrix(grad)) for grad in call.grads],
        projections_of(call.operands, call.scales, settings.layouts, settings.scalings),
        call.s or [None] * len(call.grads),
        call.masks,
        facts.lora_dtype,
        Wanted(settings.need_x, settings.need_a, settings.need_b),
    )
    dx = gradients.dx
    if dx is not None:
        dx = dx.view(*call.grads[0].shape[:-1], dx.shape[1])
    return Gradients(dx, gradients.das, gradients.dbs)


def lora_linear_op(
    x: Tensor,
    projections: Sequence[Projection],
    base: Tensor | None,
    dropout_p: float,
    backend: str,
    entry: Entry | None = None,
) -> Sequence[Tensor]:
    """The projections' outputs, for checked arguments and a chosen backend; with ``base``, that of
    a lone branch.

    ``entry``: that of the call's key.
    """
    facts: LinearFacts | None = None if entry is None else entry.facts
    if facts is None:
        facts = _facts_of(x, projections, base, dropout_p, backend)
        if entry is not None:
            entry.facts = facts
    if facts.strategy == "one by one":
        # An entry also says that the call is not traced.
        members = [None] * len(projections) if entry is None else facts.members
        return [
            lora_linear_op(x, (p,), None, dropout_p, backend, member)[0]
            for p, member in zip(projections, members, strict=True)
        ]
    if facts.strategy == "plain operators":
        return (plain_operators(x, projections[0], base, dropout_p),)
    tensors = [*operands_of(projections), *scales_of(projections, facts.forward.layouts)]
    if facts.strategy == "with gradients":
        apply: Callable[..., Any] = _LoRALinear.apply if entry is None else _apply_known
        ys: tuple[Tensor, ...] = apply(entry, facts, x, base, *tensors)
        return ys
    return _forward(facts, entry, x, base, tensors)[0].ys


def _facts_of(
    x: Tensor,
    projections: Sequence[Projection],
    base: Tensor | None,
    dropout_p: float,
    backend: str,
) -> LinearFacts:
    """What follows from the layouts and settings of a call, computed once for each key."""
    needs = _needs_of(x, projections)
    strategy = _strategy_of(x, projections, base, dropout_p, backend, needs)
    members: tuple[Entry, ...] = ()
    if strategy == "one by one":
        members = tuple([Entry(backend) for _ in projections])
    scalings = tuple([p.scaling for p in projections])
    if backend == "triton":
        scalings = scalings_after_dropout(scalings, dropout_p)
    layouts = layouts_of(projections)
    lora_A = projections[0].lora_A
    assert lora_A is not None
    return LinearFacts(
        strategy=strategy,
        backend=backend,
        x_dtype=x.dtype,
        lora_dtype=lora_A.dtype,
        needs=needs,
        is_branch=base is not None,
        operand_count=len(operands_of(projections)),
        scale_count=len(scales_of(projections, layouts)),
        forward=LinearForwardSettings(
            layouts,
            scalings,
            dropout_p,
            save_s=needs.b,
            save_mask=dropout_p > 0 and (needs.x or needs.a),
        ),
        backward=LinearBackwardSettings(
            layouts if needs.x else (), scalings, dropout_p, needs.x, needs.a, needs.b
        ),
        members=members,
    )


def _needs_gradient(*tensors: object) -> bool:
    """Whether a gradient of one of ``tensors`` is required. Quantized weights have none."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _needs_of(x: Tensor, projections: Sequence[Projection]) -> Needs:
    return Needs(
        x=_needs_gradient(x),
        a=_needs_gradient(*[p.lora_A for p in projections]),
        b=_needs_gradient(*[p.lora_B for p in projections]),
        weights=tuple([_needs_gradient(p.weight) for p in projections]),
        biases=tuple([_needs_gradient(p.bias) for p in projections]),
    )


def _strategy_of(
    x: Tensor,
    projections: Sequence[Projection],
    base: Tensor | None,
    dropout_p: float,
    backend: str,
    needs: Needs,
) -> str:
    """See :class:`LinearFacts`."""
    operands_train = needs.x or needs.a or needs.b or True in needs.weights or True in needs.biases
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
