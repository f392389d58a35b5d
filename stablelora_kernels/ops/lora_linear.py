"""``lora_linear`` with its gradients: the Triton kernels as torch.library ops, the PyTorch path, and autograd around both.

    forward   S_g  = s'_g (X ∘ keep_g) A_g^T           Y_g = X W_g^T + bias_g + S_g B_g^T
    backward  dS_g = s'_g dY_g B_g                     dX  = Σ_g dY_g W_g + (dS_g A_g) ∘ keep_g
              dA_g = dS_g^T (X ∘ keep_g)               dB_g = dY_g^T S_g

g is one projection, or each of a projection group: up to three projections of one X (q, k and v; gate and up). A group reads X
once for all S and once for all dA, and each projection adds its dX to the stored sum. Its masks are those of projections computed
one by one.

A lone branch (``lora_branch``) has a base product BASE in place of X W^T, which another layer has computed; its dX has no dY W.
The op does not write to BASE: another backward may need it, and the traffic is the same out of place.

Autograd saves X, which the surrounding graph usually holds anyway, and S. For dropout it saves the mask, a bit an element on
Triton and a byte on the PyTorch path. For a quantized weight it saves the stored form, never the whole W;
the PyTorch path dequantizes it again in backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
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
    Projection,
    flatten,
    layouts_of,
    projections_in,
    projections_of,
    scale_count,
    split,
    unflatten,
)
from stablelora_kernels.quantized import Stored, as_plain
from stablelora_kernels.utils.tensors import cast, drop_share, outside_autocast


def new_mask(x: Tensor, columns: int) -> Tensor:
    """Memory for the dropout mask of x's rows: int32 [M, ceil(columns / 32)], see ``reference.unpack_mask``."""
    return x.new_empty((math.prod(x.shape[:-1]), -(-columns // 32)), dtype=torch.int32)


def _allocate_forward(call: Any) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    x, like = call.x, call.x if call.base is None else call.base
    ys = [like.new_empty((*x.shape[:-1], b.shape[0])) for b in call.lora_Bs]
    s = x.new_empty(math.prod(x.shape[:-1]) if call.save_s else 0, sum(a.shape[0] for a in call.lora_As))
    return ys, s, [new_mask(x, x.shape[-1]) for _ in call.seeds if call.save_mask]


@define_launches(
    "lora_linear_fwd",
    "(Tensor x, Tensor? base, Tensor?[] datas, Tensor[] scales, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor?[] seeds, int[] layouts, float[] scalings, float dropout_p, bool save_s, bool save_mask) "
    "-> (Tensor[], Tensor, Tensor[])",
    _allocate_forward,
)
def lora_linear_fwd(
    device: Device, call: Any, results: tuple[list[Tensor], Tensor, list[Tensor]], choice: Choice | None
) -> list[Any]:
    """The Y's [..., N], with ``save_s`` the S's [M, r] side by side, and with ``save_mask`` each mask, for x [..., K].

    ``projection.flatten`` makes the lists; the scalings are :func:`scalings_of`. With ``base`` [..., N] there is one
    projection, a lone branch, and Y has base's dtype.
    """
    from stablelora_kernels.launch.lora_linear import forward_launches

    ys, s = [as_matrix(y) for y in results[0]], results[1] if call.save_s else None
    x, base = as_matrix(call.x), None if call.base is None else as_matrix(call.base).contiguous()
    masks: Sequence[Tensor | None] = results[2] or [None] * len(ys)
    random = [*zip(call.seeds, masks, strict=True)]
    return forward_launches(device, x, projections_in(call), random, s, ys, call.dropout_p, base, choice)


def _allocate_backward(call: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad, k = call.grads[0], call.lora_As[0].shape[1]
    dx = grad.new_empty((*grad.shape[:-1], k) if call.need_x else (0, k))
    return dx, _like(call.lora_As) if call.need_a else [], _like(call.lora_Bs) if call.need_b else []


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


@define_launches(
    "lora_linear_bwd",
    "(Tensor? x, Tensor[] grads, Tensor?[] datas, Tensor[] scales, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] s, "
    "Tensor?[] masks, int[] layouts, float[] scalings, float dropout_p, bool need_x, bool need_a, bool need_b) "
    "-> (Tensor, Tensor[], Tensor[])",
    _allocate_backward,
)
def lora_linear_bwd(
    device: Device, call: Any, results: tuple[Tensor, list[Tensor], list[Tensor]], choice: Choice | None
) -> list[Any]:
    """dX [..., K], the dA's and the dB's, for x [..., K] and each dY [..., N]; those that are not needed are empty.

    ``s``: each projection's S, or one matrix that has all of them side by side. Data of a weight that dX does not read is None;
    a lone branch has no datas.
    """
    from stablelora_kernels.launch.lora_linear import backward_launches

    dx, das, dbs = results
    x, grads = None if call.x is None else as_matrix(call.x), [as_matrix(grad) for grad in call.grads]
    nothing = [None] * len(grads)
    wanted = as_matrix(dx) if call.need_x else None, das or nothing, dbs or nothing
    s = _each_s(call.s, call.lora_As) or nothing
    projections = projections_in(call)
    return backward_launches(device, x, grads, projections, s, call.masks, call.dropout_p, wanted, choice)


def _each_s(s: Sequence[Tensor], lora_As: Sequence[Tensor]) -> list[Tensor]:
    """Each projection's S, if one matrix has all of them or they are separate already."""
    return [*s[0].split([a.shape[0] for a in lora_As], 1)] if len(s) == 1 < len(lora_As) else [*s]


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """The seed of dropout's mask, None without dropout."""
    # It stays on the device: there is no synchronization, and a CUDA graph draws a new one at each replay.
    return torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p else None


def scalings_of(scalings: Sequence[float], dropout_p: float) -> tuple[float, ...]:
    """s' = scaling / (1 - p) of each projection, with the probability that the kernels drop by."""
    return tuple([scaling / (1 - drop_share(dropout_p)) for scaling in scalings])


class LinearFacts(NamedTuple):
    """What follows from the key of a call."""

    # "one by one", by "plain operators", "with gradients" or "without gradients".
    strategy: str
    backend: str
    # Of x, and of A and B.
    dtypes: tuple[torch.dtype, torch.dtype]
    dropout_p: float
    # s' on Triton. On the PyTorch path s: the mask has a probability of its own.
    scalings: tuple[float, ...]
    # Whether gradients of x, the A's and the B's are required, and of any weight and of any bias.
    needs: tuple[bool, bool, bool, bool, bool]
    # The ops' arguments but for the tensors: lengths of the lists, and numbers.
    forward: tuple[tuple[int, ...], tuple[Any, ...]]
    backward: tuple[tuple[int, ...], tuple[Any, ...]]
    # "one by one": the projections' own entries.
    members: tuple[Entry, ...]


def _forward(
    facts: LinearFacts, entry: Entry | None, x: Tensor, base: Tensor | None, tensors: Sequence[Any]
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None], Sequence[float]]:
    """The Y's [..., N], S, dropout's masks, and each s', for x [..., K] and the flattened projections.

    On Triton one matrix has every S, side by side; it is empty if no gradient needs it, and no mask is there then. On the
    PyTorch path all tensors have x's dtype.
    """
    _, backend, _, dropout_p, scalings, _, (lengths, numbers), *_ = facts
    if backend == "triton":
        # One by one, in the order in which separate projections draw theirs.
        seeds = [draw_seed(x, dropout_p) for _ in scalings] if dropout_p else [None] * len(scalings)
        results, n = lora_linear_fwd((x, base, *tensors, *seeds), lengths, numbers, entry), len(seeds)
        return results[:n], results[n : n + 1], results[n + 1 :] or [None] * n, scalings
    rows = as_matrix(x)
    keeps, scalings = zip(*[draw_dropout(rows, dropout_p, scaling) for scaling in scalings], strict=True)
    projections = unflatten(tensors, lengths[:-1], numbers[0], scalings)
    ys, each_s = torch_fwd(rows, projections, keeps, None if base is None else as_matrix(base))
    like = x if base is None else base
    return [like_rows_of(y, like) for y in ys], each_s, keeps, scalings


def _cast(tensors: Sequence[Any], n: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """The flattened tensors of ``n`` projections, with A's and B's in ``dtype``."""
    return (*tensors[: -2 * n], *[cast(t, dtype) for t in tensors[-2 * n :]])


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` of an autograd function, once differentiable and in the dtypes of its forward, autocast or not."""
    careful = once_differentiable(outside_autocast(backward))

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        # The usual backward pass needs no care, which would take longer than the rest of this function's Python.
        usual = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._is_any_autocast_enabled())
        return backward(ctx, *grads) if usual else careful(ctx, *grads)

    return run


def apply(function: type[torch.autograd.Function], entry: Any, *args: Any) -> Any:
    """``function.apply(entry, *args)``. ``entry``: that of the call's key, or None."""
    if entry is None:
        return function.apply(entry, *args)
    # A call with a key is neither traced nor transformed. Function.apply would ask about every argument, then calls this.
    return super(torch.autograd.Function, function).apply(entry, *args)  # type: ignore[misc]


class _LoRALinear(torch.autograd.Function):
    """Gradients of x, the A's and the B's by the formulas; those of weights and biases, if required, by plain products.

    ``tensors`` are flattened projections. Either all A's require gradients or none; so do the B's.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, entry: Entry | None, facts: LinearFacts, x: Tensor, base: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        n, (need_x, need_a, need_b, need_w, _) = len(facts.scalings), facts.needs
        if facts.backend == "torch":
            # Cast once for forward and backward. The kernels cast in registers.
            tensors = _cast(tensors, n, x.dtype)
        ys, s, random, scalings = _forward(facts, entry, x, base, tensors)
        nothing = (None,) * n
        weights = tensors[: -3 * n] if need_x else nothing
        # Save only what backward reads. Save x itself, not its rows: the surrounding graph already holds it.
        ctx.save_for_backward(
            x if need_w or need_a else None,
            *(weights if base is None else ()),
            *tensors[-2 * n :],
            *(s if need_b else ()),
            *(random if need_x or need_a else nothing),
        )
        if n > 1:
            ctx.set_materialize_grads(False)
        ctx.call = (facts, scalings)
        return tuple(ys)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        facts, scalings = ctx.call
        _, backend, dtypes, _, _, needs, (lengths, _), backward, _ = facts
        need_x, need_a, need_b, need_w, need_bias = needs
        x, *saved = ctx.saved_tensors
        n, scales, is_branch = len(given), lengths[1], backward[0][1] == 0
        used: Sequence[int] = range(n)
        grads: Sequence[Any] = given
        if is_branch:
            grads = [given[0] if given[0].dtype is dtypes[0] else given[0].to(dtypes[0])]
        elif n > 1 and any(grad is None for grad in given):
            used, grads, saved, scalings, backward = _of_used(given, saved, scalings, backward)
        dx: Tensor | None = None
        found: Sequence[Any] = ()
        if used and (need_x or need_a or need_b):
            if backend == "triton":
                dx, *found = lora_linear_bwd((x, *grads, *saved), *backward)
            else:
                leading, grads = grads[0].shape[:-1], [expanded(as_matrix(grad)) for grad in grads]
                datas, of_weights, lora_As, lora_Bs, s, random = split(saved, backward[0][1:])
                projections = projections_of(datas, of_weights, (), lora_As, lora_Bs, backward[1][0], scalings)
                rows = None if x is None else as_matrix(x)
                dx, das, dbs = torch_bwd(rows, grads, projections, s, random, dtypes[1], need_x, need_a, need_b)
                dx, found = None if dx is None else dx.view(*leading, dx.shape[1]), [*das, *dbs]
        results: list[Any] = [None] * (4 + scales + 4 * n)
        results[2:4] = dx if need_x else None, given[0] if is_branch else None
        for place, i in enumerate(used):
            if need_a:
                results[4 + scales + 2 * n + i] = found[place]
            if need_b:
                results[4 + scales + 3 * n + i] = found[place - len(used)]
            if need_w and ctx.needs_input_grad[4 + i]:
                results[4 + i] = as_matrix(grads[place]).t() @ as_matrix(x)
            if need_bias and ctx.needs_input_grad[4 + scales + n + i]:
                results[4 + scales + n + i] = as_matrix(grads[place]).sum(0)
        return tuple(results)


def _of_used(
    given: Sequence[Tensor | None], saved: Sequence[Any], scalings: Sequence[float], backward: tuple[Any, Any]
) -> tuple[Any, ...]:
    """A group's projections whose outputs were used: their places, gradients, saved tensors and s', and the op's arguments."""
    lengths, (layouts, _, *others) = backward
    used = [i for i, grad in enumerate(given) if grad is not None]
    datas, scales, lora_As, lora_Bs, s, random = split(saved, lengths[1:])
    lists = [datas, lora_As, lora_Bs, _each_s(s, lora_As), random]
    datas, lora_As, lora_Bs, s, random = ([each[i] for i in used if each] for each in lists)
    saved, scalings = [*datas, *lora_As, *lora_Bs, *s, *random], tuple([scalings[i] for i in used])
    count = len(used)
    lengths = (count, count, len(scales), count, count, len(s), count)
    return used, [given[i] for i in used], saved, scalings, (lengths, (layouts, scalings, *others))


def lora_linear_op(
    x: Tensor, projections: Sequence[Projection], base: Tensor | None, dropout_p: float, backend: str,
    entry: Entry | None = None,
) -> Sequence[Tensor]:  # fmt: skip
    """The projections' outputs, for checked arguments and a chosen backend; with ``base``, that of a lone branch.

    ``entry``: that of the call's key.
    """
    facts = None if entry is None else entry.facts
    if facts is None:
        facts = _facts_of(x, projections, base, dropout_p, backend)
        if entry is not None:
            entry.facts = facts
    strategy = facts.strategy
    if strategy == "one by one":
        # An entry also says that the call is not traced.
        members = facts.members if entry is not None else [None] * len(projections)
        pairs = zip(projections, members, strict=True)
        return [lora_linear_op(x, (p,), None, dropout_p, backend, member)[0] for p, member in pairs]
    if strategy == "plain operators":
        return (_plain_operators(x, projections[0], base, dropout_p),)
    tensors = flatten(projections)
    if strategy == "with gradients":
        return apply(_LoRALinear, entry, facts, x, base, *tensors)
    if backend == "torch":
        tensors = _cast(tensors, len(projections), x.dtype)
    return _forward(facts, entry, x, base, tensors)[0]


def _facts_of(
    x: Tensor, projections: Sequence[Projection], base: Tensor | None, dropout_p: float, backend: str
) -> LinearFacts:
    weights, biases, lora_As, lora_Bs, scalings = zip(*projections, strict=True)
    plain: list[Any] = [weight for weight in weights if not isinstance(weight, Stored)]
    needs = [
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in each)
        for each in ((x,), lora_As, lora_Bs, plain, biases, (base,))
    ]
    strategy = "with gradients" if any(needs) else "without gradients"
    if len(projections) > 1:
        uniform = all(len({t.requires_grad for t in each}) == 1 for each in (lora_As, lora_Bs))
        if not uniform or len(plain) < len(weights) or (backend == "torch" and is_few(x, *plain)):
            strategy = "one by one"
    # Ordinary autograd would save a dequantized weight, and plain operators would round a branch to x's dtype.
    elif (
        (plain or not any(needs))
        and (base is None or base.dtype == x.dtype)
        and backend == "torch"
        and is_few(x, *plain, limit=few_rows(x, dropout_p, any(needs)))
    ):
        strategy = "plain operators"
    if backend == "triton":
        scalings = scalings_of(scalings, dropout_p)
    need_x, need_a, need_b, *_ = needs
    n, layouts = len(projections), layouts_of(projections)
    scales, s_count = scale_count(layouts), (1 if backend == "triton" else n) if need_b else 0
    lengths = (n if base is None else 0, scales if need_x else 0, n, n, s_count, n)
    return LinearFacts(
        strategy,
        backend,
        (x.dtype, lora_As[0].dtype),
        dropout_p,
        scalings,
        tuple(needs[:5]),  # type: ignore[arg-type]
        ((n, scales, n, n, n, n), (layouts, scalings, dropout_p, need_b, dropout_p > 0 and (need_x or need_a))),
        ((n, *lengths), (layouts if need_x else (), scalings, dropout_p, need_x, need_a, need_b)),
        tuple([Entry(backend) for _ in projections]) if strategy == "one by one" else (),
    )


def _plain_operators(x: Tensor, p: Projection, base: Tensor | None, dropout_p: float) -> Tensor:
    """The output of one projection or of a lone branch by PyTorch's operators under ordinary autograd."""
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
