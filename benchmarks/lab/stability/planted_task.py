"""A task whose difficulty does not depend on width: find a planted change of low rank in one frozen layer.

Inputs x [32] are normal. Frozen, with n features: z = sqrt(2) relu(W_in x), the layer y = W0 z, and a readout f = R^T relu(y) / n
of 8 outputs. The target is the same network with W0 + U V^T / n, of rank 4, whose U lies in the span of R and whose V in that of
W_in, so that it changes y and f by Theta(1) at every n. An adapter on W0 can find it. Since all that is before the adapter is
frozen, z and W0 z are computed once, and a training step costs O(n r).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stablelora_kernels.functional import lora_branch

INPUTS, OUTPUTS, PLANTED_RANK = 32, 8, 4
R, SCALING = 8, 2.0


@dataclass(frozen=True)
class Planted:
    """Training examples, and examples held out.

    Attributes:
        z: [samples, n], the adapted layer's inputs.
        base: [samples, n], W0 z.
        target: [samples, 8].
        readout: [n, 8], R / n.
        scale: what the squared error is divided by, so that it is 1 where the adapter adds nothing.
        held_out: how many of the samples, the last ones, are not trained on.
    """

    z: Tensor
    base: Tensor
    target: Tensor
    readout: Tensor
    scale: float
    held_out: int

    @property
    def width(self) -> int:
        return self.z.shape[1]

    def loss(self, A: Tensor, B: Tensor, rows: slice) -> Tensor:
        return (self.outputs(A, B, rows) - self.target[rows]).square().mean() / self.scale

    def outputs(self, A: Tensor, B: Tensor, rows: slice) -> Tensor:
        return torch.relu(lora_branch(self.base[rows], self.z[rows], A, B, SCALING)) @ self.readout


def plant(width: int, seed: int, samples: int = 1024, held_out: int = 256) -> Planted:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    total = samples + held_out
    w_in, readout = normal(width, INPUTS, std=INPUTS**-0.5), normal(width, OUTPUTS)
    z = math.sqrt(2) * torch.relu(normal(total, INPUTS) @ w_in.t())
    base = z @ normal(width, width, std=width**-0.5).t()
    u = readout @ normal(OUTPUTS, PLANTED_RANK, std=OUTPUTS**-0.5)
    v = w_in @ normal(INPUTS, PLANTED_RANK)
    readout = readout / width
    change = (z @ v / width) @ u.t()
    before, target = torch.relu(base) @ readout, torch.relu(base + change) @ readout
    return Planted(z, base, target, readout, (target - before).square().mean().item(), held_out)


def start(width: int, seed: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """A [8, n] as PEFT draws it (kaiming-uniform, variance 1 / 3n) times ``factor``, and B [n, 8], which is zero."""
    generator = torch.Generator().manual_seed(1000 + seed)
    bound = width**-0.5
    return (torch.rand(R, width, generator=generator) * 2 - 1) * bound * factor, torch.zeros(width, R)
