"""A gated MLP with LoRA in one autograd node: gate, up, activation and down. ``reference/mlp.py`` has the formulas.

    forward   G = gate(X)   U = up(X)   H = act(G) ∘ U   Y = down(H)
    backward  dH = dX of down, for dY   dG = dH ∘ U ∘ act'(G)   dU = dH ∘ act(G)   then gate's and up's gradients for them

Autograd saves X, G, U and each S. Backward computes H, act(G) and dropout's masks again where it needs them: the PyTorch path
from the state of torch's generator, where it can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.dispatch import problem
from stablelora_kernels.ops.library import apply, first_derivative
from stablelora_kernels.ops.lora_linear import draw_seed, lora_linear_op
from stablelora_kernels.ops.matmul import row_count
from stablelora_kernels.ops.plans import Entry, define_launches
from stablelora_kernels.ops.torch_mlp import Kept, Projections, Settings, act, torch_mlp_bwd, torch_mlp_fwd
from stablelora_kernels.ops.torch_path import (
    as_matrix,
    draw_dropout,
    expanded,
    is_few,
    like_rows_of,
    masked,
    with_branch,
)
from stablelora_kernels.quantized import Stored, apart, as_plain, together


def _sizes(weight: Tensor, layout: Sequence[int]) -> tuple[int, int]:
    """N and K of a weight, or of the bytes of a quantized one."""
    n, k = layout[1:3] if layout[0] else weight.shape
    return n, k


def _branches(
    like: Tensor,
    datas: Sequence[Tensor | None],
    layouts: Sequence[int],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """The A's and B's, of rank 0 for a projection without a branch; in ``like``'s dtype if all are without one."""
    as_, bs = [], []
    dtype = next((t.dtype for t in lora_As if t is not None), like.dtype)
    for i, (data, a, b) in enumerate(zip(datas, lora_As, lora_Bs, strict=True)):
        # A missing branch's sizes are never read where the weight is not read.
        n, k = (0, 0) if data is None else _sizes(data, layouts[5 * i : 5 * i + 5])
        as_.append(torch.empty(0, k, dtype=dtype, device=like.device) if a is None else a)
        bs.append(torch.empty(n, 0, dtype=dtype, device=like.device) if b is None else b)
    return as_, bs


def _rank(lora_A: Tensor | None) -> int:
    return 0 if lora_A is None else lora_A.shape[0]


def _fwd_fake(x, datas, scales, layouts, biases, lora_As, lora_Bs, seeds, scalings, dropout_p, activation, save):  # type: ignore[no-untyped-def]
    (f, _), (n, _) = _sizes(datas[0], layouts[:5]), _sizes(datas[2], layouts[10:])
    kept, m = (x.shape[:-1], row_count(x)) if save else ((0,), 0)
    ranks = [_rank(a) for a in lora_As]
    return (
        x.new_empty((*x.shape[:-1], n)),
        x.new_empty((*kept, f)),
        x.new_empty((*kept, f)),
        x.new_empty(m, ranks[0] + ranks[1]),
        x.new_empty(m, ranks[2]),
    )


@define_launches(
    "lora_mlp_fwd",
    "(Tensor x, Tensor[] datas, Tensor[] scales, int[] layouts, Tensor?[] biases, Tensor?[] lora_As, Tensor?[] lora_Bs, "
    "Tensor?[] seeds, float[] scalings, float dropout_p, str activation, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def lora_mlp_fwd(
    x: Tensor, datas: Sequence[Tensor], scales: Sequence[Tensor], layouts: Sequence[int], biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None], seeds: Sequence[Tensor | None],
    scalings: Sequence[float], dropout_p: float, activation: str, save: bool,
) -> tuple[tuple[Tensor, ...], list[Any]]:  # fmt: skip
    """Y [..., N], and with ``save`` G and U [..., F], gate's and up's S side by side and down's S, for x [..., K].

    The weights are taken apart by ``quantized.apart``; ``scalings`` are s' = scaling / (1 - p).
    """
    from stablelora_kernels.launch.lora_mlp import forward_launches

    results = _fwd_fake(
        x, datas, scales, layouts, biases, lora_As, lora_Bs, seeds, scalings, dropout_p, activation, save
    )
    branches = _branches(x, datas, layouts, lora_As, lora_Bs)
    given = (as_matrix(x), together(datas, scales, layouts), biases, *branches, seeds, scalings, dropout_p, activation)
    y, *kept = (as_matrix(result) for result in results)
    return results, forward_launches(problem.device_of(x.device), *given, y, *(kept if save else [None] * 4))


def _bwd_fake(
    x, grad, g, u, datas, scales, layouts, lora_As, lora_Bs, s, s_down, seeds, scalings, dropout_p, activation, need_x, needs_a,
    needs_b,
):  # type: ignore[no-untyped-def]  # fmt: skip
    def like(tensors, needs):  # type: ignore[no-untyped-def]
        return [
            torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else grad.new_empty(0)
            for t, need in zip(tensors, needs, strict=True)
        ]

    dx = grad.new_empty((*grad.shape[:-1], _sizes(datas[0], layouts[:5])[1]) if need_x else 0)
    return dx, like(lora_As, needs_a), like(lora_Bs, needs_b)


@define_launches(
    "lora_mlp_bwd",
    "(Tensor? x, Tensor grad, Tensor g, Tensor u, Tensor?[] datas, Tensor[] scales, int[] layouts, Tensor?[] lora_As, "
    "Tensor?[] lora_Bs, Tensor? s, Tensor? s_down, Tensor?[] seeds, float[] scalings, float dropout_p, str activation, "
    "bool need_x, bool[] needs_a, bool[] needs_b) -> (Tensor, Tensor[], Tensor[])",
    _bwd_fake,
)
def lora_mlp_bwd(
    x: Tensor | None, grad: Tensor, g: Tensor, u: Tensor, datas: Sequence[Tensor | None], scales: Sequence[Tensor],
    layouts: Sequence[int], lora_As: Sequence[Tensor | None], lora_Bs: Sequence[Tensor | None], s: Tensor | None,
    s_down: Tensor | None, seeds: Sequence[Tensor | None], scalings: Sequence[float], dropout_p: float, activation: str,
    need_x: bool, needs_a: Sequence[bool], needs_b: Sequence[bool],
) -> tuple[tuple[Tensor, list[Tensor], list[Tensor]], list[Any]]:  # fmt: skip
    """dX [..., K], the dA's and the dB's, for dY [..., N] and what the forward saved; those that are not needed are empty.

    Data of weights that no wanted gradient reads are None.
    """
    from stablelora_kernels.launch.lora_mlp import backward_launches

    results = dx, das, dbs = _bwd_fake(
        x, grad, g, u, datas, scales, layouts, lora_As, lora_Bs, s, s_down, seeds, scalings, dropout_p, activation, need_x,
        needs_a, needs_b,
    )  # fmt: skip
    branches = _branches(grad, datas, layouts, lora_As, lora_Bs)
    rows = None if x is None else as_matrix(x)
    given: Any = (
        rows,
        *(as_matrix(t) for t in (grad, g, u)),
        together(datas, scales, layouts),
        *branches,
        s,
        s_down,
        seeds,
    )
    wanted = (
        as_matrix(dx) if need_x else None,
        [da if da.numel() else None for da in das],
        [db if db.numel() else None for db in dbs],
    )
    device = problem.device_of(grad.device)
    return results, backward_launches(device, *given, scalings, dropout_p, activation, *wanted)  # type: ignore[call-arg]


def _forward(x: Tensor, p: Projections, settings: Settings, entry: Entry | None, save: bool) -> tuple[Tensor, Kept]:
    """Y [..., N] for x [..., K]. On Triton, what backward would need is empty without ``save``."""
    activation, dropout_p, backend, shared_mask = settings
    if backend == "torch":
        y, kept = torch_mlp_fwd(as_matrix(x), p, settings)
        return like_rows_of(y, x), kept
    drops = [dropout_p if _rank(a) else 0.0 for a in p.lora_As]
    # In the order in which separate projections draw theirs.
    seeds = [draw_seed(x, drops[0])]
    seeds += [seeds[0] if shared_mask else draw_seed(x, drops[1]), draw_seed(x, drops[2])]
    scalings = [scaling / (1 - drop) for scaling, drop in zip(p.scalings, drops, strict=True)]
    rest = (p.biases, p.lora_As, p.lora_Bs, seeds, scalings, dropout_p, activation, save)
    y, g, u, s, s_down = lora_mlp_fwd((x, *apart(p.weights), *rest), entry)
    return y, Kept(g, u, [s], s_down, seeds, scalings)


class _LoRAMLP(torch.autograd.Function):
    """``tensors``: data of the weights, biases, A's and B's, then all scales. Weights and biases get no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, scalings: Sequence[float], settings: Settings, layouts: Sequence[int], entry: Entry | None,
        *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        needs_a, needs_b = needs[6:9], needs[9:12]
        datas, biases, lora_As, lora_Bs = (tensors[i : i + 3] for i in (0, 3, 6, 9))
        scales = tensors[12:]
        ctx.lora_dtype = next((a.dtype for a in lora_As if a is not None), x.dtype)
        if settings.backend == "torch":
            # Cast once for forward and backward.
            as_, bs = _branches(x, datas, layouts, lora_As, lora_Bs)  # type: ignore[arg-type]
            lora_As, lora_Bs = tuple(a.to(x.dtype) for a in as_), tuple(b.to(x.dtype) for b in bs)
        projections = Projections(together(datas, scales, layouts), biases, lora_As, lora_Bs, scalings)  # type: ignore[arg-type]
        y, kept = _forward(x, projections, settings, entry, save=True)
        # dH needs down's weight, dX the others'.
        need_h = need_x or any(needs_a[:2]) or any(needs_b[:2])
        reads = (need_x, need_x, need_h)
        ctx.save_for_backward(
            x if any(needs_a[:2]) else None,
            kept.g,
            kept.u,
            *(data if read else None for data, read in zip(datas, reads, strict=True)),
            *lora_As,
            *lora_Bs,
            *kept.random,
            kept.s_down if needs_b[2] else None,
            *(kept.s if any(needs_b[:2]) else ()),
            *scales,
        )
        ctx.call = (kept.scalings, settings, layouts, need_x, needs_a, needs_b, len(scales))
        return y

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scalings, settings, layouts, need_x, needs_a, needs_b, scale_count = ctx.call
        x, g, u, *saved = ctx.saved_tensors
        left = iter(saved)
        datas, lora_As, lora_Bs, random = ([*islice(left, 3)] for _ in range(4))
        s_down, *saved = left
        s, scales = saved[: len(saved) - scale_count], saved[len(saved) - scale_count :]
        if settings.backend == "triton":
            given: Any = (datas, scales, layouts, lora_As, lora_Bs, s[0] if s else None, s_down, random, scalings)
            rest = (settings.dropout_p, settings.activation, need_x, needs_a, needs_b)
            dx, das, dbs = lora_mlp_bwd((x, grad, g, u, *given, *rest))
        else:
            projections = Projections(together(datas, scales, layouts), [None] * 3, lora_As, lora_Bs, scalings)
            kept = Kept(g, u, s, s_down, random, scalings)
            rows = None if x is None else as_matrix(x)
            given = (rows, expanded(as_matrix(grad)), projections, kept, settings, ctx.lora_dtype)
            dx, das, dbs = torch_mlp_bwd(*given, need_x, needs_a, needs_b)  # type: ignore[call-arg]
            dx = None if dx is None else dx.view(*grad.shape[:-1], dx.shape[1])
        grads_a = [da if need else None for da, need in zip(das, needs_a, strict=True)]
        grads_b = [db if need else None for db, need in zip(dbs, needs_b, strict=True)]
        return dx if need_x else None, *[None] * 10, *grads_a, *grads_b, *[None] * scale_count


def lora_mlp_op(x: Tensor, p: Projections, settings: Settings, entry: Entry | None = None) -> Tensor:
    """``functional.lora_mlp`` with checked arguments and a chosen backend. ``entry``: that of the call's key."""
    way = None if entry is None else entry.way
    if way is None:
        way = _way(x, p, settings)
        if entry is not None:
            entry.way = way
    if way == "one by one":
        return _one_by_one(x, p, settings)
    if way == "without gradients":
        if settings.backend == "torch":
            datas, _, layouts = apart(p.weights)
            as_, bs = _branches(x, datas, layouts, p.lora_As, p.lora_Bs)
            p = p._replace(lora_As=[a.to(x.dtype) for a in as_], lora_Bs=[b.to(x.dtype) for b in bs])
        return _forward(x, p, settings, entry, save=False)[0]
    datas, scales, layouts = apart(p.weights)
    tensors: Any = (*datas, *p.biases, *p.lora_As, *p.lora_Bs, *scales)
    if torch.compiler.is_compiling():
        tensors = _distinct(tensors)
    return apply(_LoRAMLP, x, tuple(p.scalings), settings, layouts, entry, *tensors)


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A view in place of a tensor that comes a second time, such as a shared A: torch.compile refuses it otherwise."""
    distinct: list[Tensor | None] = []
    for t in tensors:
        distinct.append(t.view(t.shape) if t is not None and any(t is other for other in distinct) else t)
    return distinct


def _way(x: Tensor, p: Projections, settings: Settings) -> str:
    """How to compute an MLP: "one by one", "with gradients" or "without gradients"."""
    plain = [w for w in p.weights if isinstance(w, Tensor)]
    trained = any(t is not None and t.requires_grad for t in (*plain, *p.biases))
    uniform = all(len({t.requires_grad for t in ts[:2] if t is not None}) < 2 for ts in (p.lora_As, p.lora_Bs))
    few = settings.backend == "torch" and len(plain) == 3 and is_few(x, *plain)
    quantized_few = settings.backend == "triton" and len(plain) < 3 and row_count(x) <= problem.IN_LOOP_M
    # Separate layers draw a shared mask by other means than the kernels, so that a checkpoint's forward must take them too.
    as_trained = torch.is_grad_enabled() or (settings.shared_mask and settings.dropout_p > 0)
    if not uniform or few or (trained and as_trained) or (quantized_few and not settings.shared_mask):
        return "one by one"
    tensors = (x, *p.lora_As, *p.lora_Bs)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return "with gradients" if needs_grad else "without gradients"


def _one_by_one(x: Tensor, p: Projections, settings: Settings) -> Tensor:
    """Each projection by an op of its own, and the activation by PyTorch's operators."""
    gate, up, down = zip(*p, strict=True)
    if settings.shared_mask and settings.dropout_p:
        g, u = _with_shared_mask(x, gate, up, settings.dropout_p)
    else:
        g, u = _projection(x, gate, settings), _projection(x, up, settings)
    return _projection(act(g, settings.activation) * u, down, settings)


def _projection(x: Tensor, given: tuple[Any, ...], settings: Settings) -> Tensor:
    weight, bias, lora_A, lora_B, scaling = given
    if lora_A is not None:
        return lora_linear_op(x, weight, bias, lora_A, lora_B, scaling, settings.dropout_p, settings.backend)
    if isinstance(weight, Stored):
        # The op saves what is stored, where PyTorch's autograd would save all of W. Its branch is of zeros.
        n, k = weight.layout.n, weight.layout.k
        return lora_linear_op(x, weight, bias, x.new_zeros(1, k), x.new_zeros(n, 1), 0.0, 0.0, settings.backend)
    return torch.nn.functional.linear(x, weight, bias)


def _with_shared_mask(x: Tensor, gate: tuple[Any, ...], up: tuple[Any, ...], dropout_p: float) -> list[Tensor]:
    """G and U, whose branches read one masked X; by PyTorch's operators."""
    rows = as_matrix(x)
    keep, scale = draw_dropout(rows, dropout_p, 1.0)
    s = torch.nn.functional.linear(masked(rows, keep), gate[2].to(x.dtype))
    outputs = []
    for weight, bias, _, lora_B, scaling in (gate, up):
        base = torch.nn.functional.linear(rows, as_plain(weight, x.dtype), bias)
        y = with_branch(base, s, lora_B.to(x.dtype), scaling * scale)
        outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
    return outputs
