"""``lora_mlp`` on the PyTorch path: its forward and its backward without autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from stablelora_kernels.ops.dropout import NOT_DROPPED, Drawn, draw_for_backward, drawn_again
from stablelora_kernels.ops.formulas import Gradients, Wanted, torch_bwd, torch_fwd
from stablelora_kernels.ops.lora_mlp_facts import MLPFacts
from stablelora_kernels.ops.lora_mlp_triton import (
    MLPBackwardCall,
    MLPForwardResults,
    with_branches,
)
from stablelora_kernels.ops.matrices import as_matrix, like_rows_of, with_own_memory
from stablelora_kernels.projection import Projection, operands_of, projections_of


class Activation(NamedTuple):
    """act(G), and dG for dH ∘ U and G."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]


_silu_backward = torch.ops.aten.silu_backward
_gelu_backward = torch.ops.aten.gelu_backward
ACTIVATIONS = {
    "silu": Activation(silu, _silu_backward),
    "gelu": Activation(gelu, _gelu_backward),
    "gelu_tanh": Activation(
        partial(gelu, approximate="tanh"), partial(_gelu_backward, approximate="tanh")
    ),
}


class Forward(NamedTuple):
    """The results of a forward, and what backward needs with them."""

    # On Triton, Y alone is not empty if nothing is saved.
    results: MLPForwardResults
    # Of each projection its mask, or what draws it again.
    recipes: Sequence[Tensor | None]
    # Those that were multiplied, in x's dtype on the PyTorch path.
    operands: Sequence[Tensor | None]
    # Each s'.
    scalings: tuple[float, ...]


def torch_forward(
    facts: MLPFacts,
    x: Tensor,
    operands: Sequence[Tensor | None],
    scales: Sequence[Tensor],
) -> Forward:
    """G, U, H and Y by PyTorch's operators, with the masks drawn on the way."""
    options = facts.options
    settings = facts.forward
    rows = as_matrix(x)
    projections = projections_of(operands, scales, settings.layouts, settings.scalings)
    # Cast once for forward and backward.
    gate, up, down = [_with_branch_in(x.dtype, p) for p in with_branches(projections, x)]
    of_gate = _draw(rows, gate, options.dropout_p)
    of_up = of_gate if options.shared_mask else _draw(rows, up, options.dropout_p)
    gate = gate._replace(scaling=gate.scaling * of_gate.scale)
    up = up._replace(scaling=up.scaling * of_up.scale)
    outputs, every_s = torch_fwd(rows, [gate, up], [of_gate.mask, of_up.mask])
    g, u = outputs
    h = ACTIVATIONS[options.activation].forward(g).mul_(u)
    of_down = _draw(h, down, options.dropout_p)
    down = down._replace(scaling=down.scaling * of_down.scale)
    down_outputs, down_s = torch_fwd(h, [down], [of_down.mask])
    projections = [gate, up, down]
    y = like_rows_of(down_outputs[0], x)
    return Forward(
        MLPForwardResults(y, g, u, torch.cat(every_s, 1), down_s[0], ()),
        recipes=[of_gate.recipe, of_up.recipe, of_down.recipe],
        operands=operands_of(projections),
        scalings=(gate.scaling, up.scaling, down.scaling),
    )


def _with_branch_in(dtype: torch.dtype, p: Projection) -> Projection:
    """``p`` with A and B in ``dtype``."""
    assert p.lora_A is not None and p.lora_B is not None
    return p._replace(lora_A=p.lora_A.to(dtype), lora_B=p.lora_B.to(dtype))


def _draw(x: Tensor, p: Projection, dropout_p: float) -> Drawn:
    """The mask of a projection of x; none without a branch."""
    if dropout_p == 0.0 or p.rank == 0:
        return NOT_DROPPED
    return draw_for_backward(x, dropout_p)


def _down_backward(
    facts: MLPFacts, call: MLPBackwardCall, down: Projection
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of H and of down's A and B; None if they are not needed."""
    needs = facts.needs
    h = None
    if needs.down_a:
        h = ACTIVATIONS[facts.options.activation].forward(call.g).mul_(call.u)
    keep = None
    if needs.h or needs.down_a:
        keep = drawn_again(call.masks[2], call.g.shape, facts.options.dropout_p)
    dy = with_own_memory(as_matrix(call.grad))
    wanted = Wanted(needs.h, needs.down_a, needs.down_b)
    gradients = torch_bwd(h, [dy], [down], [call.s_down], [keep], facts.lora_dtype, wanted)
    da = gradients.das[0] if gradients.das else None
    db = gradients.dbs[0] if gradients.dbs else None
    return gradients.dx, da, db


def _gate_up_backward(
    facts: MLPFacts,
    call: MLPBackwardCall,
    dg: Tensor,
    du: Tensor,
    gate: Projection,
    up: Projection,
) -> Gradients:
    """The gradients of X, and of gate's and up's A and B, for dG and dU [M, F]."""
    needs = facts.needs
    keeps: list[Tensor | None] = [None, None]
    if needs.x or needs.thin_a:
        assert gate.lora_A is not None
        shape = (dg.shape[0], gate.lora_A.shape[1])
        keep = drawn_again(call.masks[0], shape, facts.options.dropout_p)
        keeps = [keep, keep]
        if not facts.options.shared_mask:
            keeps[1] = drawn_again(call.masks[1], shape, facts.options.dropout_p)
    every_s: Sequence[Tensor | None] = [None, None]
    if call.s is not None:
        every_s = call.s.split([gate.rank, up.rank], 1)
    return torch_bwd(
        None if call.x is None else as_matrix(call.x),
        [dg, du],
        [gate, up],
        every_s,
        keeps,
        facts.lora_dtype,
        Wanted(needs.x, needs.thin_a, needs.thin_b),
    )


class MLPGradients(NamedTuple):
    """dX, and each dA and dB of gate, up and down; what is not needed is None or empty."""

    dx: Tensor | None
    das: Sequence[Tensor | None]
    dbs: Sequence[Tensor | None]


def torch_backward(facts: MLPFacts, call: MLPBackwardCall) -> MLPGradients:
    """The gradients on the PyTorch path, where the masks of ``call`` are recipes."""
    settings = call.settings
    gate, up, down = projections_of(call.operands, call.scales, settings.layouts, settings.scalings)
    dh, da_down, db_down = _down_backward(facts, call, down)
    if dh is None:
        return MLPGradients(None, [None, None, da_down], [None, None, db_down])
    activation = ACTIVATIONS[facts.options.activation]
    du = activation.forward(call.g).mul_(dh)
    dg = _activation_backward(activation, dh.mul_(call.u), call.g)
    del dh
    gradients = _gate_up_backward(facts, call, dg, du, gate, up)
    dx = gradients.dx
    if dx is not None:
        dx = dx.view(*call.grad.shape[:-1], dx.shape[1])
    das = gradients.das or (None, None)
    dbs = gradients.dbs or (None, None)
    return MLPGradients(dx, [*das, da_down], [*dbs, db_down])


def _activation_backward(activation: Activation, dh: Tensor, g: Tensor) -> Tensor:
    """dG for dH ∘ U, in its memory where that can be."""
    # allow_mutation_on_saved_tensors(), for one, knows outputs by the name "out" alone.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return activation.backward(dh, g)
    return activation.backward(dh, g, grad_input=dh)
