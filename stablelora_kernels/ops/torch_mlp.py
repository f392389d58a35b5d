"""The PyTorch path of ``lora_mlp``: the formulas on PyTorch's own operators, in place where autograd keeps nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.lora_linear_group import torch_group_bwd, torch_group_fwd
from stablelora_kernels.ops.torch_path import can_redraw, draw_dropout, redrawn, torch_bwd, torch_fwd
from stablelora_kernels.quantized import Stored, as_plain


class Projections(NamedTuple):
    """Gate, up and down; a projection without a branch has None for A and B."""

    weights: Sequence[Tensor | Stored]
    biases: Sequence[Tensor | None]
    lora_As: Sequence[Tensor | None]
    lora_Bs: Sequence[Tensor | None]
    scalings: Sequence[float]


class Settings(NamedTuple):
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
    s: list[Tensor]
    s_down: Tensor
    # Each projection's seed on Triton; its mask, or its generator's state, on the PyTorch path; None without dropout.
    random: list[Tensor | None]
    # s'
    scalings: list[float]


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


def _draw(x: Tensor, dropout_p: float) -> tuple[Tensor | None, Tensor | None, float]:
    """The keep-mask of x's shape, what gives it to backward again, and s' / scaling."""
    state = torch.get_rng_state() if dropout_p and can_redraw(x) else None
    keep, scale = draw_dropout(x, dropout_p, 1.0)
    return keep, keep if state is None else state, scale


def _keep(random: Tensor | None, shape: Sequence[int], dropout_p: float) -> Tensor | None:
    """The mask that :func:`_draw` has drawn."""
    return random if random is None or random.dtype == torch.bool else redrawn(random, shape, dropout_p)


def torch_mlp_fwd(x: Tensor, p: Projections, settings: Settings) -> tuple[Tensor, Kept]:
    """Y [M, N] for x [M, K]. A projection without a branch has an A and a B of rank 0. All tensors have one dtype."""
    activation, dropout_p, _, shared_mask = settings
    drops = [dropout_p if a.shape[0] else 0.0 for a in p.lora_As]  # type: ignore[union-attr]
    drawn = [_draw(x, drops[0])]
    drawn.append(drawn[0] if shared_mask else _draw(x, drops[1]))
    given: Any = [part[:2] for part in (p.weights, p.biases, p.lora_As, p.lora_Bs)]
    scalings = [scaling * scale for scaling, (*_, scale) in zip(p.scalings, drawn, strict=False)]
    (g, u), s = torch_group_fwd(x, *given, scalings, _masks([keep for keep, *_ in drawn]))  # type: ignore[call-arg]
    h = act(g, activation).mul_(u)
    keep, random, scale = _draw(h, drops[2])
    scalings.append(p.scalings[2] * scale)
    down = (as_plain(p.weights[2], x.dtype), p.biases[2], p.lora_As[2], p.lora_Bs[2])
    y, s_down = torch_fwd(h, *down, scalings[2], keep)  # type: ignore[arg-type]
    return y, Kept(g, u, s, s_down, [*(each for _, each, _ in drawn), random], scalings)


def _masks(keeps: list[Tensor | None]) -> list[Tensor | None]:
    """``keeps``, or nothing if no mask drops."""
    return [] if all(keep is None for keep in keeps) else keeps


def torch_mlp_bwd(
    x: Tensor | None, grad: Tensor, p: Projections, kept: Kept, settings: Settings, lora_dtype: torch.dtype, need_x: bool,
    needs_a: Sequence[bool], needs_b: Sequence[bool],
) -> tuple[Tensor | None, list[Any], list[Any]]:  # fmt: skip
    """dX, the dA's and the dB's, for x [M, K] and dY [M, N]; all tensors have one dtype."""
    g, u, s, s_down, random, scalings = kept
    activation, dropout_p = settings[:2]
    need_a, need_b = any(needs_a[:2]), any(needs_b[:2])
    need_h = need_x or need_a or need_b
    h = act(g, activation).mul_(u) if needs_a[2] else None
    keep = _keep(random[2], g.shape, dropout_p) if need_h or needs_a[2] else None
    weight = as_plain(p.weights[2], grad.dtype) if need_h else None
    down = (p.lora_As[2], p.lora_Bs[2], s_down, keep, scalings[2], lora_dtype)
    dh, da, db = torch_bwd(grad, h, weight, *down, need_h, needs_a[2], needs_b[2])  # type: ignore[arg-type]
    if dh is None:
        return None, [None, None, da], [None, None, db]
    # Before there is dU.
    del h, keep, weight, down
    grads = _gated_grads(dh, g, u, activation)
    del dh
    keeps = []
    if need_x or need_a:
        shape = (grad.shape[0], p.lora_As[0].shape[1])  # type: ignore[union-attr]
        keeps = [_keep(random[0], shape, dropout_p)]
        keeps.append(keeps[0] if settings.shared_mask else _keep(random[1], shape, dropout_p))
    given: Any = (p.weights[:2], p.lora_As[:2], p.lora_Bs[:2], s, _masks(keeps), scalings[:2], lora_dtype)
    dx, das, dbs = torch_group_bwd(x, grads, *given, need_x, need_a, need_b)  # type: ignore[call-arg]
    return dx, [*(das or (None, None)), da], [*(dbs or (None, None)), db]
