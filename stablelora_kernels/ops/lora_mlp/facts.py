"""What follows from the key of a call of ``lora_mlp``: how it is computed, and which gradients it
needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch import problem
from stablelora_kernels.dispatch.tallies import Tally
from stablelora_kernels.ops.cpu_products import is_few
from stablelora_kernels.ops.dropout import scalings_after_dropout
from stablelora_kernels.ops.lora_mlp.call import (
    MLPBackwardSettings,
    MLPForwardSettings,
    OfThree,
)
from stablelora_kernels.ops.matrices import row_count
from stablelora_kernels.ops.plans import Entry
from stablelora_kernels.projection import Projection, layouts_of, scales_of


class Options(NamedTuple):
    """The arguments of an MLP's call that are no tensors."""

    activation: str
    dropout_p: float
    backend: str
    # Whether gate and up share A, and so its mask.
    shared_mask: bool


class Needs(NamedTuple):
    """Whether gradients are required: of x, and of gate's, up's and down's A and B."""

    x: bool
    a: OfThree
    b: OfThree

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

    @property
    def down_a(self) -> bool:
        return self.a[2]

    @property
    def down_b(self) -> bool:
        return self.b[2]


class MLPFacts(NamedTuple):
    """What follows from the key of a call."""

    # "one by one", "with gradients" or "without gradients".
    strategy: str
    options: Options
    scale_count: int
    needs: Needs
    # Of A and B.
    lora_dtype: torch.dtype
    forward: MLPForwardSettings
    backward: MLPBackwardSettings
    # "one by one": the projections' own entries.
    members: Sequence[Entry | None]
    # Of calls on the PyTorch path that have a key.
    tally: Tally | None = None


def facts_of(x: Tensor, projections: Sequence[Projection], options: Options) -> MLPFacts:
    """What follows from the layouts and settings of a call, computed once for each key."""
    dropout_p = options.dropout_p
    needs = _needs_of(x, projections)
    strategy = _strategy_of(x, projections, options, needs)
    scalings = tuple([p.scaling for p in projections])
    if options.backend == "triton":
        scalings = scalings_after_dropout(scalings, dropout_p)
    lora_dtypes = [p.lora_A.dtype for p in projections if p.lora_A is not None]
    layouts = layouts_of(projections)
    reads_gate_mask = needs.x or needs.thin_a
    reads_mask = (
        reads_gate_mask,
        reads_gate_mask and not options.shared_mask,
        needs.h or needs.down_a,
    )
    stores_gate, stores_up, stores_down = [
        dropout_p > 0 and p.lora_A is not None and is_read
        for p, is_read in zip(projections, reads_mask, strict=True)
    ]
    return MLPFacts(
        strategy=strategy,
        options=options,
        scale_count=len(scales_of(projections, layouts)),
        needs=needs,
        lora_dtype=lora_dtypes[0] if lora_dtypes else x.dtype,
        forward=MLPForwardSettings(
            layouts,
            scalings,
            dropout_p,
            options.activation,
            save=True,
            stores_mask=(stores_gate, stores_up, stores_down),
        ),
        backward=MLPBackwardSettings(
            layouts, scalings, dropout_p, options.activation, needs.x, needs.a, needs.b
        ),
        members=[Entry(options.backend) for _ in projections if strategy == "one by one"],
    )


def _needs_of(x: Tensor, projections: Sequence[Projection]) -> Needs:
    """Which gradients the call's backward computes."""

    def is_needed(t: Tensor | None) -> bool:
        return torch.is_grad_enabled() and t is not None and t.requires_grad

    gate, up, down = projections
    return Needs(
        x=is_needed(x),
        a=(is_needed(gate.lora_A), is_needed(up.lora_A), is_needed(down.lora_A)),
        b=(is_needed(gate.lora_B), is_needed(up.lora_B), is_needed(down.lora_B)),
    )


def _strategy_of(
    x: Tensor, projections: Sequence[Projection], options: Options, needs: Needs
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
    return "with gradients" if needs.h or needs.down_a or needs.down_b else "without gradients"


def _differ(of_gate: Tensor | None, of_up: Tensor | None) -> bool:
    """Whether one of two requires a gradient and the other does not."""
    if of_gate is None or of_up is None:
        return False
    return of_gate.requires_grad != of_up.requires_grad
