"""How parameters and moments are kept in few bits: float32 masters of low-precision parameters, and bfloat16 moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .stable_adamw_rounding import LOW_PRECISION, mix_, stochastic_round

# What is added to the word that rounds an element of a parameter to get the word that rounds its moments.
MOMENT_WORD = 0x9E3779B9


class Storage(NamedTuple):
    """The dtype of moments, where the parameter is not float64, and whether low-precision parameters have a master."""

    moments_dtype: torch.dtype = torch.float32
    master_weights: bool = False

    def moment_dtype(self, p: torch.Tensor) -> torch.dtype:
        return torch.float64 if p.dtype is torch.float64 else self.moments_dtype

    def has_master(self, p: torch.Tensor) -> bool:
        return self.master_weights and p.dtype in LOW_PRECISION


def make_masters(state: dict[torch.Tensor, dict[str, Any]], params: Sequence[torch.Tensor], storage: Storage) -> None:
    """Give every parameter that needs one its float32 master, and take away those that are left from elsewhere."""
    for p in params:
        if not storage.has_master(p):
            state[p].pop("master", None)
        elif "master" not in state[p]:
            state[p]["master"] = p.detach().float()


def follow_parameters(masters: Sequence[torch.Tensor], params: Sequence[torch.Tensor]) -> None:
    """Where a parameter is not its master's rounding, someone else has written to it: the master becomes the parameter."""
    for master, p in zip(masters, params, strict=True):
        torch.where(master.to(p.dtype) == p, master, p.float(), out=master)


def flat(t: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order of memory, as a view."""
    return t.as_strided((t.numel(),), (1,), t.storage_offset())


def round_moments(
    kept: Sequence[torch.Tensor], values: Sequence[torch.Tensor], base: int, step: torch.Tensor, seed: torch.Tensor
) -> None:
    """Round the two moments ``values``, float32, into ``kept``, bfloat16, at random; ``step`` and ``seed`` are int32.

    ``base`` is the number of the parameter's first element. Elementwise
    :func:`~stablelora_kernels.reference_optim.moment_noise_ref`.
    """
    # Indices are taken modulo 2^32.
    index = torch.arange(base, base + kept[0].numel(), device=step.device).to(torch.int32)
    words = mix_(index ^ mix_((step + seed).reshape(1)))
    words = mix_(words.add_(MOMENT_WORD - 2**32))
    for t, value, noise in zip(kept, values, (words, words >> 16), strict=True):
        flat(t).copy_(stochastic_round(flat(value), t.dtype, noise))
