"""``lora_mlp`` on PyTorch's operators: its two calls, by the formulas of one projection after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stablelora_kernels.activations import ACTIVATIONS, Activation
from stablelora_kernels.ops.dropout import (
    NOT_DROPPED,
    Drawn,
    draw_for_backward,
    draw_from,
    drawn_again,
)
from stablelora_kernels.ops.formulas import (
    Gradients,
    gradients_of,
    lora_dtype_of,
    project,
    thin_product,
    to_multiply,
)
from stablelora_kernels.ops.lora_mlp.call import (
    DOWN,
    GATE,
    UP,
    MLPBackwardCall,
    MLPBackwardResults,
    MLPForwardCall,
    MLPForwardResults,
    with_branches,
)
from stablelora_kernels.ops.matrices import as_matrix, like_rows_of, with_own_memory
from stablelora_kernels.projection import Projection, projections_of
from stablelora_kernels.utils.tensors import cast


def mlp_forward_torch(call: MLPForwardCall) -> MLPForwardResults:
    """The call of ``lora_mlp_fwd``. Torch's generator draws the masks, or one of each seed that is
    given, and gate and up each have an S of their own.
    """
    settings = call.settings
    x = as_matrix(call.x)
    projections = projections_of(call.operands, call.scales, settings.layouts, settings.scalings)
    gate, up, down = [to_multiply(p, x.dtype) for p in with_branches(projections, x)]
    of_gate = _draw(call, GATE, x, gate)
    of_up = of_gate if settings.shared_mask else _draw(call, UP, x, up)
    g, s_gate = project(x, gate, of_gate.mask)
    u, s_up = project(x, up, of_up.mask)
    h = ACTIVATIONS[settings.activation].forward(g).mul_(u)
    of_down = _draw(call, DOWN, h, down)
    if settings.output:
        y, s_down = project(h, down, of_down.mask)
    else:
        y = h.new_empty(0)
        s_down = thin_product(h, down, of_down.mask)
    drawn = zip((of_gate, of_up, of_down), settings.stores_mask, strict=True)
    masks = [mask.recipe for mask, is_stored in drawn if is_stored and mask.recipe is not None]
    if settings.output:
        y = like_rows_of(y, call.x)
    return MLPForwardResults(y, g, u, [s_gate, s_up], s_down, masks)


def _draw(call: MLPForwardCall, place: int, x: Tensor, p: Projection) -> Drawn:
    """The mask of the projection at ``place``, which reads x; none without a branch."""
    dropout_p = call.settings.dropout_p
    if dropout_p == 0.0 or p.rank == 0:
        return NOT_DROPPED
    seed = call.seeds[place]
    return draw_for_backward(x, dropout_p) if seed is None else draw_from(x, dropout_p, seed)


def mlp_backward_torch(call: MLPBackwardCall) -> MLPBackwardResults:
    """The call of ``lora_mlp_bwd``."""
    settings = call.settings
    dy = with_own_memory(as_matrix(call.grad))
    projections = projections_of(call.operands, call.scales, settings.layouts, settings.scalings)
    gate, up, down = with_branches(projections, dy)
    # act(G), and H for down's dA.
    activation = ACTIVATIONS[settings.activation]
    a = activation.forward(call.g)
    h = a * call.u if settings.need_a[DOWN] else None
    down_mask = _mask_again(call, DOWN, dy.shape[0], down)
    of_down = _gradients(call, DOWN, h, dy, down, down_mask)
    del h, down_mask
    if of_down.dx is None:
        return _results(call, None, [_NONE, _NONE, of_down])
    dh = cast(of_down.dx, dy.dtype)
    du = a.mul_(dh)
    dg = _activation_backward(activation, dh.mul_(call.u), call.g)
    x = None if call.x is None else as_matrix(call.x)
    gate_mask = _mask_again(call, GATE, dy.shape[0], gate)
    up_mask = gate_mask
    if not settings.shared_mask:
        up_mask = _mask_again(call, UP, dy.shape[0], up)
    of_gate = _gradients(call, GATE, x, dg, gate, gate_mask)
    of_up = _gradients(call, UP, x, du, up, up_mask, of_gate.dx)
    return _results(call, of_up.dx, [of_gate, of_up, of_down])


_NONE = Gradients(None, None, None)


def _mask_again(call: MLPBackwardCall, place: int, rows: int, p: Projection) -> Tensor | None:
    """The mask of the projection at ``place``."""
    assert p.lora_A is not None
    return drawn_again(call.masks[place], (rows, p.lora_A.shape[1]), call.settings.dropout_p)


def _gradients(
    call: MLPBackwardCall,
    place: int,
    x: Tensor | None,
    grad: Tensor,
    p: Projection,
    mask: Tensor | None,
    dx: Tensor | None = None,
) -> Gradients:
    """Those of the projection at ``place``, of what it has read [M, K] and of dY [M, N]; ``dx`` as for
    :func:`gradients_of`.
    """
    s = call.s_down if place == DOWN else call.s[place] if call.s else None
    wanted = call.settings.wanted(place)
    multiplied = to_multiply(p, grad.dtype)
    return gradients_of(x, grad, multiplied, s, mask, lora_dtype_of(p), wanted, dx)


def _results(
    call: MLPBackwardCall, dx: Tensor | None, gradients: Sequence[Gradients]
) -> MLPBackwardResults:
    """``dx`` [M, K] and the gradients of gate, up and down; empty where there are none."""
    grad = call.grad
    nothing = grad.new_empty(0)
    return MLPBackwardResults(
        nothing if dx is None else like_rows_of(cast(dx, grad.dtype), grad),
        [nothing if each.da is None else each.da for each in gradients],
        [nothing if each.db is None else each.db for each in gradients],
    )


def _activation_backward(activation: Activation, dh: Tensor, g: Tensor) -> Tensor:
    """dG for dH ∘ U, in its memory where that can be."""
    # allow_mutation_on_saved_tensors(), for one, knows outputs by the name "out" alone.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return activation.backward(dh, g)
    return activation.backward(dh, g, grad_input=dh)
