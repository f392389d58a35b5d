"""``lora_linear`` with its gradients: the Triton kernels as torch.library ops, the PyTorch path,
and autograd around both.

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
mask, a bit an element on Triton and a byte on the PyTorch path. For a quantized weight it saves the
stored form, never the whole W; the PyTorch path dequantizes it again in backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.ops.plans import Entry, define_launches
from stablelora_kernels.ops.torch_path import (
    as_matrix,
    draw_dropout,
    expanded,
    few_rows,
    is_few,
    like_rows_of,
    masked,
    torch_bwd,
    torch_fwd,
    with_branch,
    without_autocast,
)
from stablelora_kernels.projection import (
    BIASES,
    LORA_AS,
    LORA_BS,
    WEIGHTS,
    Projection,
    flat,
    in_fours,
    layouts_of,
    projections_in,
    projections_of,
    scales_of,
    split,
)
from stablelora_kernels.quantized import Stored, as_plain
from stablelora_kernels.utils.tensors import cast, drop_share, outside_autocast


def new_mask(x: Tensor, columns: int) -> Tensor:
    """Memory for the dropout mask of x's rows: int32 [M, ceil(columns / 32)], see
    ``reference.unpack_mask``.
    """
    return x.new_empty((math.prod(x.shape[:-1]), -(-columns // 32)), dtype=torch.int32)


def _allocate_forward(call: Any) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    x, like = call.x, call.x if call.base is None else call.base
    lora_As, lora_Bs = call.operands[LORA_AS], call.operands[LORA_BS]
    ys = [like.new_empty((*x.shape[:-1], b.shape[0])) for b in lora_Bs]
    s = x.new_empty(math.prod(x.shape[:-1]) if call.save_s else 0, sum(a.shape[0] for a in lora_As))
    return ys, s, [new_mask(x, x.shape[-1]) for _ in call.seeds if call.save_mask]


@define_launches(
    "lora_linear_fwd",
    "(Tensor x, Tensor? base, Tensor?[] operands, Tensor[] scales, Tensor?[] seeds, int[] layouts, float[] scalings, "
    "float dropout_p, bool save_s, bool save_mask) -> (Tensor[], Tensor, Tensor[])",
    _allocate_forward,
)
def lora_linear_fwd(
    device: Device,
    call: Any,
    results: tuple[list[Tensor], Tensor, list[Tensor]],
    choice: Choice | None,
) -> list[Any]:
    """The Y's [..., N], with ``save_s`` the S's [M, r] side by side, and with ``save_mask`` each
    mask, for x [..., K].

    ``projection.flat`` makes the operands; the scalings are :func:`scalings_of`. With ``base``
    [..., N] there is one projection, a lone branch, and Y has base's dtype.
    """
    from stablelora_kernels.launch.lora_linear import ForwardCall, forward_launches

    ys, s = [as_matrix(y) for y in results[0]], results[1] if call.save_s else None
    x, base = as_matrix(call.x), None if call.base is None else as_matrix(call.base).contiguous()
    masks: Sequence[Tensor | None] = results[2] or [None] * len(ys)
    forward = ForwardCall(x, projections_in(call), call.seeds, masks, s, ys, call.dropout_p, base)
    return forward_launches(device, forward, choice)


def _allocate_backward(call: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    lora_As, lora_Bs = call.operands[LORA_AS], call.operands[LORA_BS]
    grad, k = call.grads[0], lora_As[0].shape[1]
    dx = grad.new_empty((*grad.shape[:-1], k) if call.need_x else (0, k))
    return dx, _like(lora_As) if call.need_a else [], _like(lora_Bs) if call.need_b else []


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


@define_launches(
    "lora_linear_bwd",
    "(Tensor? x, Tensor[] grads, Tensor?[] operands, Tensor[] scales, Tensor[] s, Tensor?[] masks, int[] layouts, "
    "float[] scalings, float dropout_p, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor[], Tensor[])",
    _allocate_backward,
)
def lora_linear_bwd(
    device: Device,
    call: Any,
    results: tuple[Tensor, list[Tensor], list[Tensor]],
    choice: Choice | None,
) -> list[Any]:
    """dX [..., K], the dA's and the dB's, for x [..., K] and each dY [..., N]; those that are not
    needed are empty.

    ``s``: each projection's S, or one matrix that has all of them side by side. Biases are None,
    and so is the data of a weight that dX does not read, or that a lone branch does not have.
    """
    from stablelora_kernels.launch.lora_linear import BackwardCall, Gradients, backward_launches

    dx, das, dbs = results
    x, grads = (
        None if call.x is None else as_matrix(call.x),
        [as_matrix(grad) for grad in call.grads],
    )
    nothing = [None] * len(grads)
    wanted = Gradients(as_matrix(dx) if call.need_x else None, das or nothing, dbs or nothing)
    s = _each_s(call.s, call.operands[LORA_AS]) or nothing
    projections = projections_in(call)
    backward = BackwardCall(x, grads, projections, s, call.masks, call.dropout_p, wanted)
    return backward_launches(device, backward, choice)


def _each_s(s: Sequence[Tensor], lora_As: Sequence[Tensor]) -> list[Tensor]:
    """Each projection's S, if one matrix has all of them or they are separate already."""
    return [*s[0].split([a.shape[0] for a in lora_As], 1)] if len(s) == 1 < len(lora_As) else [*s]


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """The seed of dropout's mask, None without dropout."""
    # It stays on the device: there is no synchronization, and a CUDA graph draws a new one at each
    # replay.
    return torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p else None


def scalings_of(scalings: Sequence[float], dropout_p: float) -> tuple[float, ...]:
    """s' = scaling / (1 - p) of each projection, with the probability that the kernels drop by."""
    return tuple([scaling / (1 - drop_share(dropout_p)) for scaling in scalings])


class Needs(NamedTuple):
    """Whether gradients are required: of x, of the A's and the B's (of all or none), of any weight
    and of any bias.
    """

    x: bool
    a: bool
    b: bool
    weight: bool
    bias: bool


class Saved(NamedTuple):
    """How many tensors forward saves behind x, of each kind in this order."""

    operands: int
    scales: int
    s: int
    masks: int


class ForwardNumbers(NamedTuple):
    """The last arguments of ``lora_linear_fwd``."""

    layouts: tuple[int, ...]
    # s' on Triton. On the PyTorch path s: the mask has a probability of its own.
    scalings: tuple[float, ...]
    dropout_p: float
    save_s: bool
    save_mask: bool


class BackwardNumbers(NamedTuple):
    """The last arguments of ``lora_linear_bwd``."""

    layouts: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout_p: float
    need_x: bool
    need_a: bool
    need_b: bool


class LinearFacts(NamedTuple):
    """What follows from the key of a call."""

    # "one by one", by "plain operators", "with gradients" or "without gradients".
    strategy: str
    backend: str
    # Of A and B.
    lora_dtype: torch.dtype
    needs: Needs
    # Whether there is a base product in place of a weight.
    is_branch: bool
    saved: Saved
    forward: ForwardNumbers
    backward: BackwardNumbers
    # "one by one": the projections' own entries.
    members: tuple[Entry, ...]


class Forward(NamedTuple):
    """The Y's [..., N], S, dropout's masks, each s', and the operands that it computed with.

    On Triton one matrix has every S, side by side; it is empty if no gradient needs it, and no mask
    is there then.
    """

    ys: Sequence[Tensor]
    s: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    scalings: Sequence[float]
    operands: Sequence[Any]


def _forward(
    facts: LinearFacts,
    entry: Entry | None,
    x: Tensor,
    base: Tensor | None,
    operands: Sequence[Any],
    scales: Sequence[Tensor],
) -> Forward:
    """For x [..., K], and the projections that ``projection.flat`` has taken apart."""
    numbers = facts.forward
    scalings, dropout_p = numbers.scalings, numbers.dropout_p
    if facts.backend == "triton":
        # One by one, in the order in which separate projections draw theirs.
        seeds = [draw_seed(x, dropout_p) for _ in scalings] if dropout_p else [None] * len(scalings)
        ys, s, masks = lora_linear_fwd(entry, (x, base), (operands, scales, seeds), numbers)
        return Forward(ys, [s], masks or [None] * len(ys), scalings, operands)
    rows = as_matrix(x)
    keeps, scalings = zip(
        *[draw_dropout(rows, dropout_p, scaling) for scaling in scalings], strict=True
    )
    # Cast once for forward and backward. The kernels cast in registers.
    operands = with_branches_in(operands, x.dtype)
    projections = projections_of(operands, scales, numbers.layouts, scalings)
    ys, each_s = torch_fwd(rows, projections, keeps, None if base is None else as_matrix(base))
    like = x if base is None else base
    return Forward([like_rows_of(y, like) for y in ys], each_s, keeps, scalings, operands)


def with_branches_in(operands: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """``operands`` with each A and B in ``dtype``."""
    cast_operands = [*operands]
    for kind in (LORA_AS, LORA_BS):
        cast_operands[kind] = [cast(t, dtype) for t in operands[kind]]
    return cast_operands


def read_by_backward(operands: Sequence[Any], weights: bool) -> list[Any]:
    """``operands`` without those that backward does not read: biases, and unless ``weights``,
    weights.
    """
    nothing = [None] * (len(operands) // 4)
    kept = [*operands]
    kept[BIASES] = nothing
    if not weights:
        kept[WEIGHTS] = nothing
    return kept


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` of an autograd function, once differentiable and in the dtypes of its forward,
    autocast or not.
    """
    careful = once_differentiable(outside_autocast(backward))

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        # The usual backward pass needs no care, which would take longer than the rest of this
        # function's Python.
        usual = not (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or torch._C._is_any_autocast_enabled()
        )
        return backward(ctx, *grads) if usual else careful(ctx, *grads)

    return run


def apply(function: type[torch.autograd.Function], entry: Any, *args: Any) -> Any:
    """``function.apply(entry, *args)``. ``entry``: that of the call's key, or None."""
    if entry is None:
        return function.apply(entry, *args)
    # A call with a key is neither traced nor transformed. Function.apply would ask about every
    # argument, then calls this.
    return super(torch.autograd.Function, function).apply(entry, *args)  # type: ignore[misc]


class _LoRALinear(torch.autograd.Function):
    """Gradients of x, the A's and the B's by the formulas; those of weights and biases, if
    required, by plain products.

    ``tensors``: what ``projection.flat`` makes of the projections, and then all scales. Either all
    A's require gradients or none; so do the B's.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        entry: Entry | None,
        facts: LinearFacts,
        x: Tensor,
        base: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        needs, count = facts.needs, facts.saved.operands
        operands, scales = tensors[:count], tensors[count:]
        done = _forward(facts, entry, x, base, operands, scales)
        # Save only what backward reads. Save x itself, not its rows: the surrounding graph already
        # holds it.
        ctx.save_for_backward(
            x if needs.weight or needs.a else None,
            *read_by_backward(done.operands, weights=needs.x),
            *(scales if needs.x else ()),
            *(done.s if needs.b else ()),
            *(done.masks if needs.x or needs.a else [None] * len(done.masks)),
        )
        if len(done.ys) > 1:
            ctx.set_materialize_grads(False)
        ctx.call = (facts, x.dtype, done.scalings)
        return tuple(done.ys)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *dys: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        facts, dtype, scalings = ctx.call
        needs = facts.needs
        x, *tensors = ctx.saved_tensors
        saved = split(tensors, facts.saved)
        # A lone branch computes in x's dtype.
        grads = [dys[0].to(dtype)] if facts.is_branch else [*dys]
        used = [i for i, grad in enumerate(grads) if grad is not None]
        if len(used) < len(grads):
            # The outputs of a group's other projections were not used.
            grads, scalings, saved = _of_used(used, grads, scalings, saved)
        dx: Tensor | None = None
        das: Sequence[Any] = ()
        dbs: Sequence[Any] = ()
        if used and (needs.x or needs.a or needs.b):
            dx, das, dbs = _gradients(facts, x, grads, saved, scalings)
        # Of each projection, as its operands: of the weight, the bias, A and B.
        of_each: list[Sequence[Tensor | None]] = [(None,) * 4] * len(dys)
        for place, i in enumerate(used):
            dw = dbias = None
            if needs.weight or needs.bias:
                # Behind entry, facts, x and base.
                wants_weight, wants_bias = in_fours(ctx.needs_input_grad[4:])[i][:2]
                dw = as_matrix(grads[place]).t() @ as_matrix(x) if wants_weight else None
                dbias = as_matrix(grads[place]).sum(0) if wants_bias else None
            of_each[i] = (
                dw,
                dbias,
                das[place] if needs.a else None,
                dbs[place] if needs.b else None,
            )
        of_operands = chain.from_iterable(of_each)
        of_scales = [None] * (len(ctx.needs_input_grad) - 4 - 4 * len(dys))
        return (
            None,
            None,
            dx if needs.x else None,
            dys[0] if facts.is_branch else None,
            *of_operands,
            *of_scales,
        )


def _gradients(
    facts: LinearFacts,
    x: Tensor | None,
    grads: Sequence[Tensor],
    saved: Sequence[Any],
    scalings: tuple[float, ...],
) -> tuple[Tensor | None, Sequence[Tensor], Sequence[Tensor]]:
    """dX, the dA's and the dB's, for each dY and the lists that forward saved behind x."""
    needs = facts.needs
    numbers = facts.backward
    if facts.backend == "triton":
        if len(scalings) < len(numbers.scalings):
            numbers = numbers._replace(scalings=scalings)
        return lora_linear_bwd(None, (x,), (grads, *saved), numbers)  # type: ignore[no-any-return]
    operands, scales, s, keeps = saved
    rows = None if x is None else as_matrix(x)
    matrices = [expanded(as_matrix(grad)) for grad in grads]
    projections = projections_of(operands, scales, numbers.layouts, scalings)
    dx, das, dbs = torch_bwd(
        rows, matrices, projections, s, keeps, facts.lora_dtype, needs.x, needs.a, needs.b
    )
    return None if dx is None else dx.view(*grads[0].shape[:-1], dx.shape[1]), das, dbs


def _of_used(
    used: Sequence[int], grads: Sequence[Any], scalings: Sequence[float], saved: Sequence[Any]
) -> tuple[list[Any], tuple[float, ...], list[Any]]:
    """A group's gradients, s' and saved lists of those projections alone whose outputs were
    ``used``.
    """
    operands, scales, s, masks = saved
    each_s = _each_s(s, operands[LORA_AS])
    fours = in_fours(operands)
    # The weights of a group are not quantized, so there are no scales.
    saved = [
        [t for i in used for t in fours[i]],
        scales,
        [each_s[i] for i in used if each_s],
        [masks[i] for i in used],
    ]
    return [grads[i] for i in used], tuple([scalings[i] for i in used]), saved


def lora_linear_op(
    x: Tensor, projections: Sequence[Projection], base: Tensor | None, dropout_p: float, backend: str,
    entry: Entry | None = None,
) -> Sequence[Tensor]:  # fmt: skip
    """The projections' outputs, for checked arguments and a chosen backend; with ``base``, that of
    a lone branch.

    ``entry``: that of the call's key.
    """
    facts = None if entry is None else entry.facts
    if facts is None:
        facts = _facts_of(x, projections, base, dropout_p, backend)
        if entry is not None:
            entry.facts = facts
    if facts.strategy == "one by one":
        # An entry also says that the call is not traced.
        members = facts.members if entry is not None else [None] * len(projections)
        pairs = zip(projections, members, strict=True)
        return [lora_linear_op(x, (p,), None, dropout_p, backend, member)[0] for p, member in pairs]
    if facts.strategy == "plain operators":
        return (_plain_operators(x, projections[0], base, dropout_p),)
    operands, scales = flat(projections), scales_of(projections, facts.forward.layouts)
    if facts.strategy == "with gradients":
        return apply(_LoRALinear, entry, facts, x, base, *operands, *scales)
    return _forward(facts, entry, x, base, operands, scales).ys


def _facts_of(
    x: Tensor,
    projections: Sequence[Projection],
    base: Tensor | None,
    dropout_p: float,
    backend: str,
) -> LinearFacts:
    weights, biases, lora_As, lora_Bs, scalings = zip(*projections, strict=True)
    plain: list[Any] = [weight for weight in weights if not isinstance(weight, Stored)]
    *needs, of_base = (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in each)
        for each in ((x,), lora_As, lora_Bs, plain, biases, (base,))
    )
    trains = any((*needs, of_base))
    strategy = "with gradients" if trains else "without gradients"
    if len(projections) > 1:
        uniform = all(len({t.requires_grad for t in each}) == 1 for each in (lora_As, lora_Bs))
        if not uniform or len(plain) < len(weights) or (backend == "torch" and is_few(x, *plain)):
            strategy = "one by one"
    # Ordinary autograd would save a dequantized weight, and plain operators would round a branch to
    # x's dtype.
    elif (
        (plain or not trains)
        and (base is None or base.dtype == x.dtype)
        and backend == "torch"
        and is_few(x, *plain, limit=few_rows(x, dropout_p, any(needs)))
    ):
        strategy = "plain operators"
    if backend == "triton":
        scalings = scalings_of(scalings, dropout_p)
    members = tuple([Entry(backend) for _ in projections]) if strategy == "one by one" else ()
    dtype, layouts = lora_As[0].dtype, layouts_of(projections)
    needed, n = Needs(*needs), len(projections)
    each_s = 1 if backend == "triton" else n
    saved = Saved(
        operands=4 * n,
        scales=len(scales_of(projections, layouts)) if needed.x else 0,
        s=each_s if needed.b else 0,
        masks=n,
    )
    save_mask = dropout_p > 0 and (needed.x or needed.a)
    forward = ForwardNumbers(layouts, scalings, dropout_p, needed.b, save_mask)
    read_layouts = layouts if needed.x else ()
    backward = BackwardNumbers(read_layouts, scalings, dropout_p, needed.x, needed.a, needed.b)
    return LinearFacts(
        strategy, backend, dtype, needed, base is not None, saved, forward, backward, members
    )


def _plain_operators(x: Tensor, p: Projection, base: Tensor | None, dropout_p: float) -> Tensor:
    """The output of one projection or of a lone branch by PyTorch's operators under ordinary
    autograd.
    """
    assert p.lora_A is not None and p.lora_B is not None
    rows, like = as_matrix(x), x if base is None else base
    if base is not None:
        matrix = as_matrix(base)
    else:
        assert p.weight is not None
        matrix = torch.nn.functional.linear(rows, as_plain(p.weight, x.dtype), p.bias)
    keep, scaling = draw_dropout(rows, dropout_p, p.scaling)
    if p.lora_A.dtype is x.dtype or rows.shape[0] > p.rank or isinstance(p.weight, Stored):
        s = torch.nn.functional.linear(masked(rows, keep), cast(p.lora_A, x.dtype))
        y = with_branch(matrix, s, cast(p.lora_B, x.dtype), scaling)
    else:
        # The rows are smaller than A and B, and cast instead.
        with without_autocast(x):
            s = torch.nn.functional.linear(masked(rows.to(p.lora_A.dtype), keep), p.lora_A)
            y = matrix.add(torch.mm(s, p.lora_B.t()), alpha=scaling).to(matrix.dtype)
    return y if like.dim() == 2 else y.view(*like.shape[:-1], y.shape[-1])
