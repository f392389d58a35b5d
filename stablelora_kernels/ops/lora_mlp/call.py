"""The records of ``lora_mlp``: the arguments and the results of its forward and its backward, and what
follows from the key of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch import problem
from stablelora_kernels.dispatch.tallies import Tally
from stablelora_kernels.ops.autograd import read_by_backward
from stablelora_kernels.ops.cpu_products import is_few
from stablelora_kernels.ops.dropout import scalings_after_dropout
from stablelora_kernels.ops.formulas import Wanted
from stablelora_kernels.ops.matrices import row_count
from stablelora_kernels.ops.plans import Entry
from stablelora_kernels.projection import (
    OPERANDS,
    WEIGHTS,
    Projection,
    layouts_of,
    scale_count_of,
    scales_of,
    split,
)

# For gate, up and down.
OfThree = tuple[bool, bool, bool]
# Where each is among three projections.
GATE, UP, DOWN = range(3)
# The most memory of a tile's tensors of F columns by the device's type. A CPU's tile should be in its
# caches for the most part, and a GPU's should have rows for all of its processors.
TILE_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
# G, U, dG, dU, and H or act(G).
WIDE_TENSORS = 5
# A tile's rows are a multiple of so many.
TILE_ALIGNMENT = 128


class MLPForwardSettings(NamedTuple):
    """The arguments of ``lora_mlp_fwd`` that are no tensors."""

    layouts: tuple[int, ...]
    # s'.
    scalings: tuple[float, ...]
    dropout_p: float
    activation: str
    # Whether Y is a result.
    output: bool
    # Whether what backward needs is.
    save: bool
    # Whether gate's, up's and down's mask is stored.
    stores_mask: OfThree
    # Whether gate and up share A, and so its mask.
    shared_mask: bool


class MLPForwardCall(NamedTuple):
    """The arguments of ``lora_mlp_fwd``."""

    x: Tensor
    # ``projection.operands_of`` and ``scales_of`` of gate, up and down.
    operands: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    # None without dropout.
    seeds: Sequence[Tensor | None]
    settings: MLPForwardSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: MLPForwardSettings) -> MLPForwardCall:
        """The call of its tensors, one after another."""
        x, *others = tensors
        lengths = (3 * OPERANDS, scale_count_of(settings.layouts), 3)
        operands, scales, seeds = split(others, lengths)
        return MLPForwardCall(x, operands, scales, seeds, settings)


class MLPForwardResults(NamedTuple):
    """Y [..., N], and what backward needs of it; empty is what is no result."""

    y: Tensor
    # [..., F].
    g: Tensor
    u: Tensor
    # Gate's and up's, or one matrix that has both side by side.
    s: Sequence[Tensor]
    s_down: Tensor
    # Those that are stored; on the PyTorch path, what draws them again.
    masks: Sequence[Tensor]


class MLPBackwardSettings(NamedTuple):
    """The arguments of ``lora_mlp_bwd`` that are no tensors."""

    layouts: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout_p: float
    activation: str
    need_x: bool
    need_a: OfThree
    need_b: OfThree
    # As in MLPForwardSettings.
    shared_mask: bool

    @property
    def need_thin_a(self) -> bool:
        """Gate's or up's A."""
        return self.need_a[GATE] or self.need_a[UP]

    @property
    def need_thin_b(self) -> bool:
        """Gate's or up's B."""
        return self.need_b[GATE] or self.need_b[UP]

    @property
    def need_h(self) -> bool:
        """H, for any gradient but down's own."""
        return self.need_x or self.need_thin_a or self.need_thin_b

    def wanted(self, place: int) -> Wanted:
        """Of the projection at ``place``."""
        need_input = self.need_h if place == DOWN else self.need_x
        return Wanted(need_input, self.need_a[place], self.need_b[place])


class MLPBackwardCall(NamedTuple):
    """The arguments of ``lora_mlp_bwd``: dY [..., N] and what forward has saved. None is what no
    needed gradient reads.
    """

    grad: Tensor
    x: Tensor | None
    g: Tensor
    u: Tensor
    s_down: Tensor | None
    # As in MLPForwardResults; nothing if it is not needed.
    s: Sequence[Tensor]
    # Biases are None.
    operands: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    # Up's is None if it is gate's.
    masks: Sequence[Tensor | None]
    settings: MLPBackwardSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: MLPBackwardSettings) -> MLPBackwardCall:
        """The call of its tensors, one after another."""
        scale_count = scale_count_of(settings.layouts)
        s_count = len(tensors) - (5 + 3 * OPERANDS + scale_count + 3)
        lengths = (5, s_count, 3 * OPERANDS, scale_count, 3)
        singles, *lists = split(tensors, lengths)
        arguments: Any = (*singles, *lists, settings)
        return MLPBackwardCall(*arguments)

    @staticmethod
    def tensors_behind_grad(
        forward: MLPForwardCall, results: MLPForwardResults, needs: MLPBackwardSettings
    ) -> list[Tensor | None]:
        """A call's tensors behind the gradient, after a forward that has saved them."""
        gate, up, down = forward.operands[WEIGHTS]
        read = read_by_backward(forward.operands, weights=False)
        read[WEIGHTS] = [
            gate if needs.need_x else None,
            up if needs.need_x else None,
            down if needs.need_h else None,
        ]
        return [
            forward.x if needs.need_thin_a else None,
            results.g,
            results.u,
            results.s_down if needs.need_b[DOWN] else None,
            *(results.s if needs.need_thin_b else ()),
            *read,
            *forward.scales,
            *each_mask(results.masks, forward.settings.stores_mask),
        ]

    @property
    def every_mask(self) -> list[Tensor | None]:
        """Gate's, up's and down's, each of its own."""
        gate, up, down = self.masks
        return [gate, gate if self.settings.shared_mask else up, down]


class MLPBackwardResults(NamedTuple):
    """dX [..., K], and the dA and dB of gate, up and down. What is not needed is empty."""

    dx: Tensor
    das: Sequence[Tensor]
    dbs: Sequence[Tensor]


def with_branches(projections: Sequence[Projection], like: Tensor) -> list[Projection]:
    """``projections`` with an A and a B of rank 0 where there is no branch, on the device of
    ``like``.
    """
    dtypes = [p.lora_A.dtype for p in projections if p.lora_A is not None]
    dtype = dtypes[0] if dtypes else like.dtype
    return [p if p.lora_A is not None else _of_rank_0(p, like, dtype) for p in projections]


def _of_rank_0(p: Projection, like: Tensor, dtype: torch.dtype) -> Projection:
    # These sizes are never read where the weight is not read.
    n, k = (0, 0) if p.weight is None else p.weight.shape
    return p._replace(
        lora_A=torch.empty((0, k), dtype=dtype, device=like.device),
        lora_B=torch.empty((n, 0), dtype=dtype, device=like.device),
    )


def if_needed(gradients: Sequence[Tensor | None], needed: OfThree) -> list[Tensor | None]:
    """``gradients`` with None in place of those that are not needed."""
    return [
        gradient if is_needed else None
        for gradient, is_needed in zip(gradients, needed, strict=True)
    ]


def needed_like(
    tensors: Sequence[Tensor | None],
    needed: OfThree,
    new_like: Callable[..., Tensor],
    grad: Tensor,
) -> list[Tensor]:
    """Memory for the gradients of those ``tensors`` that are needed, as ``new_like`` makes it, and an
    empty tensor like ``grad`` for each other.
    """
    return [
        new_like(t, memory_format=torch.contiguous_format)
        if is_needed and t is not None
        else grad.new_empty(0)
        for t, is_needed in zip(tensors, needed, strict=True)
    ]


def each_mask(masks: Sequence[Tensor], is_stored: Sequence[bool]) -> list[Tensor | None]:
    """Gate's, up's and down's mask, of those that are stored."""
    stored = iter(masks)
    return [next(stored) if is_there else None for is_there in is_stored]


class Options(NamedTuple):
    """The arguments of an MLP's call that are no tensors."""

    activation: str
    dropout_p: float
    backend: str
    # Whether gate and up share A, and so its mask.
    shared_mask: bool
    # Whether autograd keeps x alone (``tiled.py``); a number is how many rows a tile has.
    tiled: bool | int = False


class MLPFacts(NamedTuple):
    """What follows from the key of a call."""

    # "one by one", "with gradients" or "without gradients".
    strategy: str
    options: Options
    scale_count: int
    forward: MLPForwardSettings
    backward: MLPBackwardSettings
    # How many rows a tile has at most; 0: there are no tiles.
    tile_rows: int
    # "one by one": the projections' own entries.
    members: Sequence[Entry | None]
    # Of calls on the PyTorch path that have a key.
    tally: Tally | None = None


def facts_of(x: Tensor, projections: Sequence[Projection], options: Options) -> MLPFacts:
    """What follows from the layouts and settings of a call, computed once for each key."""
    dropout_p = options.dropout_p
    layouts = layouts_of(projections)
    scalings = scalings_after_dropout([p.scaling for p in projections], dropout_p)
    backward = MLPBackwardSettings(
        layouts,
        scalings,
        dropout_p,
        options.activation,
        need_x=_is_needed(x),
        need_a=_are_needed([p.lora_A for p in projections]),
        need_b=_are_needed([p.lora_B for p in projections]),
        shared_mask=options.shared_mask,
    )
    strategy = _strategy_of(x, projections, options, backward)
    tile_rows = 0
    if options.tiled and strategy != "one by one":
        weight = projections[GATE].weight
        assert weight is not None
        tile_rows = rows_of_tile(x, weight.shape[0], options.tiled)
    return MLPFacts(
        strategy=strategy,
        options=options,
        scale_count=len(scales_of(projections, layouts)),
        forward=MLPForwardSettings(
            layouts,
            scalings,
            dropout_p,
            options.activation,
            output=True,
            save=True,
            stores_mask=stores_mask(backward, [p.lora_A for p in projections]),
            shared_mask=options.shared_mask,
        ),
        backward=backward,
        tile_rows=tile_rows,
        members=[Entry(options.backend) for _ in projections if strategy == "one by one"],
    )


def stores_mask(needs: MLPBackwardSettings, lora_As: Sequence[Tensor | None]) -> OfThree:
    """Whether forward stores the mask of gate, up and down, whose A are given."""
    reads_gate = needs.need_x or needs.need_thin_a
    reads_down = needs.need_h or needs.need_a[DOWN]
    gate, up, down = [needs.dropout_p > 0 and lora_A is not None for lora_A in lora_As]
    return gate and reads_gate, up and reads_gate and not needs.shared_mask, down and reads_down


def rows_of_tile(x: Tensor, inner: int, tiled: bool | int) -> int:
    """How many rows a tile of x [..., K] has at most for F ``inner`` columns: ``tiled``, or where that
    is True, as many as TILE_BYTES allow.
    """
    if tiled is not True:
        return tiled
    limit = TILE_BYTES.get(x.device.type, TILE_BYTES["cuda"])
    rows = limit // (WIDE_TENSORS * max(inner, 1) * x.element_size())
    return max(TILE_ALIGNMENT, rows // TILE_ALIGNMENT * TILE_ALIGNMENT)


def _is_needed(t: Tensor | None) -> bool:
    """Whether the call's backward computes the gradient of ``t``."""
    return torch.is_grad_enabled() and t is not None and t.requires_grad


def _are_needed(tensors: Sequence[Tensor | None]) -> OfThree:
    gate, up, down = map(_is_needed, tensors)
    return gate, up, down


def _strategy_of(
    x: Tensor, projections: Sequence[Projection], options: Options, needs: MLPBackwardSettings
) -> str:
    """See :class:`MLPFacts`."""
    gate, up, _down = projections
    plain = [p.weight for p in projections if isinstance(p.weight, Tensor)]
    if _differ(gate.lora_A, up.lora_A) or _differ(gate.lora_B, up.lora_B):
        return "one by one"
    if options.backend == "torch" and len(plain) == 3 and is_few(x, *plain):
        return "one by one"
    # Separate layers draw a shared mask by other means than the kernels, so that a checkpoint's
    # forward must take them too.
    draws_shared_mask = options.shared_mask and options.dropout_p > 0
    biases = [p.bias for p in projections if p.bias is not None]
    trains_base = any(t.requires_grad for t in (*plain, *biases))
    if trains_base and (torch.is_grad_enabled() or draws_shared_mask):
        return "one by one"
    # In-loop kernels read quantized weights without a copy.
    is_quantized = len(plain) < 3
    if (
        options.backend == "triton"
        and is_quantized
        and row_count(x) <= problem.IN_LOOP_M
        and not options.shared_mask
    ):
        return "one by one"
    trains = needs.need_h or needs.need_a[DOWN] or needs.need_b[DOWN]
    return "with gradients" if trains else "without gradients"


def _differ(of_gate: Tensor | None, of_up: Tensor | None) -> bool:
    """Whether one of two requires a gradient and the other does not."""
    if of_gate is None or of_up is None:
        return False
    return of_gate.requires_grad != of_up.requires_grad
