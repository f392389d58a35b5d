"""A gated MLP with LoRA in one autograd node: gate, up, activation and down. ``reference/lora.py`` has the formulas.

    forward   G = gate(X)   U = up(X)   H = act(G) ∘ U   Y = down(H)
    backward  dH = dX of down, for dY   dG = dH ∘ U ∘ act'(G)   dU = dH ∘ act(G)   then gate's and up's gradients for them

Autograd saves X, G, U and each S. Backward computes H and act(G) again where it needs them. The kernels keep dropout's masks; the
PyTorch path draws them again from the state of torch's generator, where it can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from stablelora_kernels.dispatch import problem
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.ops.lora_linear import apply, draw_seed, first_derivative, lora_linear_op, new_mask, scalings_of
from stablelora_kernels.ops.plans import Entry, define_launches
from stablelora_kernels.ops.torch_path import (
    as_matrix,
    can_redraw,
    draw_dropout,
    draw_keep,
    draw_keep_again,
    draw_keep_and_state,
    expanded,
    is_few,
    like_rows_of,
    masked,
    row_count,
    torch_bwd,
    torch_fwd,
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

_silu_backward, _gelu_backward = torch.ops.aten.silu_backward, torch.ops.aten.gelu_backward
# act(G), and dG for dH ∘ U.
_ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "silu": (silu, _silu_backward),
    "gelu": (gelu, _gelu_backward),
    "gelu_tanh": (partial(gelu, approximate="tanh"), partial(_gelu_backward, approximate="tanh")),
}


class Options(NamedTuple):
    """The arguments of an MLP's call that are no tensors."""

    activation: str
    dropout_p: float
    backend: str
    # Whether gate and up share A, and so its mask.
    shared_mask: bool


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


def _allocate_forward(call: Any) -> tuple[Any, ...]:
    projections = projections_in(call)
    (f, k), _, (n, _) = (p.weight.shape for p in projections)  # type: ignore[union-attr]
    x, ranks = call.x, [p.rank for p in projections]
    kept, m = (x.shape[:-1], row_count(x)) if call.save else ((0,), 0)
    sizes = ((*x.shape[:-1], n), (*kept, f), (*kept, f), (m, ranks[0] + ranks[1]), (m, ranks[2]))
    masks = [new_mask(x, width) for width, stored in zip((k, k, f), call.masks, strict=True) if stored]
    return *[x.new_empty(size) for size in sizes], masks


@define_launches(
    "lora_mlp_fwd",
    "(Tensor x, Tensor?[] datas, Tensor[] scales, Tensor?[] biases, Tensor?[] lora_As, Tensor?[] lora_Bs, Tensor?[] seeds, "
    "int[] layouts, float[] scalings, float dropout_p, str activation, bool save, bool[] masks) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _allocate_forward,
)
def lora_mlp_fwd(device: Device, call: Any, results: tuple[Any, ...], choice: Choice | None) -> list[Any]:
    """Y [..., N], and with ``save`` G and U [..., F], gate's and up's S side by side and down's S, for x [..., K].

    ``projection.flatten`` makes the lists; the scalings are ``scalings_of``. ``masks``: whether gate's, up's and down's mask is
    stored.
    """
    from stablelora_kernels.launch.lora_mlp import mlp_forward_launches

    x, (y, *kept), stored = as_matrix(call.x), [as_matrix(result) for result in results[:5]], iter(results[5])
    projections = _with_branches(projections_in(call), x)
    outputs = (y, *(kept if call.save else [None] * 4))
    random = [(seed, next(stored) if wanted else None) for seed, wanted in zip(call.seeds, call.masks, strict=True)]
    return mlp_forward_launches(device, x, projections, random, call.dropout_p, call.activation, outputs)


def _allocate_backward(call: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad, weight = call.grad, projections_in(call)[0].weight
    dx = grad.new_empty((*grad.shape[:-1], weight.shape[1]) if call.need_x and weight is not None else 0)
    pairs = zip((*call.lora_As, *call.lora_Bs), (*call.needs_a, *call.needs_b), strict=True)
    of_branches = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else grad.new_empty(0)
        for t, need in pairs
    ]
    return dx, of_branches[:3], of_branches[3:]


@define_launches(
    "lora_mlp_bwd",
    "(Tensor grad, Tensor? x, Tensor g, Tensor u, Tensor? s, Tensor? s_down, Tensor?[] datas, Tensor[] scales, "
    "Tensor?[] lora_As, Tensor?[] lora_Bs, Tensor?[] masks, int[] layouts, float[] scalings, float dropout_p, str activation, "
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
    rest = (call.masks, call.dropout_p, call.activation, (as_matrix(dx) if call.need_x else None, das, dbs))
    return mlp_backward_launches(device, x, grad, kept, _with_branches(projections_in(call), grad), *rest)


class MLPFacts(NamedTuple):
    """What follows from the key of a call."""

    # "one by one", "with gradients" or "without gradients".
    strategy: str
    options: Options
    # s' on Triton. On the PyTorch path s: the mask has a probability of its own.
    scalings: tuple[float, ...]
    layouts: tuple[int, ...]
    # Of datas, scales, biases, A's, B's and seeds.
    lengths: tuple[int, ...]
    # Whether gradients of x, of each A and of each B are required.
    needs: tuple[bool, tuple[bool, ...], tuple[bool, ...]]
    # Whether backward reads x, G, U, gate's and up's S, down's S, and each weight.
    reads: tuple[bool, ...]
    # Of A and B.
    lora_dtype: torch.dtype
    # "one by one": the projections' own entries.
    members: tuple[Entry, ...]


# Y; G, U, gate's and up's S side by side, down's S, and of each projection its mask or what draws it again; the flattened
# projections as backward reads them, and each s'.
Forward = tuple[Tensor, Sequence[Any], Sequence[Any], Sequence[float]]


def _forward(facts: MLPFacts, entry: Entry | None, x: Tensor, tensors: Sequence[Any], save: bool) -> Forward:
    """For x [..., K] and the flattened projections. On Triton, Y alone is not empty without ``save``."""
    _, (activation, dropout_p, backend, shared_mask), scalings, layouts, lengths, (_, needs_a, _), reads, *_ = facts
    if backend == "torch":
        return _torch_fwd(facts, x, tensors)
    drops = [0.0 if lora_A is None else dropout_p for lora_A in tensors[-6:-3]]
    # In the order in which separate projections draw theirs.
    gate = draw_seed(x, drops[0])
    seeds = (gate, gate if shared_mask else draw_seed(x, drops[1]), draw_seed(x, drops[2]))
    need_a, *_, need_x, _, need_h = reads
    need = need_x or need_a
    wanted = (need, need and not shared_mask, need_h or needs_a[2])
    stored = tuple([save and drop > 0 and wants for drop, wants in zip(drops, wanted, strict=True)])
    numbers = (layouts, scalings, dropout_p, activation, save, stored)
    y, g, u, s, s_down, *masks = lora_mlp_fwd((x, *tensors, *seeds), lengths, numbers, entry)
    left = iter(masks)
    mask, of_up, of_down = [next(left) if is_stored else None for is_stored in stored]
    return y, (g, u, s, s_down, mask, mask if shared_mask else of_up, of_down), tensors, scalings


def _draw(x: Tensor, p: Projection, dropout_p: float) -> tuple[Tensor | None, Tensor | None, float]:
    """The keep-mask of x's shape, what gives it to backward again, and s' / scaling; no mask without a branch."""
    if dropout_p == 0.0 or p.rank == 0:
        return None, None, 1.0
    if can_redraw(x):
        keep, state, dropout_p = draw_keep_and_state(x.shape, dropout_p)
        return keep, state, 1 / (1 - dropout_p)
    keep, dropout_p = draw_keep(x, dropout_p)
    return keep, keep, 1 / (1 - dropout_p)


def _drawn_again(random: Tensor | None, shape: Sequence[int], dropout_p: float) -> Tensor | None:
    """The mask that :func:`_draw` has drawn."""
    return random if random is None or random.dtype == torch.bool else draw_keep_again(random, shape, dropout_p)


def _torch_fwd(facts: MLPFacts, x: Tensor, tensors: Sequence[Any]) -> Forward:
    _, (activation, dropout_p, _, shared_mask), scalings, layouts, lengths, *_ = facts
    # Cast once for forward and backward.
    cast = _with_branches(unflatten(tensors, lengths[:-1], layouts, scalings), x, x.dtype)
    rows, (gate, up, down) = as_matrix(x), cast
    drawn = [_draw(rows, gate, dropout_p)]
    drawn.append(drawn[0] if shared_mask else _draw(rows, up, dropout_p))
    scaled = [p._replace(scaling=p.scaling * scale) for p, (*_, scale) in zip((gate, up), drawn, strict=True)]
    (g, u), each_s = torch_fwd(rows, scaled, [keep for keep, *_ in drawn])
    h = _ACTIVATIONS[activation][0](g).mul_(u)
    drawn.append(_draw(h, down, dropout_p))
    keep, _, scale = drawn[2]
    scaled.append(down._replace(scaling=down.scaling * scale))
    (y,), (s_down,) = torch_fwd(h, scaled[2:], [keep])
    kept = (g, u, torch.cat(each_s, 1), s_down, *(random for _, random, _ in drawn))
    return like_rows_of(y, x), kept, flatten(cast), [p.scaling for p in scaled]


def _torch_bwd(
    grad: Tensor, saved: Sequence[Any], random: Sequence[Any], projections: Sequence[Projection], facts: MLPFacts
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dX, the dA's and the dB's for dY [..., N], None if not needed. ``saved``: x, G, U, S and down's S; the scalings are s'."""
    x, g, u, s, s_down = saved
    activation, dropout_p, _, shared_mask = facts.options
    need_a, _, _, need_b, need_b_down, need_x, _, need_h = facts.reads
    need_a_down = facts.needs[1][2]
    act, act_backward = _ACTIVATIONS[activation]
    dy, rows = expanded(as_matrix(grad)), None if x is None else as_matrix(x)
    h = act(g).mul_(u) if need_a_down else None
    keep = _drawn_again(random[2], g.shape, dropout_p) if need_h or need_a_down else None
    needs = (need_h, need_a_down, need_b_down)
    dh, da, db = torch_bwd(h, [dy], projections[2:], [s_down], [keep], facts.lora_dtype, *needs)
    # Before there is dU.
    del h, keep
    nothing: list[Any] = [None, None]
    dx, das, dbs = None, nothing, nothing
    if dh is not None:
        du = act(g).mul_(dh)
        # dG takes the memory of dH. allow_mutation_on_saved_tensors(), for one, knows outputs by the name "out" alone.
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        dg = act_backward(dh.mul_(u), g, **({} if traced else {"grad_input": dh}))
        del dh
        keeps = [*nothing]
        if need_x or need_a:
            assert projections[0].lora_A is not None
            shape = (dy.shape[0], projections[0].lora_A.shape[1])
            keeps[0] = _drawn_again(random[0], shape, dropout_p)
            keeps[1] = keeps[0] if shared_mask else _drawn_again(random[1], shape, dropout_p)
        each_s = nothing if s is None else s.split([p.rank for p in projections[:2]], 1)
        needs = (need_x, need_a, need_b)
        dx, das, dbs = torch_bwd(rows, [dg, du], projections[:2], each_s, keeps, facts.lora_dtype, *needs)
    dx = None if dx is None else dx.view(*grad.shape[:-1], dx.shape[1])
    return dx, [*(das or nothing), *(da or nothing[:1]), *(dbs or nothing), *(db or nothing[:1])]


class _LoRAMLP(torch.autograd.Function):
    """``tensors`` are flattened projections. Weights and biases get no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, entry: Entry | None, facts: MLPFacts, x: Tensor, *tensors: Any
    ) -> Tensor:
        y, kept, used, scalings = _forward(facts, entry, x, tensors, save=True)
        pairs = zip((x, *kept[:4], *used[:3]), facts.reads, strict=True)
        read = [t if is_read else None for t, is_read in pairs]
        ctx.save_for_backward(*read, *used[3:-9], *used[-6:], *kept[4:])
        ctx.call = (facts, scalings)
        return y

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        facts, scalings = ctx.call
        _, options, _, layouts, (_, scales, *_), needs, *_ = facts
        lengths = (3, scales, 3, 3, 3)
        dx: Tensor | None
        found: Sequence[Tensor | None]
        if options.backend == "triton":
            numbers = (layouts, scalings, options.dropout_p, options.activation, *needs)
            dx, *found = lora_mlp_bwd((grad, *ctx.saved_tensors), lengths, numbers)
        else:
            saved, datas, of_scales, lora_As, lora_Bs, random = split(ctx.saved_tensors, (5, *lengths))
            projections = projections_of(datas, of_scales, (), lora_As, lora_Bs, layouts, scalings)
            dx, found = _torch_bwd(grad, saved, random, projections, facts)
        need_x, needs_a, needs_b = needs
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
    tensors = flatten(projections)
    if facts.strategy == "without gradients":
        return _forward(facts, entry, x, tensors, save=False)[0]
    return apply(_LoRAMLP, entry, facts, x, *(_distinct(tensors) if torch.compiler.is_compiling() else tensors))


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A view in place of a tensor that comes a second time, such as a shared A: torch.compile refuses it otherwise."""
    distinct: list[Tensor | None] = []
    for t in tensors:
        distinct.append(t.view(t.shape) if t is not None and any(t is other for other in distinct) else t)
    return distinct


def _facts_of(x: Tensor, projections: Sequence[Projection], options: Options) -> MLPFacts:
    _, dropout_p, backend, shared_mask = options
    weights, biases, lora_As, lora_Bs, scalings = zip(*projections, strict=True)
    plain = [w for w in weights if not isinstance(w, Stored)]
    trained = any(t is not None and t.requires_grad for t in (*plain, *biases))
    uniform = all(len({t.requires_grad for t in ts[:2] if t is not None}) < 2 for ts in (lora_As, lora_Bs))
    few = backend == "torch" and len(plain) == 3 and is_few(x, *plain)
    quantized_few = backend == "triton" and len(plain) < 3 and row_count(x) <= problem.IN_LOOP_M
    with_grad = torch.is_grad_enabled()
    # Separate layers draw a shared mask by other means than the kernels, so that a checkpoint's forward must take them too.
    as_trained = with_grad or (shared_mask and dropout_p > 0)
    needs_x, needs_a, needs_b = (
        tuple([with_grad and t is not None and t.requires_grad for t in each]) for each in ((x,), lora_As, lora_Bs)
    )
    strategy = "with gradients" if any((*needs_x, *needs_a, *needs_b)) else "without gradients"
    if not uniform or few or (trained and as_trained) or (quantized_few and not shared_mask):
        strategy = "one by one"
    if backend == "triton":
        scalings = scalings_of(scalings, dropout_p)
    layouts = layouts_of(projections)
    lengths, (need_x,) = (3, scale_count(layouts), 3, 3, 3, 3), needs_x
    # dH needs down's weight, dX the others'.
    need_a, need_b = any(needs_a[:2]), any(needs_b[:2])
    need_h = need_x or need_a or need_b
    reads = (need_a, True, True, need_b, needs_b[2], need_x, need_x, need_h)
    lora_dtype = next((lora_A.dtype for lora_A in lora_As if lora_A is not None), x.dtype)
    members = tuple([Entry(backend) for _ in projections]) if strategy == "one by one" else ()
    needs = (need_x, needs_a, needs_b)
    return MLPFacts(strategy, options, scalings, layouts, lengths, needs, reads, lora_dtype, members)


def _one_by_one(
    x: Tensor, projections: Sequence[Projection], options: Options, entries: Sequence[Entry | None]
) -> Tensor:
    """Each projection by an op of its own, and the activation by PyTorch's operators."""
    gate, up, down = projections
    if options.shared_mask and options.dropout_p:
        g, u = _with_shared_mask(x, gate, up, options, entries[:2])
    else:
        g, u = _alone(x, gate, options, entries[0]), _alone(x, up, options, entries[1])
    return _alone(_ACTIVATIONS[options.activation][0](g) * u, down, options, entries[2])


def _alone(x: Tensor, p: Projection, options: Options, entry: Entry | None) -> Tensor:
    dropout_p, weight = options.dropout_p, p.weight
    if p.lora_A is None:
        if isinstance(weight, Tensor):
            return linear(x, weight, p.bias)
        assert weight is not None
        # The op saves what is stored, where PyTorch's autograd would save all of W. Its branch is of zeros.
        n, k = weight.shape
        p, dropout_p = Projection(weight, p.bias, x.new_zeros(1, k), x.new_zeros(n, 1), 0.0), 0.0
    return lora_linear_op(x, (p,), None, dropout_p, options.backend, entry)[0]


def _with_shared_mask(
    x: Tensor, gate: Projection, up: Projection, options: Options, entries: Sequence[Entry | None]
) -> list[Tensor]:
    """G and U, whose branches read one masked X."""
    keep, scale = draw_dropout(x, options.dropout_p, 1.0)
    dropped = masked(x, keep)
    outputs: list[Tensor] = []
    for (weight, bias, lora_A, lora_B, scaling), entry in zip((gate, up), entries, strict=True):
        assert weight is not None
        base = linear(x, as_plain(weight, x.dtype), bias)
        branch = Projection(None, None, lora_A, lora_B, scaling * scale)
        outputs += lora_linear_op(dropped, (branch,), base, 0.0, options.backend, entry)
    return outputs
