"""What follows from the key of a call of ``lora_linear``: how it is computed, and which gradients it
needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from stablelora_kernels.dispatch.tallies import Tally
from stablelora_kernels.ops.lora_linear.call import (
    LinearBackwardSettings,
    LinearForwardSettings,
)
from stablelora_kernels.ops.plans import Entry


class Needs(NamedTuple):
    """Whether gradients are required: of x, of the A's and the B's (of all or none), of each weight
    and of each bias.
    """

    x: bool
    a: bool
    b: bool
    weights: tuple[bool, ...]
    biases: tuple[bool, ...]


class LinearFacts(NamedTuple):
    """What follows from the key of a call."""

    # "one by one", by "plain operators", "with gradients" or "without gradients".
    strategy: str
    backend: str
    x_dtype: torch.dtype
    # Of A and B.
    lora_dtype: torch.dtype
    needs: Needs
    # Whether there is a base product in place of a weight.
    is_branch: bool
    operand_count: int
    scale_count: int
    forward: LinearForwardSettings
    backward: LinearBackwardSettings
    # "one by one": the projections' own entries.
    members: tuple[Entry, ...]
    # Of calls on the PyTorch path that have a key.
    tally: Tally | None = None
