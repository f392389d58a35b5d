"""The latch rule on PyTorch's operators: which pairs shrink, and which latch. The host decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.optim.options import LOW_PRECISION
from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.optim.staging import upload


class Widths(NamedTuple):
    """The widths of a pair A [r, n], B [m, r]."""

    n: int
    m: int


class Verdict(NamedTuple):
    """What becomes of pairs, by their indices. Those in neither have norms that are not finite."""

    shrink: list[int]
    latch: list[int]


class LatchRule:
    """Decides for the pairs of a device: A shrinks if ||A||_F / n > ||B||_F / m, else the pair
    latches. With a norm that is not finite it does neither.

    Args:
        widths: of every pair of the device.
        sums: over the processes that share the pairs: of all A's, then of all B's.
        device: where they are.
    """

    def __init__(self, widths: Sequence[Widths], sums: ShardSums, device: torch.device) -> None:
        self.sums = sums
        # [2, pairs]: multiplied by these, ||A||_F and ||B||_F become ||A||_F / n and ||B||_F / m.
        per_n = [1 / max(n, 1) for n, _ in widths]
        per_m = [1 / max(m, 1) for _, m in widths]
        self.inverse_widths = upload([per_n, per_m], torch.float64, device)

    def decide(
        self, live: Sequence[int], a: Sequence[Tensor], b: Sequence[Tensor], never: set[int]
    ) -> Verdict:
        """The verdict on the pairs ``live``. ``a`` and ``b`` are this process's parts of A and B of
        all pairs; those of ``never`` shrink at any finite norms.
        """
        scaled = self._scaled_norms(live, a, b)
        if _all_shrink_clearly(scaled):
            return Verdict([*live], [])
        verdict = Verdict([], [])
        for k, a_norm, b_norm in zip(live, *scaled.tolist(), strict=True):
            clear = abs(a_norm - b_norm) > 1e-3 * a_norm and 1e-12 < max(a_norm, b_norm) < math.inf
            if not clear and not self.sums:
                a_norm, b_norm = self._scaled_norms_in_float64(k, a[k], b[k])
            if not (math.isfinite(a_norm) and math.isfinite(b_norm)):
                continue
            (verdict.shrink if a_norm > b_norm or k in never else verdict.latch).append(k)
        return verdict

    def _scaled_norms(
        self, live: Sequence[int], a: Sequence[Tensor], b: Sequence[Tensor]
    ) -> Tensor:
        """float64 [2, len(live)]: ||A||_F / n and ||B||_F / m of the pairs ``live``, over all
        processes.
        """
        halves = [a[k] for k in live] + [b[k] for k in live]
        count = len(a)
        if self.sums:
            # In float64 throughout, since deciding a close call again would take a second
            # collective.
            local_norms = torch.stack(torch._foreach_norm(halves, 2, torch.float64))
            squares = torch.zeros(2, count, dtype=torch.float64, device=local_norms.device)
            squares[:, live] = local_norms.view(2, -1).square()
            norms = self.sums.all_reduce_sum_(squares.view(-1)).view(2, -1).sqrt()[:, live]
        else:
            norms = torch.stack(torch._foreach_norm(halves, 2, _norm_dtype(halves)))
            norms = norms.double().view(2, -1)
        if len(live) == count:
            return norms * self.inverse_widths
        return norms * self.inverse_widths[:, live]

    def _scaled_norms_in_float64(self, k: int, a: Tensor, b: Tensor) -> tuple[float, float]:
        """||A||_F / n and ||B||_F / m of pair ``k``, for close calls and very large or small norms.

        PyTorch's float32 norm of millions of elements is off by 1e-4, and its squares over- and
        underflow.
        """
        inverse_n, inverse_m = self.inverse_widths[:, k].tolist()
        a_norm, b_norm = a.double().norm().item(), b.double().norm().item()
        return a_norm * inverse_n, b_norm * inverse_m


def _norm_dtype(halves: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype in which to compute norms; None is that of the tensors. A norm in low precision would
    be off by more than a close call.
    """
    dtypes = {half.dtype for half in halves}
    if len(dtypes) > 1:
        return torch.float64
    return torch.float32 if dtypes <= {*LOW_PRECISION} else None


def _all_shrink_clearly(scaled: Tensor) -> bool:
    """Whether every ||A||_F / n is so far above ||B||_F / m that float32's errors do not matter, as
    in most steps; ``scaled`` is [2, pairs].
    """
    # A NaN fails the first comparison, an infinity the second. Below the minimum float32 loses some
    # of the squares.
    above = bool((scaled[0] * 0.999 > scaled[1].clamp(min=1e-12)).all())
    return above and bool(scaled.sum() < math.inf)
