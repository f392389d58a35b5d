"""A gated MLP with LoRA in one autograd node: gate, up, activation and down. ``reference/lora.py``
has the formulas.

    forward   G = gate(X)   U = up(X)   H = act(G) ∘ U   Y = down(H)
    backward  dH = dX of down, for dY   dG = dH ∘ U ∘ act'(G)   dU = dH ∘ act(G)   then gate's and up's gradients for them

Autograd saves X, G, U and each S; ``tiled.py`` saves X alone. Backward computes H and act(G) again where it needs them. The
kernels keep dropout's masks, and so does the PyTorch path if they are positions or small
(``ops/dropout.py``); it draws others again from the state of torch's generator, where that can be
read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from stablelora_kernels.activations import ACTIVATIONS
from stablelora_kernels.dispatch.first_use import is_on
from stablelora_kernels.ops.autograd import (
    Context,
    apply_of_known_calls,
    distinct,
    first_derivative,
)
from stablelora_kernels.ops.dropout import draw_dropout, draw_seeds, masked
from stablelora_kernels.ops.lora_linear.autograd import lora_linear_op
from stablelora_kernels.ops.lora_mlp.backends import BACKENDS
from stablelora_kernels.ops.lora_mlp.call import (
    MLPBackwardCall,
    MLPFacts,
    MLPForwardCall,
    MLPForwardResults,
    Options,
    facts_of,
    if_needed,
)
from stablelora_kernels.ops.lora_mlp.tiled import first_tile, lora_mlp_tiled
from stablelora_kernels.ops.lora_mlp.triton import lora_mlp_fwd
from stablelora_kernels.ops.matrices import as_matrix
from stablelora_kernels.ops.plans import Entry, tally_of_operators
from stablelora_kernels.projection import (
    LORA_AS,
    LORA_BS,
    OPERANDS,
    Projection,
    operands_of,
    scales_of,
)
from stablelora_kernels.quantized import as_plain

# The operands of gate, up and down.
_OPERAND_COUNT = 3 * OPERANDS


def _forward(
    facts: MLPFacts,
    entry: Entry | None,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    save: bool,
) -> MLPForwardResults:
    """For x [..., K] and ``tensors`` as :class:`_LoRAMLP` takes them."""
    settings = facts.forward
    if not save:
        settings = settings._replace(save=False, stores_mask=(False, False, False))
    return BACKENDS[facts.options.backend].forward(entry, [x, *tensors], settings)


def _draw_seeds(
    device: torch.device, projections: Sequence[Projection], options: Options
) -> list[Tensor | None]:
    """Gate's, up's and down's seed, None without a branch; up's is gate's for a shared mask."""
    dropout_ps = [0.0 if p.lora_A is None else options.dropout_p for p in projections]
    if options.shared_mask:
        dropout_ps[1] = 0.0
    seeds = draw_seeds(device, dropout_ps)
    if options.shared_mask:
        seeds[1] = seeds[0]
    return seeds


class _MLPContext(Context, Protocol):
    facts: MLPFacts


class _LoRAMLP(torch.autograd.Function):
    """``tensors``: the operands of gate, up and down, then all scales, and gate's, up's and down's
    seed. Weights and biases get no gradient.
    """

    @staticmethod
    def forward(
        ctx: _MLPContext, entry: Entry | None, facts: MLPFacts, x: Tensor, *tensors: Tensor
    ) -> Tensor:
        results = _forward(facts, entry, x, tensors, save=True)
        call = MLPForwardCall.of([x, *tensors], facts.forward)
        ctx.save_for_backward(*MLPBackwardCall.tensors_behind_grad(call, results, facts.backward))
        ctx.facts = facts
        return results.y

    @staticmethod
    @first_derivative
    def backward(ctx: _MLPContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        facts = ctx.facts
        needs = facts.backward
        backward = BACKENDS[facts.options.backend].backward
        gradients = backward(None, [grad, *ctx.saved_tensors], needs)
        of_operands: list[Tensor | None] = [None] * _OPERAND_COUNT
        of_operands[LORA_AS] = if_needed(gradients.das, needs.need_a)
        of_operands[LORA_BS] = if_needed(gradients.dbs, needs.need_b)
        dx = gradients.dx if needs.need_x else None
        # Neither the scales nor the three seeds have one.
        without_gradient = facts.scale_count + 3
        return (None, None, dx, *of_operands, *[None] * without_gradient)


_apply_known = apply_of_known_calls(_LoRAMLP)


def lora_mlp_op(
    x: Tensor, projections: Sequence[Projection], options: Options, entry: Entry | None = None
) -> Tensor:
    """``functional.lora_mlp`` with checked arguments and a chosen backend. ``entry``: that of the
    call's key.
    """
    facts: MLPFacts | None = None if entry is None else entry.facts
    if facts is None:
        facts = facts_of(x, projections, options)
        if entry is not None:
            if _prefers_operators(facts, x, projections):
                facts = facts_of(x, projections, options._replace(backend="torch"))
            if facts.options.backend == "torch" and facts.strategy != "one by one":
                facts = facts._replace(tally=tally_of_operators("lora_mlp", x.device))
            entry.facts = facts
    seeds: list[Tensor | None] = [None, None, None]
    if facts.options.backend == "triton" and not facts.tile_rows:
        # For every strategy, as ``lora_linear_op`` does.
        seeds = _draw_seeds(x.device, projections, options)
    if facts.strategy == "one by one":
        # An entry also says that the call is not traced.
        members = [None, None, None] if entry is None else facts.members
        return _one_by_one(x, projections, facts.options, members, seeds)
    if facts.tally is not None:
        facts.tally.calls += 1
    scales = scales_of(projections, facts.forward.layouts)
    if facts.tile_rows:
        return lora_mlp_tiled(facts, x, [*operands_of(projections), *scales])
    tensors = [*operands_of(projections), *scales, *seeds]
    if facts.strategy == "without gradients":
        return _forward(facts, entry, x, tensors, save=False).y
    if torch.compiler.is_compiling():
        tensors = distinct(tensors)
    apply: Callable[..., Any] = _LoRAMLP.apply if entry is None else _apply_known
    y: Tensor = apply(entry, facts, x, *tensors)
    return y


def _prefers_operators(facts: MLPFacts, x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether first use has found that the PyTorch path should take the call."""
    is_alone = facts.strategy == "one by one"
    if facts.options.backend == "torch" or is_alone or not is_on(x.device):
        return False
    tensors = [*operands_of(projections), *scales_of(projections, facts.forward.layouts)]
    if facts.tile_rows:
        x = first_tile(as_matrix(x), facts.tile_rows)
    return lora_mlp_fwd.prefers_operators([x, *tensors, None, None, None], facts.forward)


def _one_by_one(
    x: Tensor,
    projections: Sequence[Projection],
    options: Options,
    entries: Sequence[Entry | None],
    seeds: Sequence[Tensor | None],
) -> Tensor:
    """Each projection by an op of its own, and the activation by PyTorch's operators. ``seeds``:
    those of the masks on Triton.
    """
    gate, up, down = projections
    if options.shared_mask and options.dropout_p:
        g, u = _with_shared_mask(x, [gate, up], options, entries[:2])
    else:
        g = _alone(x, gate, options, entries[0], seeds[0])
        u = _alone(x, up, options, entries[1], seeds[1])
    h = ACTIVATIONS[options.activation].forward(g) * u
    return _alone(h, down, options, entries[2], seeds[2])


def _alone(
    x: Tensor, p: Projection, options: Options, entry: Entry | None, seed: Tensor | None
) -> Tensor:
    """One projection, with or without a branch."""
    if p.lora_A is not None:
        return lora_linear_op(x, (p,), None, options.dropout_p, options.backend, entry, [seed])[0]
    if isinstance(p.weight, Tensor):
        return linear(x, p.weight, p.bias)
    assert p.weight is not None
    # The op saves what is stored, where PyTorch's autograd would save all of W. Its branch is of
    # zeros.
    n, k = p.weight.shape
    with_zeros = p._replace(lora_A=x.new_zeros(1, k), lora_B=x.new_zeros(n, 1), scaling=0.0)
    return lora_linear_op(x, (with_zeros,), None, 0.0, options.backend, entry)[0]


def _with_shared_mask(
    x: Tensor, projections: Sequence[Projection], options: Options, entries: Sequence[Entry | None]
) -> list[Tensor]:
    """G and U, whose branches read one masked X."""
    keep, scale = draw_dropout(x, options.dropout_p, 1.0)
    dropped = masked(x, keep)
    outputs: list[Tensor] = []
    for p, entry in zip(projections, entries, strict=True):
        assert p.weight is not None
        base = linear(x, as_plain(p.weight, x.dtype), p.bias)
        branch = Projection(None, None, p.lora_A, p.lora_B, p.scaling * scale)
        outputs += lora_linear_op(dropped, (branch,), base, 0.0, options.backend, entry)
    return outputs
