"""The PyTorch path of ``lora_mlp``: the formulas on PyTorch's own operators, in place where autograd keeps nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.torch_path import can_redraw, draw_dropout, draw_keep_again, torch_bwd, torch_fwd
from stablelora_kernels.projection import Projection


class Options(NamedTuple):
    """The arguments of an MLP's call that are no tensors."""

    activation: str
    dropout_p: float
    backend: str
    # Whether gate and up share A, and so its mask.
    shared_mask: bool


class Kept(NamedTuple):
    """The forward's results for backward."""

    g: Tensor
    u: Tensor
    # Gate's and up's S. On Triton, one matrix has both.
    s: Sequence[Tensor]
    s_down: Tensor
    # Each projection's seed on Triton; its mask, or its generator's state, on the PyTorch path; None without dropout.
    random: Sequence[Tensor | None]
    # s'
    scalings: Sequence[float]


def act(g: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(g)
    return torch.nn.functional.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")


def _gated_grads(dh: Tensor, g: Tensor, u: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dG and dU, in the memory of dH where possible."""
    du = act(g, activation).mul_(dh)
    dh.mul_(u)
    # allow_mutation_on_saved_tensors(), for one, knows outputs by the name "out" alone.
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    out = {} if traced else {"grad_input": dh}
    if activation == "silu":
        return torch.ops.aten.silu_backward(dh, g, **out), du
    return torch.ops.aten.gelu_backward(dh, g, approximate="tanh" if activation == "gelu_tanh" else "none", **out), du


def _draw(x: Tensor, p: Projection, dropout_p: float) -> tuple[Tensor | None, Tensor | None, float]:
    """The keep-mask of x's shape, what gives it to backward again, and s' / scaling; no mask without a branch."""
    assert p.lora_A is not None
    dropout_p = dropout_p if p.lora_A.shape[0] else 0.0
    state = torch.get_rng_state() if dropout_p and can_redraw(x) else None
    keep, scale = draw_dropout(x, dropout_p, 1.0)
    return keep, keep if state is None else state, scale


def _keep(random: Tensor | None, shape: Sequence[int], dropout_p: float) -> Tensor | None:
    """The mask that :func:`_draw` has drawn."""
    return random if random is None or random.dtype == torch.bool else draw_keep_again(random, shape, dropout_p)


def torch_mlp_fwd(x: Tensor, projections: Sequence[Projection], options: Options) -> tuple[Tensor, Kept]:
    """Y [M, N] for x [M, K]. A projection without a branch has an A and a B of rank 0. All tensors have one dtype."""
    activation, dropout_p, _, shared_mask = options
    gate, up, down = projections
    drawn = [_draw(x, gate, dropout_p)]
    drawn.append(drawn[0] if shared_mask else _draw(x, up, dropout_p))
    scaled = [p._replace(scaling=p.scaling * scale) for p, (*_, scale) in zip((gate, up), drawn, strict=True)]
    (g, u), s = torch_fwd(x, scaled, [keep for keep, *_ in drawn])
    h = act(g, activation).mul_(u)
    keep, random, scale = _draw(h, down, dropout_p)
    scaled.append(down._replace(scaling=down.scaling * scale))
    (y,), (s_down,) = torch_fwd(h, scaled[2:], [keep])
    return y, Kept(g, u, s, s_down, [*(each for _, each, _ in drawn), random], [p.scaling for p in scaled])


def torch_mlp_bwd(
    x: Tensor | None, grad: Tensor, projections: Sequence[Projection], kept: Kept, options: Options, lora_dtype: torch.dtype,
    need_x: bool, needs_a: Sequence[bool], needs_b: Sequence[bool],
) -> tuple[Tensor | None, list[Any], list[Any]]:  # fmt: skip
    """dX, the dA's and the dB's, for x [M, K] and dY [M, N]; all tensors have one dtype, and the scalings are s'."""
    g, u, s, s_down, random, _ = kept
    activation, dropout_p, _, shared_mask = options
    need_a, need_b = any(needs_a[:2]), any(needs_b[:2])
    need_h = need_x or need_a or need_b
    h = act(g, activation).mul_(u) if needs_a[2] else None
    keep = _keep(random[2], g.shape, dropout_p) if need_h or needs_a[2] else None
    needs = (need_h, needs_a[2], needs_b[2])
    dh, da, db = torch_bwd(h, [grad], projections[2:], [s_down], [keep], lora_dtype, *needs)
    nothing = [None] * 3
    if dh is None:
        return None, [*nothing[:2], *(da or nothing[:1])], [*nothing[:2], *(db or nothing[:1])]
    # Before there is dU.
    del h, keep
    grads = _gated_grads(dh, g, u, activation)
    del dh
    keeps: list[Tensor | None] = [None, None]
    if need_x or need_a:
        assert projections[0].lora_A is not None
        shape = (grad.shape[0], projections[0].lora_A.shape[1])
        keeps[0] = _keep(random[0], shape, dropout_p)
        keeps[1] = keeps[0] if shared_mask else _keep(random[1], shape, dropout_p)
    dx, das, dbs = torch_bwd(x, grads, projections[:2], s, keeps, lora_dtype, need_x, need_a, need_b)
    return dx, [*(das or nothing[:2]), *(da or nothing[:1])], [*(dbs or nothing[:2]), *(db or nothing[:1])]
