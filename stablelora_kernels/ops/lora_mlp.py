"""A gated MLP with LoRA in one autograd node: gate, up, activation and down. ``reference/lora.py``
has the formulas.

    forward   G = gate(X)   U = up(X)   H = act(G) ∘ U   Y = down(H)
    backward  dH = dX of down, for dY   dG = dH ∘ U ∘ act'(G)   dU = dH ∘ act(G)   then gate's and up's gradients for them

Autograd saves X, G, U and each S. Backward computes H and act(G) again where it needs them. The
kernels keep dropout's masks; the PyTorch path draws them again from the state of torch's generator,
where it can be read.
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
from stablelora_kernels.ops.lora_linear import (
    apply,
    draw_seed,
    first_derivative,
    lora_linear_op,
    new_mask,
    read_by_backward,
    scalings_of,
)
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
    LORA_AS,
    LORA_BS,
    WEIGHTS,
    Projection,
    flat,
    layouts_of,
    projections_in,
    projections_of,
    scales_of,
    split,
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
    """``projections`` with an A and a B of rank 0 where there is no branch, and all of them in
    ``dtype`` if it is given.
    """
    of_others = next((p.lora_A.dtype for p in projections if p.lora_A is not None), like.dtype)
    with_branches = []
    for p in projections:
        lora_A, lora_B = p.lora_A, p.lora_B
        if lora_A is None or lora_B is None:
            # These sizes are never read where the weight is not read.
            n, k = (0, 0) if p.weight is None else p.weight.shape
            lora_A = torch.empty((0, k), dtype=of_others, device=like.device)
            lora_B = torch.empty((n, 0), dtype=of_others, device=like.device)
        if dtype is not None:
            lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
        with_branches.append(p._replace(lora_A=lora_A, lora_B=lora_B))
    return with_branches


def _allocate_forward(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    x, projections = call.x, projections_in(call)
    gate, up, down = projections
    f, k = gate.weight.shape  # type: ignore[union-attr]
    n = down.weight.shape[0]  # type: ignore[union-attr]
    leading, rows = (x.shape[:-1], row_count(x)) if call.save else ((0,), 0)
    g, u = x.new_empty((*leading, f)), x.new_empty((*leading, f))
    s, s_down = x.new_empty((rows, gate.rank + up.rank)), x.new_empty((rows, down.rank))
    masks = [
        new_mask(x, width)
        for width, is_stored in zip((k, k, f), call.masks, strict=True)
        if is_stored
    ]
    return x.new_empty((*x.shape[:-1], n)), g, u, s, s_down, masks


@define_launches(
    "lora_mlp_fwd",
    "(Tensor x, Tensor?[] operands, Tensor[] scales, Tensor?[] seeds, int[] layouts, float[] scalings, float dropout_p, "
    "str activation, bool save, bool[] masks) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _allocate_forward,
)
def lora_mlp_fwd(
    device: Device, call: Any, results: tuple[Any, ...], choice: Choice | None
) -> list[Any]:
    """Y [..., N], and with ``save`` G and U [..., F], gate's and up's S side by side and down's S,
    for x [..., K].

    ``projection.flat`` makes the operands; the scalings are ``scalings_of``. ``masks``: whether
    gate's, up's and down's mask is stored.
    """
    from stablelora_kernels.launch.lora_mlp import MLPForwardCall, mlp_forward_launches

    *matrices, masks = results
    y, *kept = [as_matrix(matrix) for matrix in matrices]
    outputs = (y, *(kept if call.save else [None] * 4))
    x, left = as_matrix(call.x), iter(masks)
    projections = _with_branches(projections_in(call), x)
    kept_masks = [next(left) if is_stored else None for is_stored in call.masks]
    forward = MLPForwardCall(
        x, projections, call.seeds, kept_masks, call.dropout_p, call.activation, *outputs
    )
    return mlp_forward_launches(device, forward)


def _allocate_backward(call: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad, weight = call.grad, projections_in(call)[0].weight
    dx = grad.new_empty(
        (*grad.shape[:-1], weight.shape[1]) if call.need_x and weight is not None else 0
    )

    def like(tensors: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
        return [
            torch.empty_like(t, memory_format=torch.contiguous_format)
            if need and t is not None
            else grad.new_empty(0)
            for t, need in zip(tensors, needs, strict=True)
        ]

    return (
        dx,
        like(call.operands[LORA_AS], call.needs_a),
        like(call.operands[LORA_BS], call.needs_b),
    )


@define_launches(
    "lora_mlp_bwd",
    "(Tensor grad, Tensor? x, Tensor g, Tensor u, Tensor? s, Tensor? s_down, Tensor?[] operands, Tensor[] scales, "
    "Tensor?[] masks, int[] layouts, float[] scalings, float dropout_p, str activation, bool need_x, bool[] needs_a, "
    "bool[] needs_b) -> (Tensor, Tensor[], Tensor[])",
    _allocate_backward,
)
def lora_mlp_bwd(
    device: Device,
    call: Any,
    results: tuple[Tensor, list[Tensor], list[Tensor]],
    choice: Choice | None,
) -> list[Any]:
    """dX [..., K], the dA's and the dB's, for dY [..., N] and what the forward saved; those that
    are not needed are empty.

    Biases are None, and so is the data of a weight that no wanted gradient reads.
    """
    from stablelora_kernels.launch.lora_linear import Gradients
    from stablelora_kernels.launch.lora_mlp import MLPBackwardCall, mlp_backward_launches

    dx, *of_branches = results
    das, dbs = ([t if t.numel() else None for t in tensors] for tensors in of_branches)  # type: ignore[attr-defined]
    grad, g, u = (as_matrix(t) for t in (call.grad, call.g, call.u))
    backward = MLPBackwardCall(
        x=None if call.x is None else as_matrix(call.x),
        grad=grad,
        g=g,
        u=u,
        s=call.s,
        s_down=call.s_down,
        projections=_with_branches(projections_in(call), grad),
        masks=call.masks,
        dropout_p=call.dropout_p,
        activation=call.activation,
        results=Gradients(as_matrix(dx) if call.need_x else None, das, dbs),
    )
    return mlp_backward_launches(device, backward)


class Needs(NamedTuple):
    """Whether gradients are required: of x, and of gate's, up's and down's A and B."""

    x: bool
    a: tuple[bool, bool, bool]
    b: tuple[bool, bool, bool]

    @property
    def thin_a(self) -> bool:
        """Gate's or up's A."""
        return self.a[0] or self.a[1]

    @property
    def thin_b(self) -> bool:
        """Gate's or up's B."""
        return self.b[0] or self.b[1]

    @property
    def h(self) -> bool:
        """H, for any of them but down's own."""
        return self.x or self.thin_a or self.thin_b


class ForwardNumbers(NamedTuple):
    """The last arguments of ``lora_mlp_fwd``."""

    layouts: tuple[int, ...]
    # s' on Triton. On the PyTorch path s: the mask has a probability of its own.
    scalings: tuple[float, ...]
    dropout_p: float
    activation: str
    save: bool
    # Whether gate's, up's and down's mask is stored.
    masks: tuple[bool, ...]


class BackwardNumbers(NamedTuple):
    """The last arguments of ``lora_mlp_bwd``."""

    layouts: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout_p: float
    activation: str
    need_x: bool
    needs_a: tuple[bool, bool, bool]
    needs_b: tuple[bool, bool, bool]


class MLPFacts(NamedTuple):
    """What follows from the key of a call."""

    # "one by one", "with gradients" or "without gradients".
    strategy: str
    options: Options
    scale_count: int
    needs: Needs
    # Of A and B.
    lora_dtype: torch.dtype
    forward: ForwardNumbers
    backward: BackwardNumbers
    # "one by one": the projections' own entries.
    members: tuple[Entry, ...]


class Kept(NamedTuple):
    """What backward reads beside the projections and the masks; None is what it does not need."""

    x: Tensor | None
    g: Tensor
    u: Tensor
    # Gate's and up's side by side.
    s: Tensor | None
    s_down: Tensor | None


class Forward(NamedTuple):
    """Y, and what backward needs of it; on Triton, Y alone is not empty if nothing is saved."""

    y: Tensor
    kept: Kept
    # Of each projection its mask, or what draws it again.
    random: Sequence[Tensor | None]
    # Those that it computed with.
    operands: Sequence[Any]
    # Each s'.
    scalings: Sequence[float]


def _forward(
    facts: MLPFacts,
    entry: Entry | None,
    x: Tensor,
    operands: Sequence[Any],
    scales: Sequence[Tensor],
    save: bool,
) -> Forward:
    """For x [..., K], and the projections that ``projection.flat`` has taken apart."""
    options = facts.options
    if options.backend == "torch":
        return _torch_fwd(facts, x, operands, scales)
    dropout_p, shared_mask = options.dropout_p, options.shared_mask
    drops = [0.0 if lora_A is None else dropout_p for lora_A in operands[LORA_AS]]
    # In the order in which separate projections draw theirs.
    gate = draw_seed(x, drops[0])
    seeds = (gate, gate if shared_mask else draw_seed(x, drops[1]), draw_seed(x, drops[2]))
    numbers = facts.forward if save else facts.forward._replace(save=False, masks=(False,) * 3)
    y, *kept, masks = lora_mlp_fwd(entry, (x,), (operands, scales, seeds), numbers)
    left = iter(masks)
    mask, of_up, of_down = [next(left) if is_stored else None for is_stored in numbers.masks]
    return Forward(
        y,
        Kept(x, *kept),
        (mask, mask if shared_mask else of_up, of_down),
        operands,
        numbers.scalings,
    )


class Drawn(NamedTuple):
    """The keep-mask of a projection's input, what gives it to backward again, and s' / scaling; no
    mask without a branch.
    """

    keep: Tensor | None
    random: Tensor | None
    scale: float


def _draw(x: Tensor, p: Projection, dropout_p: float) -> Drawn:
    if dropout_p == 0.0 or p.rank == 0:
        return Drawn(None, None, 1.0)
    if can_redraw(x):
        keep, state, dropout_p = draw_keep_and_state(x.shape, dropout_p)
        return Drawn(keep, state, 1 / (1 - dropout_p))
    keep, dropout_p = draw_keep(x, dropout_p)
    return Drawn(keep, keep, 1 / (1 - dropout_p))


def _drawn_again(random: Tensor | None, shape: Sequence[int], dropout_p: float) -> Tensor | None:
    """The mask that :func:`_draw` has drawn."""
    return (
        random
        if random is None or random.dtype == torch.bool
        else draw_keep_again(random, shape, dropout_p)
    )


def _torch_fwd(
    facts: MLPFacts, x: Tensor, operands: Sequence[Any], scales: Sequence[Tensor]
) -> Forward:
    activation, dropout_p = facts.options.activation, facts.options.dropout_p
    rows = as_matrix(x)
    # Cast once for forward and backward.
    projections = projections_of(operands, scales, facts.forward.layouts, facts.forward.scalings)
    gate, up, down = _with_branches(projections, x, x.dtype)
    of_gate = _draw(rows, gate, dropout_p)
    of_up = of_gate if facts.options.shared_mask else _draw(rows, up, dropout_p)
    gate, up = (
        gate._replace(scaling=gate.scaling * of_gate.scale),
        up._replace(scaling=up.scaling * of_up.scale),
    )
    (g, u), each_s = torch_fwd(rows, [gate, up], [of_gate.keep, of_up.keep])
    h = _ACTIVATIONS[activation][0](g).mul_(u)
    of_down = _draw(h, down, dropout_p)
    down = down._replace(scaling=down.scaling * of_down.scale)
    (y,), (s_down,) = torch_fwd(h, [down], [of_down.keep])
    projections = [gate, up, down]
    return Forward(
        like_rows_of(y, x),
        Kept(x, g, u, torch.cat(each_s, 1), s_down),
        [of_gate.random, of_up.random, of_down.random],
        flat(projections),
        [p.scaling for p in projections],
    )


def _torch_bwd(
    facts: MLPFacts,
    grad: Tensor,
    kept: Kept,
    projections: Sequence[Projection],
    random: Sequence[Any],
) -> tuple[Tensor | None, list[Any], list[Any]]:
    """dX, the dA's and the dB's for dY [..., N], None if not needed. The projections' scalings are
    s'.
    """
    needs, dropout_p = facts.needs, facts.options.dropout_p
    act, act_backward = _ACTIVATIONS[facts.options.activation]
    gate, up, down = projections
    g, u = kept.g, kept.u
    dy = expanded(as_matrix(grad))
    h = act(g).mul_(u) if needs.a[2] else None
    keep = _drawn_again(random[2], g.shape, dropout_p) if needs.h or needs.a[2] else None
    dh, da_down, db_down = torch_bwd(
        h, [dy], [down], [kept.s_down], [keep], facts.lora_dtype, needs.h, needs.a[2], needs.b[2]
    )
    # Before there is dU.
    del h, keep
    dx: Tensor | None = None
    das: list[Any] = []
    dbs: list[Any] = []
    if dh is not None:
        du = act(g).mul_(dh)
        # dG takes the memory of dH. allow_mutation_on_saved_tensors(), for one, knows outputs by
        # the name "out" alone.
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        dg = act_backward(dh.mul_(u), g, **({} if traced else {"grad_input": dh}))
        del dh
        keeps: list[Tensor | None] = [None, None]
        if needs.x or needs.thin_a:
            assert gate.lora_A is not None
            shape = (dy.shape[0], gate.lora_A.shape[1])
            of_gate = _drawn_again(random[0], shape, dropout_p)
            keeps = [
                of_gate,
                of_gate if facts.options.shared_mask else _drawn_again(random[1], shape, dropout_p),
            ]
        rows = None if kept.x is None else as_matrix(kept.x)
        each_s: Sequence[Any] = (
            [None, None] if kept.s is None else kept.s.split([gate.rank, up.rank], 1)
        )
        dx, das, dbs = torch_bwd(
            rows,
            [dg, du],
            [gate, up],
            each_s,
            keeps,
            facts.lora_dtype,
            needs.x,
            needs.thin_a,
            needs.thin_b,
        )
    dx = None if dx is None else dx.view(*grad.shape[:-1], dx.shape[1])
    of_a: list[Any] = [*(das or (None, None)), *(da_down or (None,))]
    of_b: list[Any] = [*(dbs or (None, None)), *(db_down or (None,))]
    return dx, of_a, of_b


class _LoRAMLP(torch.autograd.Function):
    """``tensors``: the operands of gate, up and down, and then all scales. Weights and biases get
    no gradient.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, entry: Entry | None, facts: MLPFacts, x: Tensor, *tensors: Any
    ) -> Tensor:
        needs = facts.needs
        operands, scales = tensors[:12], tensors[12:]
        done = _forward(facts, entry, x, operands, scales, save=True)
        kept = done.kept
        gate, up, down = done.operands[WEIGHTS]
        read = read_by_backward(done.operands, weights=False)
        read[WEIGHTS] = [
            gate if needs.x else None,
            up if needs.x else None,
            down if needs.h else None,
        ]
        ctx.save_for_backward(
            x if needs.thin_a else None,
            kept.g,
            kept.u,
            kept.s if needs.thin_b else None,
            kept.s_down if needs.b[2] else None,
            *read,
            *scales,
            *done.random,
        )
        ctx.call = (facts, done.scalings)
        return done.y

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        facts, scalings = ctx.call
        needs = facts.needs
        of_operands: list[Any] = [None] * 12
        tensors = ctx.saved_tensors
        kept = Kept(*tensors[:5])
        saved = split(tensors[5:], (len(of_operands), facts.scale_count, 3))
        dx: Tensor | None
        if facts.options.backend == "triton":
            dx, das, dbs = lora_mlp_bwd(None, (grad, *kept), saved, facts.backward)
        else:
            operands, scales, random = saved
            projections = projections_of(operands, scales, facts.backward.layouts, scalings)
            dx, das, dbs = _torch_bwd(facts, grad, kept, projections, random)
        of_operands[LORA_AS] = [da if need else None for da, need in zip(das, needs.a, strict=True)]
        of_operands[LORA_BS] = [db if need else None for db, need in zip(dbs, needs.b, strict=True)]
        return None, None, dx if needs.x else None, *of_operands, *[None] * facts.scale_count


def lora_mlp_op(
    x: Tensor, projections: Sequence[Projection], options: Options, entry: Entry | None = None
) -> Tensor:
    """``functional.lora_mlp`` with checked arguments and a chosen backend. ``entry``: that of the
    call's key.
    """
    facts = None if entry is None else entry.facts
    if facts is None:
        facts = _facts_of(x, projections, options)
        if entry is not None:
            entry.facts = facts
    if facts.strategy == "one by one":
        # An entry also says that the call is not traced.
        return _one_by_one(
            x, projections, options, facts.members if entry is not None else [None] * 3
        )
    operands, scales = flat(projections), scales_of(projections, facts.forward.layouts)
    if facts.strategy == "without gradients":
        return _forward(facts, entry, x, operands, scales, save=False).y
    tensors = [*operands, *scales]
    return apply(
        _LoRAMLP,
        entry,
        facts,
        x,
        *(_distinct(tensors) if torch.compiler.is_compiling() else tensors),
    )


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A view in place of a tensor that comes a second time, such as a shared A: torch.compile
    refuses it otherwise.
    """
    distinct: list[Tensor | None] = []
    for t in tensors:
        distinct.append(
            t.view(t.shape) if t is not None and any(t is other for other in distinct) else t
        )
    return distinct


def _facts_of(x: Tensor, projections: Sequence[Projection], options: Options) -> MLPFacts:
    _, dropout_p, backend, shared_mask = options
    weights, biases, lora_As, lora_Bs, scalings = zip(*projections, strict=True)
    plain = [w for w in weights if not isinstance(w, Stored)]
    trained = any(t is not None and t.requires_grad for t in (*plain, *biases))
    uniform = all(
        len({t.requires_grad for t in ts[:2] if t is not None}) < 2 for ts in (lora_As, lora_Bs)
    )
    few = backend == "torch" and len(plain) == 3 and is_few(x, *plain)
    quantized_few = backend == "triton" and len(plain) < 3 and row_count(x) <= problem.IN_LOOP_M
    with_grad = torch.is_grad_enabled()
    # Separate layers draw a shared mask by other means than the kernels, so that a checkpoint's
    # forward must take them too.
    as_trained = with_grad or (shared_mask and dropout_p > 0)
    (need_x,), *of_branches = (
        [with_grad and t is not None and t.requires_grad for t in each]
        for each in ((x,), lora_As, lora_Bs)
    )
    needs = Needs(need_x, *map(tuple, of_branches))  # type: ignore[arg-type]
    strategy = "with gradients" if needs.h or needs.a[2] or needs.b[2] else "without gradients"
    if not uniform or few or (trained and as_trained) or (quantized_few and not shared_mask):
        strategy = "one by one"
    if backend == "triton":
        scalings = scalings_of(scalings, dropout_p)
    lora_dtype = next((lora_A.dtype for lora_A in lora_As if lora_A is not None), x.dtype)
    members = tuple([Entry(backend) for _ in projections]) if strategy == "one by one" else ()
    layouts = layouts_of(projections)
    scale_count = len(scales_of(projections, layouts))
    thin = needs.x or needs.thin_a
    read = (thin, thin and not shared_mask, needs.h or needs.a[2])
    masks = tuple(
        [
            dropout_p > 0 and p.lora_A is not None and is_read
            for p, is_read in zip(projections, read, strict=True)
        ]
    )
    forward = ForwardNumbers(layouts, scalings, dropout_p, options.activation, True, masks)
    backward = BackwardNumbers(
        layouts, scalings, dropout_p, options.activation, needs.x, needs.a, needs.b
    )
    return MLPFacts(strategy, options, scale_count, needs, lora_dtype, forward, backward, members)


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
        # The op saves what is stored, where PyTorch's autograd would save all of W. Its branch is
        # of zeros.
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
