"""From a call of ``lora_linear`` to its launches: of one projection, of several that share x, or of a branch alone.

Nothing here launches. The functions return lists of launches, which the op runs, ``explain`` prints and the compile report
compiles. For the latter two, tensors may be on the meta device. ``dispatch`` makes every choice. There is at least one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from stablelora_kernels.dispatch import rules
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch.base import Launches, VendorProduct
from stablelora_kernels.launch.jobs import Product, backward_product, forward_product
from stablelora_kernels.launch.products import dequantize, linear, quantized, shrink, weight_grads
from stablelora_kernels.launch.workspace import scratch
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import Stored


def forward_launches(
    device: Device, x: Tensor, projections: Sequence[Projection], seeds: Sequence[Tensor | None], s: Tensor | None,
    ys: Sequence[Tensor], dropout_p: float, base: Tensor | None = None, choice: Choice | None = None,
) -> Launches:  # fmt: skip
    """The launches of a forward: each Y [M, N] for x [M, K].

    Args:
        projections: with s' = scaling / (1 - p) for scaling. The only one has no weight if the branch is added to ``base``.
        s: [M, sum of ranks], every S side by side; None if it is not requested.
        base: contiguous [M, N].
        choice: of the only projection; the table's by default.
    """
    ranks = [p.rank for p in projections]
    if s is None and len(ranks) > 1:
        s = scratch(x, x.shape[0], sum(ranks))
    parts = [None] if s is None else s.split(ranks, 1)
    members = [
        forward_product(x, p, part, y, seed, dropout_p)._replace(base=base)
        for p, part, y, seed in zip(projections, parts, ys, seeds, strict=True)
    ]
    return member_launches(device, members, choice)


def member_launches(device: Device, members: Sequence[Product], choice: Choice | None = None) -> Launches:
    """The launches of a forward of projections of one x."""
    choices = [choice or _choose(device, p) for p in members]
    shared = len(members) > 1 and rules.choose_group([p.call for p in members], choices).shared
    launches: Launches = [shrink(device, members)] if shared else []
    for p, chosen in zip(members, choices, strict=True):
        launches += product_launches(device, p, chosen, s_ready=shared)
    return launches


def backward_launches(
    device: Device, x: Tensor | None, grads: Sequence[Tensor], projections: Sequence[Projection], s: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None], dropout_p: float,
    results: tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]], choice: Choice | None = None,
    plain: Callable[[Projection], tuple[Launches, Projection]] = lambda p: ([], p),
) -> Launches:  # fmt: skip
    """The launches of a backward, for those of dX, the dA's and the dB's that are not None; ``s`` is each projection's S.

    Each projection adds its part to the dX that the first one stores. Without a weight, dX is the branch's part alone.
    ``plain`` dequantizes a projection's weight by launches right before its product.
    """
    dx, das, dbs = results
    ranks = [p.rank for p in projections]
    every_ds = scratch(grads[0], grads[0].shape[0], sum(ranks)).split(ranks, 1) if len(ranks) > 1 else [None]
    firsts, plains = zip(*[plain(p) if dx is not None else ([], p) for p in projections], strict=True)
    members = [
        backward_product(x, grad, p, each_s, seed, dropout_p, (dx, da, db), ds if da is not None else None)
        for grad, p, each_s, seed, da, db, ds in zip(grads, plains, s, seeds, das, dbs, every_ds, strict=True)
    ]
    choices = [choice or _choose(device, p) for p in members]
    shared = len(members) > 1 and all(p.da is not None for p in members)
    shared = shared and rules.choose_group([p.call for p in members], choices if dx is not None else ()).shared
    launches: Launches = []
    for i, (p, chosen) in enumerate(zip(members, choices, strict=True)):
        if i:
            p = p._replace(call=p.call._replace(add=True), base=p.y)
        launches += [*firsts[i], *product_launches(device, p._replace(da=None) if shared else p, chosen)]
    return [*launches, weight_grads(device, members)] if shared else launches


def _choose(device: Device, p: Product) -> Choice:
    if isinstance(p.w, Stored):
        return rules.choose_quantized(device, p.call, p.w.layout.bits, p.w.layout.aligned)
    return rules.choose_branch(p.call) if p.w is None else rules.choose(device, p.call)


def product_launches(device: Device, p: Product, choice: Choice, s_ready: bool = False) -> Launches:
    """The launches for ``p`` by the kernel of ``choice``, and for its dA and dB.

    dB goes with a separate dS, so that dY is read once, and dA with dX. If dX is not wanted, only "chained" is of use.
    ``s_ready``: an earlier launch has filled ``p.s``. "fused" would compute it again.
    """
    if isinstance(p.w, Stored) and choice.kernel == "dequantize":
        w = scratch(p.x, p.w.layout.n, p.w.layout.k)
        plain = p._replace(w=w if p.call.direction == "forward" else w.t())
        return [dequantize(w, p.w), *product_launches(device, plain, rules.choose(device, p.call))]
    if isinstance(p.w, Stored):
        # W is dequantized in the product's own loop.
        p = _with_s(p)
        return [shrink(device, [p]), quantized(device, p), *_gradients(device, p, with_db=False)]
    if not p.wanted and (p.s is None or choice.kernel != "chained"):
        return [*([shrink(device, [p])] if p.s is not None else []), *_gradients(device, p, with_db=p.s is None)]
    rules.check_possible(p.call, choice.kernel)
    if choice.kernel == "vendor":
        return _onto_vendors(device, p, s_ready)
    if choice.kernel == "fused" and p.call.r:
        return [linear(device, p._replace(da=None), choice.tile, load_s=False), *_gradients(device, p)]
    if s_ready or not p.call.r:
        return [linear(device, p, choice.tile, load_s=True)]
    p = _with_s(p)
    if choice.kernel == "chained":
        return [linear(device, p, choice.tile, load_s=True, chained=True)]
    return [shrink(device, [p]), linear(device, p, choice.tile, load_s=True)]


def _with_s(p: Product) -> Product:
    """``p`` with memory for S."""
    return p if p.s is not None else p._replace(s=scratch(p.x, p.call.m, p.call.r))


def _gradients(device: Device, p: Product, with_db: bool = True) -> Launches:
    """dA and dB in a launch of their own, or dA without ``with_db``; none if none is wanted."""
    p = p if with_db else p._replace(db=None)
    return [weight_grads(device, [p])] if p.da is not None or p.db is not None else []


def _onto_vendors(device: Device, p: Product, s_ready: bool) -> Launches:
    """The vendor's product, then the branch onto it."""
    assert isinstance(p.w, Tensor)
    product = VendorProduct(p.x, p.w, p.bias, p.y, p.call.add)
    if not p.call.r and not p.activation:
        return [product]
    branch = p._replace(w=None, bias=None, base=p.y)
    return [product, *product_launches(device, branch, rules.choose_branch(p.call), s_ready)]
