"""``lora_mlp`` on the PyTorch path, with its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from stablelora_kernels.ops.autograd import (
    Context,
    apply_of_known_calls,
    distinct,
    first_derivative,
)
from stablelora_kernels.ops.dropout import NOT_DROPPED, Drawn, draw_for_backward, drawn_again
from stablelora_kernels.ops.formulas import (
    Gradients,
    Projected,
    Saved,
    Wanted,
    gradients_of,
    project_drawn,
)
from stablelora_kernels.ops.lora_mlp.call import (
    with_branches,
)
from stablelora_kernels.ops.lora_mlp.facts import MLPFacts
from stablelora_kernels.ops.matrices import as_matrix, like_rows_of, with_own_memory
from stablelora_kernels.projection import Projection, operands_of, scales_of, with_stored
from stablelora_kernels.utils.tensors import cast


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


def _forward(
    facts: MLPFacts, x: Tensor, gate: Projection, up: Projection, down: Projection
) -> tuple[Projected, Projected, Projected]:
    """Gate's, up's and down's output for x [M, K], with the masks drawn on the way."""
    options = facts.options
    if not (gate.rank and up.rank and down.rank):
        gate, up, down = with_branches((gate, up, down), x)
    mask_of_gate = _draw(x, gate, options.dropout_p)
    mask_of_up = mask_of_gate if options.shared_mask else _draw(x, up, options.dropout_p)
    of_gate = project_drawn(x, gate, mask_of_gate)
    of_up = project_drawn(x, up, mask_of_up)
    h = ACTIVATIONS[options.activation].forward(of_gate.y).mul_(of_up.y)
    return of_gate, of_up, project_drawn(h, down, _draw(h, down, options.dropout_p))


def _draw(x: Tensor, p: Projection, dropout_p: float) -> Drawn:
    """The mask of a projection of x; none without a branch."""
    if dropout_p == 0.0 or p.rank == 0:
        return NOT_DROPPED
    return draw_for_backward(x, dropout_p)


class _MLPContext(Context, Protocol):
    facts: MLPFacts
    # Each s'.
    scalings: tuple[float, float, float]


class _LoRAMLP(torch.autograd.Function):
    """A gated MLP. Weights and biases get no gradient. ``scales``: those of quantized weights."""

    @staticmethod
    def forward(
        ctx: _MLPContext,
        facts: MLPFacts,
        x: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor | None,
        gate_A: Tensor | None,
        gate_B: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor | None,
        up_A: Tensor | None,
        up_B: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        down_A: Tensor | None,
        down_B: Tensor | None,
        *scales: Tensor,
    ) -> Tensor:
        needs = facts.needs
        settings = facts.forward
        gate_scaling, up_scaling, down_scaling = settings.scalings
        gate = Projection(gate_weight, gate_bias, gate_A, gate_B, gate_scaling)
        up = Projection(up_weight, up_bias, up_A, up_B, up_scaling)
        down = Projection(down_weight, down_bias, down_A, down_B, down_scaling)
        if settings.layouts:
            gate, up, down = with_stored((gate, up, down), scales, settings.layouts)
        of_gate, of_up, of_down = _forward(facts, as_matrix(x), gate, up, down)
        reads_mask = needs.x or needs.thin_a
        ctx.save_for_backward(
            x if needs.thin_a else None,
            of_gate.y,
            of_up.y,
            *of_gate.saved(gate_weight if needs.x else None, needs.thin_b, reads_mask),
            *of_up.saved(up_weight if needs.x else None, needs.thin_b, reads_mask),
            *of_down.saved(down_weight if needs.h else None, needs.down_b, needs.h or needs.down_a),
            *scales,
        )
        ctx.facts = facts
        ctx.scalings = (of_gate.p.scaling, of_up.p.scaling, of_down.p.scaling)
        return like_rows_of(of_down.y, x)

    @staticmethod
    @first_derivative
    def backward(ctx: _MLPContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        facts = ctx.facts
        needs = facts.needs
        gate_scaling, up_scaling, down_scaling = ctx.scalings
        x, g, u, *saved = ctx.saved_tensors
        assert g is not None and u is not None
        of_gate = Saved(*saved[:5])
        of_up = Saved(*saved[5:10])
        of_down = Saved(*saved[10:15])
        gate = of_gate.as_projection(gate_scaling)
        up = of_up.as_projection(up_scaling)
        down = of_down.as_projection(down_scaling)
        if facts.backward.layouts:
            scales = [scale for scale in saved[15:] if scale is not None]
            gate, up, down = with_stored((gate, up, down), scales, facts.backward.layouts)
        # act(G), and H for down's dA.
        activation = ACTIVATIONS[facts.options.activation]
        a = activation.forward(g)
        h = a * u if needs.down_a else None
        gradients_of_down = _down_gradients(facts, h, dy, down, of_down)
        del h
        dh = gradients_of_down.dx
        if dh is None:
            return _gradients_by_argument(facts, None, _NONE, _NONE, gradients_of_down)
        du = a.mul_(dh)
        dg = _activation_backward(activation, dh.mul_(u), g)
        rows = None if x is None else as_matrix(x)
        gate_gradients, up_gradients = _gate_up_gradients(
            facts, rows, dg, du, (gate, up), (of_gate, of_up)
        )
        dx = up_gradients.dx
        if dx is not None:
            dx = like_rows_of(cast(dx, dy.dtype), dy)
        return _gradients_by_argument(facts, dx, gate_gradients, up_gradients, gradients_of_down)


_NONE = Gradients(None, None, None)
_apply_known = apply_of_known_calls(_LoRAMLP)


def _down_gradients(
    facts: MLPFacts, h: Tensor | None, dy: Tensor, down: Projection, saved: Saved
) -> Gradients:
    """dH, and the gradients of down's A and B, for dY [..., N] and H [M, F]."""
    needs = facts.needs
    grad = with_own_memory(as_matrix(dy))
    mask = None
    if needs.h or needs.down_a:
        assert down.lora_A is not None
        shape = (grad.shape[0], down.lora_A.shape[1])
        mask = drawn_again(saved.recipe, shape, facts.options.dropout_p)
    wanted = Wanted(needs.h, needs.down_a, needs.down_b)
    gradients = gradients_of(h, grad, down, saved.s, mask, facts.lora_dtype, wanted)
    if gradients.dx is None:
        return gradients
    return gradients._replace(dx=cast(gradients.dx, grad.dtype))


def _gate_up_gradients(
    facts: MLPFacts,
    x: Tensor | None,
    dg: Tensor,
    du: Tensor,
    projections: tuple[Projection, Projection],
    saved: tuple[Saved, Saved],
) -> tuple[Gradients, Gradients]:
    """The gradients of gate's and up's A and B, for x [M, K], dG and dU [M, F]. Up's dX is that of
    both.
    """
    needs = facts.needs
    gate, up = projections
    gate_mask = None
    up_mask = None
    if needs.x or needs.thin_a:
        assert gate.lora_A is not None
        shape = (dg.shape[0], gate.lora_A.shape[1])
        gate_mask = drawn_again(saved[0].recipe, shape, facts.options.dropout_p)
        up_mask = gate_mask
        if not facts.options.shared_mask:
            up_mask = drawn_again(saved[1].recipe, shape, facts.options.dropout_p)
    wanted = Wanted(needs.x, needs.thin_a, needs.thin_b)
    of_gate = gradients_of(x, dg, gate, saved[0].s, gate_mask, facts.lora_dtype, wanted)
    of_up = gradients_of(x, du, up, saved[1].s, up_mask, facts.lora_dtype, wanted, of_gate.dx)
    return of_gate, of_up


def _gradients_by_argument(
    facts: MLPFacts, dx: Tensor | None, gate: Gradients, up: Gradients, down: Gradients
) -> tuple[Tensor | None, ...]:
    """Those of the arguments of ``_LoRAMLP.forward``; None for a tensor that does not require its
    own.
    """
    needs = facts.needs
    return (
        None,
        dx,
        None,
        None,
        gate.da if needs.a[0] else None,
        gate.db if needs.b[0] else None,
        None,
        None,
        up.da if needs.a[1] else None,
        up.db if needs.b[1] else None,
        None,
        None,
        down.da,
        down.db,
        *[None] * facts.scale_count,
    )


def _activation_backward(activation: Activation, dh: Tensor, g: Tensor) -> Tensor:
    """dG for dH ∘ U, in its memory where that can be."""
    # allow_mutation_on_saved_tensors(), for one, knows outputs by the name "out" alone.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return activation.backward(dh, g)
    return activation.backward(dh, g, grad_input=dh)


def lora_mlp_torch(
    facts: MLPFacts, is_known: bool, x: Tensor, projections: Sequence[Projection]
) -> Tensor:
    """The output of gate, up and down. ``is_known``: whether the call has a key."""
    if facts.strategy == "without gradients":
        of_down = _forward(facts, as_matrix(x), *projections)[2]
        return like_rows_of(of_down.y, x)
    tensors = [*operands_of(projections), *scales_of(projections, facts.forward.layouts)]
    if torch.compiler.is_compiling():
        tensors = distinct(tensors)
    apply: Callable[..., Any] = _apply_known if is_known else _LoRAMLP.apply
    y: Tensor = apply(facts, x, *tensors)
    return y
