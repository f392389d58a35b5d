"""A gated MLP with LoRA in one autograd node: gate, up, activation and down. ``reference/mlp.py`` has the formulas.

    forward   G = gate(X)   U = up(X)   H = act(G) ∘ U   Y = down(H)
    backward  dH = dX of down, for dY   dG = dH ∘ U ∘ act'(G)   dU = dH ∘ act(G)   then gate's and up's gradients for them

Autograd saves X, G, U and each S. Backward computes H, act(G) and dropout's masks again where it needs them: the PyTorch path
from the state of torch's generator, where it can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch import problem
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.ops.lora_linear import apply, draw_seed, first_derivative, lora_linear_op
from stablelora_kernels.ops.plans import Entry, define_launches
from stablelora_kernels.ops.torch_mlp import Kept, Options, act, torch_mlp_bwd, torch_mlp_fwd
from stablelora_kernels.ops.torch_path import (
    as_matrix,
    draw_dropout,
    expanded,
    is_few,
    like_rows_of,
    masked,
    row_count,
    with_branch,
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


def _with_branches(
    projections: Sequence[Projection], like: Tensor, dtype: torch.dtype | None = None
) -> list[Projection]:
    """``projections`` with an A and a B of rank 0 where there is no branch, and all of them in ``dtype`` if it is given."""
    of_others = next((p.lora_A.dtype for p in projections if p.lora_A is not None), like.dtype)
    found = []
    for weight, bias, lora_A, lora_B, scaling in projections:
        # These sizes are never read where the weight is not read.
        n, k = (0, 0) if weight is None else weight.shape
        if lora_A is None or lora_B is None:
            lora_A, lora_B = (torch.empty(size, dtype=of_others, device=like.device) for size in ((0, k), (n, 0)))
        if dtype is not None:
            lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
        found.append(Projection(weight, bias, lora_A, lora_B, scaling))
    return found


def _allocate_forward(call: Any) -> tuple[Tensor, ...]:
    projections = projections_in(call)
    (f, _), _, (n, _) = (p.weight.shape for p in projections)  # type: ignore[union-attr]
    x, ranks = call.x, [p.rank for p in projections]
    kept, m = (x.shape[:-1], row_count(x)) if call.save else ((0,), 0)
    sizes = ((*x.shape[:-1], n), (*kept, f), (*kept, f), (m, ranks[0] + ranks[1]), (m, ranks[2]))
    return tuple(x.new_empty(size) for size in sizes)


@define_launches(
    "lora_mlp_fwd",
    "(Tensor x, Tensor?[] datas, Tensor[] scales, Tensor?[] biases, Tensor?[] lora_As, Tensor?[] lora_Bs, Tensor?[] seeds, "
    "int[] layouts, float[] scalings, float dropout_p, str activation, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _allocate_forward,
)
def lora_mlp_fwd(device: Device, call: Any, results: tuple[Tensor, ...], choice: Choice | None) -> list[Any]:
    """Y [..., N], and with ``save`` G and U [..., F], gate's and up's S side by side and down's S, for x [..., K].

    ``projection.flatten`` makes the lists; the scalings are s' = scaling / (1 - p).
    """
    from stablelora_kernels.launch.lora_mlp import mlp_forward_launches

    x, (y, *kept) = as_matrix(call.x), (as_matrix(result) for result in results)
    projections = _with_branches(projections_in(call), x)
    outputs = (y, *(kept if call.save else [None] * 4))
    return mlp_forward_launches(device, x, projections, call.seeds, call.dropout_p, call.activation, outputs)


def _allocate_backward(call: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad, weight = call.grad, projections_in(call)[0].weight

    def like(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
        return [
            torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else grad.new_empty(0)
            for t, need in zip(tensors, needs, strict=True)
        ]

    dx = grad.new_empty((*grad.shape[:-1], weight.shape[1]) if call.need_x and weight is not None else 0)
    return dx, like(call.lora_As, call.needs_a), like(call.lora_Bs, call.needs_b)


@define_launches(
    "lora_mlp_bwd",
    "(Tensor grad, Tensor? x, Tensor g, Tensor u, Tensor? s, Tensor? s_down, Tensor?[] datas, Tensor[] scales, "
    "Tensor?[] lora_As, Tensor?[] lora_Bs, Tensor?[] seeds, int[] layouts, float[] scalings, float dropout_p, str activation, "
    "bool need_x, bool[] needs_a, bool[] needs_b) -> (Tensor, Tensor[], Tensor[])",
    _allocate_backward,
)
def lora_mlp_bwd(
    device: Device, call: Any, results: tuple[Tensor, list[Tensor], list[Tensor]], choice: Choice | None
) -> list[Any]:
    """dX [..., K], the dA's and the dB's, for dY [..., N] and what the forward saved; those that are not needed are empty.

    Data of weights that no wanted gradient reads are None.
    """
    from stablelora_kernels.launch.lora_mlp import mlp_backward_launches

    dx, *each = results
    das, dbs = ([t if t.numel() else None for t in tensors] for tensors in each)  # type: ignore[attr-defined]
    grad, g, u = (as_matrix(t) for t in (call.grad, call.g, call.u))
    x, kept = None if call.x is None else as_matrix(call.x), (g, u, call.s, call.s_down)
    rest = (call.seeds, call.dropout_p, call.activation, (as_matrix(dx) if call.need_x else None, das, dbs))
    return mlp_backward_launches(device, x, grad, kept, _with_branches(projections_in(call), grad), *rest)


class MLPFacts(NamedTuple):
    """What follows from the key of a call."""

    # "one by one", "with gradients" or "without gradients".
    strategy: str
    options: Options
    # Dropout's probability, of a projection with a branch.
    drops: tuple[float, ...]
    # s' on Triton. On the PyTorch path s: the mask has a probability of its own.
    scalings: tuple[float, ...]
    layouts: tuple[int, ...]
    # Of datas, scales, biases, A's, B's and seeds.
    lengths: tuple[int, ...]
    # Whether gradients of x, of each A and of each B are required.
    needs: tuple[bool, tuple[bool, ...], tuple[bool, ...]]
    # "one by one": the projections' own entries.
    members: tuple[Entry, ...]


def _forward(
    facts: MLPFacts, entry: Entry | None, x: Tensor, tensors: Sequence[Any], save: bool
) -> tuple[Tensor, Kept]:
    """Y [..., N] for x [..., K] and the flattened projections. On Triton, backward's operands are empty without ``save``.

    On the PyTorch path every projection has a branch, of rank 0 if need be, and all tensors have x's dtype.
    """
    _, options, drops, scalings, layouts, lengths, *_ = facts
    if options.backend == "torch":
        projections = unflatten(tensors, lengths[:-1], layouts, scalings)
        y, kept = torch_mlp_fwd(as_matrix(x), projections, options)
        return like_rows_of(y, x), kept
    # In the order in which separate projections draw theirs.
    seeds = [draw_seed(x, drops[0])]
    seeds += [seeds[0] if options.shared_mask else draw_seed(x, drops[1]), draw_seed(x, drops[2])]
    numbers = (layouts, scalings, options.dropout_p, options.activation, save)
    y, g, u, s, s_down = lora_mlp_fwd((x, *tensors, *seeds), lengths, numbers, entry)
    return y, Kept(g, u, [s], s_down, seeds, scalings)


class _LoRAMLP(torch.autograd.Function):
    """``tensors`` are flattened projections. Weights and biases get no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, entry: Entry | None, facts: MLPFacts, x: Tensor, *tensors: Any
    ) -> Tensor:
        need_x, needs_a, needs_b = facts.needs
        lora_dtype = next((t.dtype for t in tensors[-6:] if t is not None), x.dtype)
        if facts.options.backend == "torch":
            # Cast once for forward and backward.
            given = unflatten(tensors, facts.lengths[:-1], facts.layouts, facts.scalings)
            tensors = tuple(flatten(_with_branches(given, x, x.dtype)))
        y, kept = _forward(facts, entry, x, tensors, save=True)
        # dH needs down's weight, dX the others'.
        need_h = need_x or any(needs_a[:2]) or any(needs_b[:2])
        s, *others = kept.s if any(needs_b[:2]) else [None]
        ctx.save_for_backward(
            x if any(needs_a[:2]) else None,
            kept.g,
            kept.u,
            s,
            kept.s_down if needs_b[2] else None,
            *(tensors[:2] if need_x else (None, None)),
            tensors[2] if need_h else None,
            *tensors[3:-9],
            *tensors[-6:],
            *kept.random,
            *others,
        )
        ctx.call = (facts, kept.scalings, lora_dtype)
        return y

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        facts, scalings, lora_dtype = ctx.call
        _, options, _, _, layouts, (_, scales, *_), needs, _ = facts
        need_x, needs_a, needs_b = needs
        lengths = (3, scales, 3, 3, 3)
        dx: Tensor | None
        if options.backend == "triton":
            numbers = (layouts, scalings, options.dropout_p, options.activation, *needs)
            dx, *found = lora_mlp_bwd((grad, *ctx.saved_tensors), lengths, numbers)
        else:
            x, g, u, s, s_down, *saved = ctx.saved_tensors
            datas, of_scales, lora_As, lora_Bs, random, others = split(saved, (*lengths, len(saved)))
            projections = projections_of(datas, of_scales, (), lora_As, lora_Bs, layouts, scalings)
            rows, kept = None if x is None else as_matrix(x), Kept(g, u, [s, *others], s_down, random, scalings)
            given = (rows, expanded(as_matrix(grad)), projections, kept, options, lora_dtype)
            dx, das, dbs = torch_mlp_bwd(*given, *needs)
            dx, found = None if dx is None else dx.view(*grad.shape[:-1], dx.shape[1]), [*das, *dbs]
        of_branches = [t if need else None for t, need in zip(found, (*needs_a, *needs_b), strict=True)]
        return None, None, dx if need_x else None, *[None] * (6 + scales), *of_branches


def lora_mlp_op(x: Tensor, projections: Sequence[Projection], options: Options, entry: Entry | None = None) -> Tensor:
    """``functional.lora_mlp`` with checked arguments and a chosen backend. ``entry``: that of the call's key."""
    facts = None if entry is None else entry.facts
    if facts is None:
        facts = _facts_of(x, projections, options)
        if entry is not None:
            entry.facts = facts
    if facts.strategy == "one by one":
        # An entry also says that the call is not traced.
        return _one_by_one(x, projections, options, facts.members if entry is not None else [None] * 3)
    if facts.strategy == "without gradients":
        if options.backend == "torch":
            projections = _with_branches(projections, x, x.dtype)
        return _forward(facts, entry, x, flatten(projections), save=False)[0]
    tensors = flatten(projections)
    if torch.compiler.is_compiling():
        tensors = _distinct(tensors)
    return apply(_LoRAMLP, entry, facts, x, *tensors)


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A view in place of a tensor that comes a second time, such as a shared A: torch.compile refuses it otherwise."""
    distinct: list[Tensor | None] = []
    for t in tensors:
        distinct.append(t.view(t.shape) if t is not None and any(t is other for other in distinct) else t)
    return distinct


def _facts_of(x: Tensor, projections: Sequence[Projection], options: Options) -> MLPFacts:
    weights, biases, lora_As, lora_Bs, scalings = zip(*projections, strict=True)
    plain = [w for w in weights if not isinstance(w, Stored)]
    trained = any(t is not None and t.requires_grad for t in (*plain, *biases))
    uniform = all(len({t.requires_grad for t in ts[:2] if t is not None}) < 2 for ts in (lora_As, lora_Bs))
    few = options.backend == "torch" and len(plain) == 3 and is_few(x, *plain)
    quantized_few = options.backend == "triton" and len(plain) < 3 and row_count(x) <= problem.IN_LOOP_M
    # Separate layers draw a shared mask by other means than the kernels, so that a checkpoint's forward must take them too.
    as_trained = torch.is_grad_enabled() or (options.shared_mask and options.dropout_p > 0)
    needs_x, needs_a, needs_b = (
        tuple([torch.is_grad_enabled() and t is not None and t.requires_grad for t in each])
        for each in ((x,), lora_As, lora_Bs)
    )
    strategy = "with gradients" if any((*needs_x, *needs_a, *needs_b)) else "without gradients"
    if not uniform or few or (trained and as_trained) or (quantized_few and not options.shared_mask):
        strategy = "one by one"
    drops = tuple([options.dropout_p if lora_A is not None else 0.0 for lora_A in lora_As])
    if options.backend == "triton":
        scalings = tuple([scaling / (1 - drop) for scaling, drop in zip(scalings, drops, strict=True)])
    layouts = layouts_of(projections)
    lengths, needs = (3, scale_count(layouts), 3, 3, 3, 3), (needs_x[0], needs_a, needs_b)
    members = tuple([Entry(options.backend) for _ in projections]) if strategy == "one by one" else ()
    return MLPFacts(strategy, options, drops, scalings, layouts, lengths, needs, members)


def _one_by_one(
    x: Tensor, projections: Sequence[Projection], options: Options, entries: Sequence[Entry | None]
) -> Tensor:
    """Each projection by an op of its own, and the activation by PyTorch's operators."""
    gate, up, down = projections
    if options.shared_mask and options.dropout_p:
        g, u = _with_shared_mask(x, gate, up, options.dropout_p)
    else:
        g, u = _alone(x, gate, options, entries[0]), _alone(x, up, options, entries[1])
    return _alone(act(g, options.activation) * u, down, options, entries[2])


def _alone(x: Tensor, p: Projection, options: Options, entry: Entry | None) -> Tensor:
    dropout_p, weight = options.dropout_p, p.weight
    if p.lora_A is None:
        if isinstance(weight, Tensor):
            return torch.nn.functional.linear(x, weight, p.bias)
        assert weight is not None
        # The op saves what is stored, where PyTorch's autograd would save all of W. Its branch is of zeros.
        n, k = weight.shape
        p, dropout_p = Projection(weight, p.bias, x.new_zeros(1, k), x.new_zeros(n, 1), 0.0), 0.0
    return lora_linear_op(x, (p,), None, dropout_p, options.backend, entry)[0]


def _with_shared_mask(x: Tensor, gate: Projection, up: Projection, dropout_p: float) -> list[Tensor]:
    """G and U, whose branches read one masked X; by PyTorch's operators."""
    rows = as_matrix(x)
    keep, scale = draw_dropout(rows, dropout_p, 1.0)
    assert gate.lora_A is not None
    s = torch.nn.functional.linear(masked(rows, keep), gate.lora_A.to(x.dtype))
    outputs = []
    for weight, bias, _, lora_B, scaling in (gate, up):
        assert weight is not None and lora_B is not None
        base = torch.nn.functional.linear(rows, as_plain(weight, x.dtype), bias)
        y = with_branch(base, s, lora_B.to(x.dtype), scaling * scale)
        outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
    return outputs
