"""What the kernel of ``lora_linear_cross_entropy`` is proven against at its first use: the op's own
PyTorch path, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch.first_use import Kind, fault_at_first_use
from stablelora_kernels.ops.lora_linear_cross_entropy.call import Chunk, OfTokens
from stablelora_kernels.ops.proofs import Compared, StandIns
from stablelora_kernels.reference.rounding import (
    Arithmetic,
    Rounded,
    deviation_of_rounding,
    unit_roundoff,
)

# Each row has a program of its own, so few are enough. A chunk of a single one would show nothing.
ROWS = 64
# Rows whose labels are ignored, and outside of the vocabulary.
_IGNORED, _UNKNOWN = 32, 16
# The standard deviation of stand-ins for logits: probabilities of every size.
_SPREAD = 4.0
# Operations in float32 that round a probability, besides those that grow with the logit.
_OPERATIONS = 16


class Cap(NamedTuple):
    """Transforms logits: they are multiplied by ``scale``, and capped at ``softcap`` if it is not 0."""

    softcap: float
    scale: float

    def of(self, logits: Tensor) -> Tensor:
        """The logits, transformed, in float64."""
        u = logits.double() * self.scale
        return self.softcap * (u / self.softcap).tanh() if self.softcap else u

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of the cap in float64, where it is not 0."""
        if not self.softcap:
            return 1.0
        share = (logits.double() * (self.scale / self.softcap)).tanh()
        return (1 - share.square()).clamp(min=2.0**-52)


# Returns the losses and entropies of a chunk, and leaves dZ in its logits.
Losses = Callable[[Chunk], OfTokens]


def kernel_fault(
    chunk: Chunk, options: str, ignore_index: int, cap: Cap, by_kernel: Losses, by_operators: Losses
) -> str:
    """Why the kernel must not compute a chunk, or "". ``options``: what of a call changes its code,
    in words.
    """
    logits = chunk.logits
    words = f"{str(logits.dtype)[6:]}[{logits.shape[1]}] in rows of {logits.stride(0)}, {options}"
    kind = Kind("lora_linear_cross_entropy", words)

    def find_fault() -> str:
        computed = _stand_in(chunk, ignore_index)
        found = [*by_kernel(computed), computed.logits]
        again = _stand_in(chunk, ignore_index)
        repeated = [*by_kernel(again), again.logits]
        # Of the label outside of the vocabulary, which PyTorch's operators may refuse.
        for t in (*found[:2], *repeated[:2]):
            if not bool(t[_UNKNOWN:][:1].isnan().all()):
                return "the loss or the entropy of a label outside of the vocabulary is a number"
        for t in (*found, *repeated):
            t[_UNKNOWN:][:1] = 0.0
        before = _stand_in(chunk, ignore_index)
        for compared in _compare(before, computed, OfTokens(*found[:2]), cap, by_operators):
            if fault := compared.fault():
                return fault
        if all(map(torch.equal, found, repeated)):
            return ""
        return "two runs on the same operands differ"

    return fault_at_first_use(kind, logits.device, find_fault)


def _stand_in(chunk: Chunk, ignore_index: int) -> Chunk:
    """A few rows of the same layout, equal ones each time."""
    logits, labels, row_scale, entropy_scale = chunk
    vocabulary = logits.shape[1]
    draw = StandIns(logits.device)
    # Logits are columns of a wider matrix, whose other columns the kernel reads.
    stood_in = draw.normal(logits.new_empty(ROWS, logits.stride(0)), _SPREAD)[:, :vocabulary]
    numbers = torch.arange(ROWS, device=labels.device)
    # Every part of the vocabulary.
    places = (numbers * (vocabulary // ROWS or 1) % vocabulary).to(labels.dtype)
    places[_IGNORED] = ignore_index
    places[_UNKNOWN] = -1 if ignore_index >= 0 else vocabulary
    scales = [
        draw.of(None if scale is None else scale.new_empty(ROWS))
        for scale in (row_scale, entropy_scale)
    ]
    return Chunk(stood_in, places, *scales)


def _compare(
    before: Chunk, computed: Chunk, found: OfTokens, cap: Cap, by_operators: Losses
) -> Iterator[Compared]:
    arithmetic = Arithmetic(computed.logits.dtype)
    exact = before.logits.double()
    scales = [
        None if scale is None else scale.double()
        for scale in (before.row_scale, before.entropy_scale)
    ]
    labels = before.labels.clone()
    labels[_UNKNOWN] = labels[_IGNORED]
    expected, entropies = by_operators(Chunk(exact, labels, *scales))
    exact[_UNKNOWN] = 0.0
    largest = before.logits.double().abs().amax(1)
    relative = unit_roundoff(torch.float32) * (_OPERATIONS + largest)
    yield Compared(
        "the loss", found.losses, Rounded(expected, relative * (1 + expected.abs())), arithmetic
    )
    log_p = cap.of(before.logits).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    if entropies.numel():
        yield Compared(
            "the entropy", found.entropies, Rounded(entropies, relative * (1 + entropy)), arithmetic
        )
    rounded = deviation_of_rounding(exact, computed.logits.dtype)
    # Far above the cap, 1 less the square of the share cancels.
    parts = exact.abs()
    if scales[1] is not None:
        # Of the entropy's gradient, in which log p + H may cancel.
        of_entropy = log_p.exp() * (1 + entropy[:, None] + log_p.abs())
        parts += abs(cap.scale) * scales[1].abs()[:, None] * of_entropy
    parts /= cap.slope(before.logits)
    # And a label's probability less 1: the loss has its logarithm.
    at_label = before.labels.where(labels != labels[_IGNORED], 0)[:, None]
    of_label = parts.gather(1, at_label) / -torch.expm1(-expected[:, None])
    parts.scatter_(1, at_label, of_label.nan_to_num(nan=0.0, posinf=0.0))
    deviation = torch.hypot(rounded, relative[:, None] * parts)
    yield Compared("dZ", computed.logits, Rounded(exact, deviation), arithmetic)
