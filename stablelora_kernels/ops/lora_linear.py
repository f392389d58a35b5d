"""``lora_linear`` with its gradients: the Triton kernels as torch.library ops, the PyTorch path, and autograd around both.

    forward   S_g  = s'_g (X ∘ keep_g) A_g^T           Y_g = X W_g^T + bias_g + S_g B_g^T
    backward  dS_g = s'_g dY_g B_g                     dX  = Σ_g dY_g W_g + (dS_g A_g) ∘ keep_g
              dA_g = dS_g^T (X ∘ keep_g)               dB_g = dY_g^T S_g

g is one projection, or each of a projection group: up to three projections of one X (q, k and v; gate and up). A group reads X
once for all S and once for all dA, and each projection adds its dX to the stored sum. Its masks are those of projections computed
one by one.

A lone branch (``lora_branch``) has a base product BASE in place of X W^T, which another layer has computed; its dX has no dY W.
The op does not write to BASE: another backward may need it, and the traffic is the same out of place.

Autograd saves X, which the surrounding graph usually holds anyway, and S. For dropout it saves a seed on Triton, whose backward
draws the mask again, and the bool mask on the PyTorch path. For a quantized weight it saves the stored form, never the whole W;
the PyTorch path dequantizes it again in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.dispatch import autotune
from stablelora_kernels.dispatch.problem import Call, Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.ops.library import apply, first_derivative
from stablelora_kernels.ops.matmul import row_count
from stablelora_kernels.ops.plans import Entry, define_launches
from stablelora_kernels.ops.torch_path import (
    as_matrix,
    draw_dropout,
    expanded,
    few_rows,
    is_few,
    like_rows_of,
    plain_branch,
    torch_bwd,
    torch_fwd,
)
from stablelora_kernels.projection import Lists, Projection, flatten, unflatten
from stablelora_kernels.quantized import Stored, as_plain


def _allocate_forward(call: Any) -> tuple[list[Tensor], Tensor]:
    x, like = call.x, call.x if call.base is None else call.base
    ys = [like.new_empty((*x.shape[:-1], b.shape[0])) for b in call.lora_Bs]
    return ys, x.new_empty(row_count(x) if call.save_s else 0, sum(a.shape[0] for a in call.lora_As))


@define_launches(
    "lora_linear_fwd",
    "(Tensor x, Tensor? base, Tensor?[] datas, Tensor[] scales, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor?[] seeds, int[] layouts, float[] scalings, float dropout_p, bool save_s) -> (Tensor[], Tensor)",
    _allocate_forward,
)
def lora_linear_fwd(
    device: Device, call: Any, results: tuple[list[Tensor], Tensor], choice: Choice | None
) -> list[Any]:
    """The Y's [..., N], and with ``save_s`` the S's [M, r] side by side, for x [..., K].

    ``projection.flatten`` makes the lists; the scalings are s' = scaling / (1 - p). With ``base`` [..., N] there is one
    projection, a lone branch, and Y has base's dtype.
    """
    from stablelora_kernels.launch.lora_linear import forward_launches

    ys, s = [as_matrix(y) for y in results[0]], results[1] if call.save_s else None
    x, base = as_matrix(call.x), None if call.base is None else as_matrix(call.base).contiguous()
    tensors = (call.datas, call.scales, call.biases, call.lora_As, call.lora_Bs)
    first, *others = projections = unflatten(tensors, call.layouts, call.scalings)
    build = partial(forward_launches, device, x, projections, call.seeds, s, ys, call.dropout_p, base)
    if choice is None and not others and isinstance(first.weight, Tensor) and _is_tuned(x):
        (m, k), (n, r) = x.shape, call.lora_Bs[0].shape
        product = Call("forward", m, n, k, r, x.dtype, call.lora_As[0].dtype, call.dropout_p > 0)
        choice = autotune.choose(device, product, build, ys[0], x, first.weight, first.bias)
    return build(choice=choice)


def _allocate_backward(call: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad, k = call.grads[0], call.lora_As[0].shape[1]
    dx = grad.new_empty((*grad.shape[:-1], k) if call.need_x else (0, k))
    return dx, _like(call.lora_As) if call.need_a else [], _like(call.lora_Bs) if call.need_b else []


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


@define_launches(
    "lora_linear_bwd",
    "(Tensor? x, Tensor[] grads, Tensor?[] datas, Tensor[] scales, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] s, "
    "Tensor?[] seeds, int[] layouts, float[] scalings, float dropout_p, bool need_x, bool need_a, bool need_b) "
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
    tensors = (call.datas, call.scales, (), call.lora_As, call.lora_Bs)
    first, *others = projections = unflatten(tensors, call.layouts, call.scalings)
    s = _each_s(call.s, call.lora_As) or nothing
    build = partial(backward_launches, device, x, grads, projections, s, call.seeds, call.dropout_p, wanted)
    if choice is None and not others:
        grad, (n, r), k = grads[0], call.lora_Bs[0].shape, call.lora_As[0].shape[1]
        product = Call("backward", grad.shape[0], k, n, r, grad.dtype, call.lora_As[0].dtype, call.dropout_p > 0)
        if call.need_x and isinstance(first.weight, Tensor) and _is_tuned(grad):
            # Time it with dA and dB: some kernels compute them in the same launch as dX.
            choice = autotune.choose(device, product, build, as_matrix(dx), grad, first.weight, None)
    return build(choice=choice)


def _is_tuned(x: Tensor) -> bool:
    """Whether the kernel of a call on ``x`` is to be measured; on the meta device nothing runs."""
    return autotune.get_autotune() and not x.is_meta


def _each_s(s: Sequence[Tensor], lora_As: Sequence[Tensor]) -> list[Tensor]:
    """Each projection's S, if one matrix has all of them or they are separate already."""
    return [*s[0].split([a.shape[0] for a in lora_As], 1)] if len(s) == 1 < len(lora_As) else [*s]


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """The seed of dropout's mask, None without dropout."""
    # It stays on the device: there is no synchronization, and a CUDA graph draws a new one at each replay.
    return torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p else None


def _forward(
    x: Tensor, base: Tensor | None, lists: Lists, dropout_p: float, backend: str, entry: Entry | None, save_s: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None], Sequence[float]]:
    """The Y's [..., N], S, dropout's seeds or masks, and each s', for x [..., K] and the ``lists`` of projections.

    On Triton one matrix has every S, side by side; it is empty without ``save_s``.
    """
    tensors, layouts, scalings = lists
    if backend == "triton":
        seeds: Sequence[Tensor | None] = (None,) * len(scalings)
        if dropout_p:
            # One by one, in the order in which separate projections draw theirs.
            seeds, scalings = [draw_seed(x, dropout_p) for _ in scalings], [each / (1 - dropout_p) for each in scalings]
        *ys, s = lora_linear_fwd((x, base, *tensors, seeds, layouts, scalings, dropout_p, save_s), entry)
        return ys, (s,), seeds, scalings
    rows = as_matrix(x)
    drawn = [draw_dropout(rows, dropout_p, scaling) for scaling in scalings]
    keeps, scalings = [keep for keep, _ in drawn], [scaling for _, scaling in drawn]
    matrix = None if base is None else as_matrix(base)
    ys, each_s = torch_fwd(rows, unflatten(tensors, layouts, scalings), keeps, matrix)
    like = x if base is None else base
    return [like_rows_of(y, like) for y in ys], each_s, keeps, scalings


class _LoRALinear(torch.autograd.Function):
    """Gradients of x, the A's and the B's by the formulas; those of weights and biases, if required, by plain products.

    ``tensors``: the datas, biases, A's and B's of the projections, then all scales. Either all A's require gradients or none; so
    do the B's.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, base: Tensor | None, scalings: Sequence[float], layouts: Sequence[int], dropout_p: float,
        backend: str, entry: Entry | None, *tensors: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        n, need_x, needs = len(scalings), ctx.needs_input_grad[0], ctx.needs_input_grad[7:]
        need_a, need_b, need_w = any(needs[2 * n : 3 * n]), any(needs[3 * n : 4 * n]), any(needs[:n])
        datas, biases, lora_As, lora_Bs, scales = split(tensors, n)
        lora_dtype = lora_As[0].dtype
        if backend == "torch":
            # Cast once for forward and backward. The kernels cast in registers.
            lora_As, lora_Bs = ([t.to(x.dtype) for t in given] for given in (lora_As, lora_Bs))
        lists = (datas, scales, biases, lora_As, lora_Bs), layouts, scalings
        ys, s, random, scalings = _forward(x, base, lists, dropout_p, backend, entry, need_b)
        nothing = (None,) * n
        if not need_x:
            datas, layouts, scales = nothing, (), ()
        # Save only what backward reads. Save x itself, not its rows: the surrounding graph already holds it.
        ctx.save_for_backward(
            x if need_w or need_a else None,
            *datas,
            *(random if need_x or need_a else nothing),
            *lora_As,
            *lora_Bs,
            *scales,
            *(s if need_b else ()),
        )
        if n > 1:
            ctx.set_materialize_grads(False)
        needs = (need_x, need_a, need_b, need_w or any(needs[n : 2 * n]))
        ctx.call = (needs, scalings, layouts, len(scales), base is not None, dropout_p, backend, x.dtype, lora_dtype)
        return tuple(ys)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs, scalings, layouts, scale_count, is_branch, dropout_p, backend, x_dtype, lora_dtype = ctx.call
        need_x, need_a, need_b, need_plain = needs
        x, *saved = ctx.saved_tensors
        n = len(given)
        datas, random, lora_As, lora_Bs, rest = split(saved, n)
        scales, s = rest[:scale_count], rest[scale_count:]
        used: Sequence[int] = range(n)
        grads: Any = given
        dx: Tensor | None = None
        das: Sequence[Any] = ()
        dbs: Sequence[Any] = ()
        if n > 1 and any(grad is None for grad in given):
            # Skip projections whose outputs were not used.
            used = [i for i, grad in enumerate(given) if grad is not None]
            lists = (given, datas, random, lora_As, lora_Bs, _each_s(s, lora_As), scalings)
            grads, datas, random, lora_As, lora_Bs, s, scalings = ([each[i] for i in used if each] for each in lists)
        if is_branch:
            datas, grads = (), [grads[0].to(x_dtype)]
        if used and (need_x or need_a or need_b):
            if backend == "triton":
                tensors = (x, grads, datas, scales, lora_As, lora_Bs, s, random)
                dx, *found = lora_linear_bwd((*tensors, layouts, scalings, dropout_p, need_x, need_a, need_b))
                das, dbs = (found[: len(used)], found[len(used) :]) if need_a else ((), found)
            else:
                leading, grads = grads[0].shape[:-1], [expanded(as_matrix(grad)) for grad in grads]
                projections = unflatten((datas, scales, (), lora_As, lora_Bs), layouts, scalings)
                rows = None if x is None else as_matrix(x)
                dx, das, dbs = torch_bwd(rows, grads, projections, s, random, lora_dtype, need_x, need_a, need_b)
                dx = None if dx is None else dx.view(*leading, dx.shape[1])
        wanted = ctx.needs_input_grad
        results: list[Any] = [None] * len(wanted)
        results[0], results[1] = dx if need_x else None, given[0] if wanted[1] else None
        for place, i in enumerate(used):
            weight, bias, lora_A, lora_B = range(7 + i, 7 + i + 4 * n, n)
            if need_a:
                results[lora_A] = das[place]
            if need_b:
                results[lora_B] = dbs[place]
            if need_plain and wanted[weight]:
                results[weight] = as_matrix(grads[place]).t() @ as_matrix(x)
            if need_plain and wanted[bias]:
                results[bias] = as_matrix(grads[place]).sum(0)
        return tuple(results)


def split(tensors: Sequence[Any], n: int) -> tuple[Any, Any, Any, Any, Any]:
    """Four times ``n`` of ``tensors``, and the rest."""
    return tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n], tensors[3 * n : 4 * n], tensors[4 * n :]


def lora_linear_op(
    x: Tensor, projections: Sequence[Projection], base: Tensor | None, dropout_p: float, backend: str,
    entry: Entry | None = None,
) -> Sequence[Tensor]:  # fmt: skip
    """The projections' outputs, for checked arguments and a chosen backend; with ``base``, that of a lone branch.

    ``entry``: that of the call's key.
    """
    strategy = None if entry is None else entry.strategy
    if strategy is None:
        strategy = _strategy(x, projections, base, dropout_p, backend)
        if entry is not None:
            entry.strategy = strategy
    if strategy == "one by one":
        return [lora_linear_op(x, (p,), None, dropout_p, backend)[0] for p in projections]
    if strategy == "plain operators":
        return (_plain_operators(x, projections[0], base, dropout_p),)
    lists = (datas, scales, biases, lora_As, lora_Bs), layouts, scalings = flatten(projections)
    if strategy == "with gradients":
        tensors = (*datas, *biases, *lora_As, *lora_Bs, *scales)
        return apply(_LoRALinear, x, base, scalings, layouts, dropout_p, backend, entry, *tensors)
    if backend == "torch":
        lora_As, lora_Bs = [a.to(x.dtype) for a in lora_As], [b.to(x.dtype) for b in lora_Bs]
        lists = (datas, scales, biases, lora_As, lora_Bs), layouts, scalings
    return _forward(x, base, lists, dropout_p, backend, entry, False)[0]


def _strategy(x: Tensor, projections: Sequence[Projection], base: Tensor | None, dropout_p: float, backend: str) -> str:
    """How to compute a call: "one by one", by "plain operators", "with gradients" or "without gradients"."""
    weights, biases, lora_As, lora_Bs, _ = zip(*projections, strict=True)
    plain: list[Any] = [weight for weight in weights if not isinstance(weight, Stored)]
    tensors = (x, base, *plain, *biases, *lora_As, *lora_Bs)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if len(projections) > 1:
        uniform = all(len({t.requires_grad for t in each}) == 1 for each in (lora_As, lora_Bs))
        if not uniform or len(plain) < len(weights) or (backend == "torch" and is_few(x, *plain)):
            return "one by one"
    # Ordinary autograd would save a dequantized weight, and plain operators would round a branch to x's dtype.
    elif (
        (plain or not needs_grad)
        and (base is None or base.dtype == x.dtype)
        and backend == "torch"
        and is_few(x, *plain, limit=few_rows(x, dropout_p))
    ):
        return "plain operators"
    return "with gradients" if needs_grad else "without gradients"


def _plain_operators(x: Tensor, p: Projection, base: Tensor | None, dropout_p: float) -> Tensor:
    """The output of one projection or of a lone branch by PyTorch's operators under ordinary autograd."""
    assert p.lora_A is not None and p.lora_B is not None
    rows, like = as_matrix(x), x if base is None else base
    if base is not None:
        matrix = as_matrix(base)
    else:
        assert p.weight is not None
        matrix = torch.nn.functional.linear(rows, as_plain(p.weight, x.dtype), p.bias)
    y = plain_branch(matrix, rows, p.lora_A, p.lora_B, p.scaling, dropout_p)
    return y if like.dim() == 2 else y.view(*like.shape[:-1], y.shape[-1])
