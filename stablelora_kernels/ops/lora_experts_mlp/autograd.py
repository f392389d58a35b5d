"""A module of experts in one autograd node: the stacks up and down, the gate between them, and the
routing weights.

    G_e = up(X_e)    H_e = gate(G_e)    Z_e = w ∘ H_e    Y[tokens of e] += down(Z_e) + w bias
    dZ_e = dX of down, for dY_e = dY[tokens of e]        dw = Σ dZ_e ∘ H_e + Σ dY_e ∘ bias
    dG_e = the gate's gradient, for w ∘ dZ_e             dX[tokens of e] += dX of up, for dG_e

A slot is a token's choice of an expert, a row of X_e, G_e, H_e and Z_e. The gate is any function
of rows; backward runs it again, under autograd.

In tiles of tokens autograd saves x, the routing and dropout's seeds alone, and backward computes G
again. Otherwise it saves x [T, H] by tokens, G [slots, 2 I], up's S [slots, r], the routing and dropout's
recipes (``ops/dropout.py``). Backward gathers X_e and computes H_e, Z_e and down's S again. The
routing weight multiplies H, not down's output, so that its gradient needs no output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stablelora_kernels.ops.autograd import Context, first_derivative, keep
from stablelora_kernels.ops.cpu_products import without_autocast
from stablelora_kernels.ops.dropout import draw_for_backward, draw_from, drawn_again
from stablelora_kernels.ops.formulas import Wanted
from stablelora_kernels.ops.lora_experts.call import ExpertStack, StackSettings
from stablelora_kernels.ops.lora_experts_mlp.blocks import blocks_backward, blocks_forward
from stablelora_kernels.ops.lora_experts_mlp.call import (
    ExpertsMLPBackwardCall,
    ExpertsMLPForwardCall,
    ExpertsMLPForwardResults,
    ExpertsMLPGradients,
    ExpertsMLPWanted,
    Gate,
    Routing,
    sum_dtype,
)
from stablelora_kernels.ops.lora_experts_mlp.together import together_backward, together_forward
from stablelora_kernels.ops.lora_mlp.call import TILE_BYTES
from stablelora_kernels.ops.matrices import row_tile_count, row_tiles
from stablelora_kernels.utils.tensors import cast


def _is_by_blocks(x: Tensor) -> bool:
    """Whether a block of experts is computed at a time, which needs the offsets on the host."""
    return x.device.type == "cpu"


def _drawn(x: Tensor, routing: Routing, stack: ExpertStack) -> tuple[ExpertStack, Tensor | None]:
    """A stack with s' and dropout's mask of all slots, and what draws the mask again."""
    if stack.dropout_p == 0.0 or stack.rank == 0:
        return stack, None
    # Only the shape and the device are read.
    rows = x.new_empty(1, 1).expand(routing.slots, stack.in_features)
    drawn = draw_for_backward(rows, stack.dropout_p)
    stack = stack._replace(scaling=stack.scaling * drawn.scale, keep=drawn.mask)
    return stack, drawn.recipe


def _drawn_again(routing: Routing, stack: ExpertStack) -> ExpertStack:
    """A saved stack, with dropout's mask of all slots."""
    shape = (routing.slots, stack.in_features)
    return stack._replace(keep=drawn_again(stack.keep, shape, stack.dropout_p))


class _MLPContext(Context, Protocol):
    gate: Gate
    up: StackSettings
    down: StackSettings
    # How many tensors up's stack has.
    up_count: int


class _LoRAExpertsMLP(torch.autograd.Function):
    """Gradients of x, the routing weights, and the A and B of both stacks, which are ``call``'s.

    ``up_recipe`` and ``down_recipe`` draw the stacks' masks again.
    """

    @staticmethod
    def forward(
        ctx: _MLPContext,
        x: Tensor,
        weights: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        down_a: Tensor,
        down_b: Tensor,
        call: ExpertsMLPForwardCall,
        up_recipe: Tensor | None,
        down_recipe: Tensor | None,
    ) -> Tensor:
        wanted = _wanted(ctx)
        results = _forward(call)
        up = _read_by_backward(call.up, up_recipe, wanted.up)
        down = _read_by_backward(call.down, down_recipe, wanted.down)
        # Save only what backward reads, as ExpertsMLPBackwardCall's tensors.
        ctx.save_for_backward(
            x if wanted.up.a else None,
            results.gate_up,
            results.s if wanted.up.b else None,
            *call.routing,
            call.down.bias if wanted.weights else None,
            *up,
            *down,
        )
        ctx.gate = call.gate
        ctx.up = call.up.settings
        ctx.down = call.down.settings
        ctx.up_count = len(up)
        return results.y

    @staticmethod
    @first_derivative
    def backward(ctx: _MLPContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved: Sequence[Any] = ctx.saved_tensors
        x, gate_up, s, order, offsets, weights, bias, *stacks = saved
        routing = Routing(order, offsets, weights)
        up = ExpertStack.of(stacks[: ctx.up_count], ctx.up)
        down = ExpertStack.of(stacks[ctx.up_count :], ctx.down, bias)
        call = ExpertsMLPBackwardCall(
            x,
            grad,
            gate_up,
            s,
            routing,
            ctx.gate,
            _drawn_again(routing, up),
            _drawn_again(routing, down),
            _wanted(ctx),
        )
        gradients = _backward(call)
        dx = gradients.up.dx
        dweights = gradients.weights
        if dweights is not None:
            dweights = routing.by_token(dweights).to(weights.dtype)
        return (
            None if dx is None else dx.to(grad.dtype),
            dweights,
            gradients.up.da,
            gradients.up.db,
            gradients.down.da,
            gradients.down.db,
            None,
            None,
            None,
        )


def _wanted(ctx: Context) -> ExpertsMLPWanted:
    """By the places of the arguments of :class:`_LoRAExpertsMLP`."""
    x, weights, up_a, up_b, down_a, down_b = ctx.needs_input_grad[:6]
    up = Wanted(x, up_a, up_b)
    return ExpertsMLPWanted(weights, up, Wanted(True in up or weights, down_a, down_b))


def _read_by_backward(
    stack: ExpertStack, recipe: Tensor | None, wanted: Wanted
) -> list[Tensor | None]:
    """The stack's tensors that backward reads."""
    weight = stack.weight if wanted.x else None
    return stack._replace(weight=weight, keep=recipe).tensors()


def _forward(call: ExpertsMLPForwardCall) -> ExpertsMLPForwardResults:
    return (blocks_forward if _is_by_blocks(call.x) else together_forward)(call)


def _backward(call: ExpertsMLPBackwardCall) -> ExpertsMLPGradients:
    return (blocks_backward if _is_by_blocks(call.grad) else together_backward)(call)


class _TilesSettings(NamedTuple):
    """What of a call in tiles is no tensor."""

    gate: Gate
    up: StackSettings
    down: StackSettings
    # How many tensors up's stack has.
    up_count: int
    # The most tokens of a tile.
    tokens: int


class _Tiles(NamedTuple):
    """A call in tiles of tokens."""

    routing: Routing
    gate: Gate
    # Their scalings are s, and they have no mask.
    up: ExpertStack
    down: ExpertStack
    # Of up's and down's mask in each tile, int64 [tiles, 2, 2]; None without dropout.
    seeds: Tensor | None
    # The most of a tile.
    tokens: int

    @property
    def settings(self) -> _TilesSettings:
        up_count = len(self.up.tensors())
        return _TilesSettings(
            self.gate, self.up.settings, self.down.settings, up_count, self.tokens
        )

    def tensors(self) -> list[Tensor | None]:
        """What backward reads beside x, in the order of :meth:`of`."""
        stacks = [*self.up.tensors(), *self.down.tensors()]
        return [*self.routing, self.seeds, self.up.bias, self.down.bias, *stacks]

    @staticmethod
    def of(tensors: Sequence[Any], settings: _TilesSettings) -> _Tiles:
        """The call that :meth:`tensors` and :attr:`settings` have taken apart."""
        order, offsets, weights, seeds, up_bias, down_bias, *stacks = tensors
        return _Tiles(
            Routing(order, offsets, weights),
            settings.gate,
            ExpertStack.of(stacks[: settings.up_count], settings.up, up_bias),
            ExpertStack.of(stacks[settings.up_count :], settings.down, down_bias),
            seeds,
            settings.tokens,
        )

    def each(self, x: Tensor) -> Iterator[tuple[slice, ExpertsMLPForwardCall]]:
        """The tokens of each tile, and its call."""
        for tile in row_tiles(x.shape[0], self.tokens):
            is_all = tile.rows == slice(0, x.shape[0])
            routing = self.routing if is_all else self.routing.of_tokens(tile.rows)
            up = self.up
            down = self.down
            if self.seeds is not None:
                of_up, of_down = self.seeds[tile.number]
                up = _drawn_from(of_up, routing, up)
                down = _drawn_from(of_down, routing, down)
            yield (
                tile.rows,
                ExpertsMLPForwardCall(x[tile.rows], routing, self.gate, up, down, save=False),
            )


def _drawn_from(seed: Tensor, routing: Routing, stack: ExpertStack) -> ExpertStack:
    """A stack with s' and the mask of all slots that ``seed`` gives."""
    if stack.dropout_p == 0.0 or stack.rank == 0:
        return stack
    rows = stack.lora_A.new_empty(1, 1).expand(routing.slots, stack.in_features)
    drawn = draw_from(rows, stack.dropout_p, seed)
    return stack._replace(scaling=stack.scaling * drawn.scale, keep=drawn.mask)


class _TiledContext(Context, Protocol):
    settings: _TilesSettings
    # The node that has saved the tensors; None if this one has.
    keeper: Any


class _TiledLoRAExpertsMLP(torch.autograd.Function):
    """As :class:`_LoRAExpertsMLP`, of which autograd keeps x alone."""

    @staticmethod
    def forward(
        ctx: _TiledContext,
        x: Tensor,
        weights: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        down_a: Tensor,
        down_b: Tensor,
        tiles: _Tiles,
        keeper: Any,
    ) -> Tensor:
        if keeper is None:
            ctx.save_for_backward(x, *tiles.tensors())
        ctx.settings = tiles.settings
        ctx.keeper = keeper
        return _tiled_forward(x, tiles)

    @staticmethod
    @first_derivative
    def backward(ctx: _TiledContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved: Sequence[Any] = (ctx.keeper or ctx).saved_tensors
        x, *tensors = saved
        return (
            *_tiled_gradients(x, grad, _Tiles.of(tensors, ctx.settings), _wanted(ctx)),
            None,
            None,
        )


def _tiled_forward(x: Tensor, tiles: _Tiles) -> Tensor:
    """Y [T, N]."""
    y = x.new_empty(x.shape[0], tiles.down.out_features)
    for tokens, call in tiles.each(x):
        y[tokens] = _forward(call).y
    return y


def _tiled_gradients(
    x: Tensor, grad: Tensor, tiles: _Tiles, wanted: ExpertsMLPWanted
) -> list[Tensor | None]:
    """Those of x, the routing weights, and up's and down's A and B."""
    pairs = (tiles.up.lora_A, tiles.up.lora_B, tiles.down.lora_A, tiles.down.lora_B)
    wanted_pairs = (wanted.up.a, wanted.up.b, wanted.down.a, wanted.down.b)
    dx = x.new_empty(x.shape) if wanted.up.x else None
    routing_weights = tiles.routing.weights
    dweights = torch.empty_like(routing_weights) if wanted.weights else None
    # In float32, so that sums over tiles are rounded once.
    tiles = tiles._replace(up=_in_float32(tiles.up), down=_in_float32(tiles.down))
    sums = [
        torch.zeros_like(t, dtype=sum_dtype(t.dtype)) if is_wanted else None
        for t, is_wanted in zip(pairs, wanted_pairs, strict=True)
    ]
    for tokens, call in tiles.each(x):
        of_tile = _backward(
            ExpertsMLPBackwardCall(
                call.x,
                grad[tokens],
                None,
                None,
                call.routing,
                call.gate,
                call.up,
                call.down,
                wanted,
            )
        )
        if dx is not None:
            assert of_tile.up.dx is not None
            dx[tokens] = of_tile.up.dx
        if dweights is not None:
            assert of_tile.weights is not None
            dweights[tokens] = call.routing.by_token(of_tile.weights)
        parts = (of_tile.up.da, of_tile.up.db, of_tile.down.da, of_tile.down.db)
        for total, part in zip(sums, parts, strict=True):
            if total is not None and part is not None:
                total += part
    gradients = [cast(total, t.dtype) for total, t in zip(sums, pairs, strict=True)]
    return [dx, dweights, *gradients]


def _in_float32(stack: ExpertStack) -> ExpertStack:
    """``stack`` with A and B in float32, unless they are float64."""
    dtype = sum_dtype(stack.lora_A.dtype)
    return stack._replace(lora_A=stack.lora_A.to(dtype), lora_B=stack.lora_B.to(dtype))


def _tokens_of_tile(x: Tensor, routing: Routing, up: ExpertStack, tiled: bool | int) -> int:
    """The most tokens of a tile: ``tiled``, or where that is True, as TILE_BYTES allow."""
    if tiled is not True:
        return tiled
    if _is_by_blocks(x):
        # A block of experts is a tile already, and needs no packed expert twice.
        return max(1, x.shape[0])
    top_k = routing.weights.shape[1]
    # G and its gradient; H, Z and their gradients, which are half as wide; and X and dX by slots.
    width = 4 * up.out_features + 2 * up.in_features
    return max(1, TILE_BYTES["cuda"] // (width * max(1, top_k) * x.element_size()))


def _tiled_op(
    x: Tensor,
    routing: Routing,
    gate: Gate,
    up: ExpertStack,
    down: ExpertStack,
    tiled: bool | int,
) -> Tensor:
    """As :func:`lora_experts_mlp_op`."""
    tokens = _tokens_of_tile(x, routing, up, tiled)
    seeds = None
    if any(stack.dropout_p and stack.rank for stack in (up, down)):
        count = row_tile_count(x.shape[0], tokens)
        # PyTorch's generators take a seed from the host.
        seeds = torch.randint(2**63 - 1, (count, 2, 2), device="cpu")
    tiles = _Tiles(routing, gate, up, down, seeds, tokens)
    inputs = (x, routing.weights, up.lora_A, up.lora_B, down.lora_A, down.lora_B)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
        return _tiled_forward(x, tiles)
    kept = keep(x, tiles.tensors())
    y: Tensor = _TiledLoRAExpertsMLP.apply(kept.x, *inputs[1:], tiles, kept.node)  # type: ignore[no-untyped-call]
    return y


def lora_experts_mlp_op(
    x: Tensor,
    routing: Routing,
    gate: Gate,
    up: ExpertStack,
    down: ExpertStack,
    tiled: bool | int = False,
) -> Tensor:
    """Y [T, N] of x [T, H], for checked arguments: ``down(w ∘ gate(up(x)))``, summed over each
    token's slots, in x's dtype.

    A slot of no expert here adds nothing, and its routing weight's gradient is zero. ``tiled``: keep
    x alone; a number is how many tokens a tile has.
    """
    # Autocast would cast what the gate computes, which backward repeats outside of it.
    with without_autocast(x):
        if tiled:
            return _tiled_op(x, routing, gate, up, down, tiled)
        up, up_recipe = _drawn(x, routing, up)
        down, down_recipe = _drawn(x, routing, down)
        call = ExpertsMLPForwardCall(x, routing, gate, up, down, save=False)
        inputs = (x, routing.weights, up.lora_A, up.lora_B, down.lora_A, down.lora_B)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
            return _forward(call).y
        call = call._replace(save=True)
        y: Tensor = _LoRAExpertsMLP.apply(*inputs, call, up_recipe, down_recipe)  # type: ignore[no-untyped-call]
        return y
