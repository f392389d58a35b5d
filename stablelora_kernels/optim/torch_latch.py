"""The latch rule of the PyTorch path: which A's a step shrinks, and which pairs latch. It decides and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stablelora_kernels.optim.graph_capture import upload
from stablelora_kernels.optim.hyperparameters import Member, Setting
from stablelora_kernels.optim.sharding import LatchMonitor, ShardSums
from stablelora_kernels.optim.state import Pair, stack_counters


class Latching(NamedTuple):
    """What a step decides about the pairs: new latches, A's that the update shrinks; on a device factors of all A's."""

    latched: torch.Tensor | None = None
    shrinking: Sequence[int] = ()
    a_factors: Sequence[torch.Tensor] = ()


def one_dtype(norms: Sequence[torch.Tensor], mixed: bool) -> list[torch.Tensor]:
    """``norms``, in float64 if their dtypes are ``mixed``."""
    return [x.double() for x in norms] if mixed else list(norms)


class LatchRule:
    """Decides by the values before the step: on a CPU on the host, and only for pairs that have not latched."""

    def __init__(
        self,
        members: Sequence[Member],
        pairs: Sequence[Pair],
        settings: Sequence[Setting],
        work: Sequence[torch.Tensor],
        steps: torch.Tensor,
        latched: torch.Tensor,
    ) -> None:
        """Remember what the rule reads.

        Args:
            members, pairs, settings: as the engine's.
            work: for each member the tensor that the arithmetic runs on.
            steps: float32, one a member.
            latched: int32, one a pair.
        """
        self.pairs, self.work, self.steps, self.latched, self.device = pairs, work, steps, latched, steps.device
        # Whether there are float64 parameters among others.
        self.mixed = len({w.dtype for w in work}) > 1
        # Of each pair's A.
        self.settings = [settings[members[pair.a].setting_index] for pair in pairs]
        self.a_indices = upload([pair.a for pair in pairs], torch.int64, self.device)
        # [2, pairs]: multiplied by these, ||A||_F and ||B||_F become ||A||_F / n and ||B||_F / m.
        per_n = [1 / max(members[pair.a].owner.shape[1], 1) for pair in pairs]
        per_m = [1 / max(members[pair.b].owner.shape[0], 1) for pair in pairs]
        self.inverse_widths = upload([per_n, per_m], torch.float64, self.device)
        # Pairs that shrink at every step with finite norms.
        self.never_latches = [setting["stop_condition"] == "never" for setting in self.settings]
        self.never_latches_on_device = upload(self.never_latches, torch.bool, self.device)
        self.pair_sums = ShardSums([members[i].owner for half in zip(*pairs, strict=True) for i in half])
        self.monitor = LatchMonitor(latched, range(len(pairs)))
        self.ratios: list[Any] = []

    def record(self) -> None:
        """Record after a step on a device, for sharded pairs, how many may still shrink."""
        if self.pair_sums:
            self.monitor.record()

    def decide_on_host(self, present: list[bool]) -> Latching:
        """The latch rule, on the values before the update: shrink A if ||A||_F / n > ||B||_F / m, else latch the pair."""
        latched = self.latched.tolist()
        live = [k for k, pair in enumerate(self.pairs) if not latched[k] and present[pair.a]]
        if not live:
            return Latching()
        scaled = self._scaled_norms(live)
        # In most steps all pairs shrink clearly. A NaN fails the first comparison, an infinity the second. Below the minimum
        # float32 loses some of the squares.
        if bool((scaled[0] * 0.999 > scaled[1].clamp(min=1e-12)).all()) and bool(scaled.sum() < math.inf):
            return Latching(shrinking=[self.pairs[k].a for k in live])
        shrinking, before = [], list(latched)
        inverse_n, inverse_m = self.inverse_widths.tolist()
        for k, a_norm, b_norm in zip(live, *scaled.tolist(), strict=True):
            clear = abs(a_norm - b_norm) > 1e-3 * a_norm and 1e-12 < max(a_norm, b_norm) < math.inf
            if not clear and not self.pair_sums:
                # PyTorch's float32 norm of millions of elements is off by 1e-4, and its squares over- and underflow, so decide a
                # close call and very large or small norms in float64.
                pair = self.pairs[k]
                a_norm = self.work[pair.a].double().norm().item() * inverse_n[k]
                b_norm = self.work[pair.b].double().norm().item() * inverse_m[k]
            if not (math.isfinite(a_norm) and math.isfinite(b_norm)):
                continue
            if a_norm > b_norm or self.never_latches[k]:
                shrinking.append(self.pairs[k].a)
            else:
                latched[k] = int(self.steps[self.pairs[k].a].item()) + 1
        changed = None if latched == before else upload(latched, torch.int32, self.device)
        return Latching(changed, shrinking)

    def decide_on_device(self, present: torch.Tensor, found_inf: torch.Tensor | None, scalar: Any) -> Latching:
        """The latch rule, of which the host learns nothing; A's are shrunk by factors, of which some are 1.

        Args:
            present: bool on the device, one a member, whether it has a gradient.
            found_inf: float32 scalar; if it is not 0, nothing changes.
            scalar: the engine's function that reads a hyperparameter.
        """
        if self.pair_sums and not self.monitor.any_unlatched():
            return Latching()
        ratios = [scalar(setting["shrink_ratio"]) for setting in self.settings]
        if any(isinstance(ratio, torch.Tensor) for ratio in ratios):
            self.ratios = []
            self.ratios_on_device = stack_counters(ratios, torch.float64, self.device)
        elif ratios != self.ratios:
            self.ratios, self.ratios_on_device = ratios, upload(ratios, torch.float64, self.device)
        a_works = [self.work[pair.a] for pair in self.pairs]
        a_norms, b_norms = self._scaled_norms(list(range(len(self.pairs))))
        undecided = (self.latched == 0) & present[self.a_indices]
        undecided = undecided & a_norms.isfinite() & b_norms.isfinite()
        if found_inf is not None:
            undecided &= found_inf.reshape(()) == 0
        shrink = undecided & ((a_norms > b_norms) | self.never_latches_on_device)
        factors = 1 - self.ratios_on_device * shrink
        a_factors = [f.to(w.dtype) for f, w in zip(factors.unbind(), a_works, strict=True)]
        now = self.steps[self.a_indices].int() + 1
        return Latching(torch.where(undecided & ~shrink, now, self.latched), (), a_factors)

    def _scaled_norms(self, live: list[int]) -> torch.Tensor:
        """float64 [2, len(live)]: ||A||_F / n and ||B||_F / m of the pairs ``live``, over all processes."""
        every = len(live) == len(self.pairs)
        halves = [self.work[self.pairs[k].a] for k in live] + [self.work[self.pairs[k].b] for k in live]
        if self.pair_sums:
            # In float64 throughout, since deciding a close call again would take a second collective.
            norms = torch.stack(torch._foreach_norm(halves, 2, torch.float64)).view(2, -1)
            squares = norms.square()
            if not every:
                squares = torch.zeros(2, len(self.pairs), dtype=torch.float64, device=self.device)
                squares[:, live] = norms.square()
            norms = self.pair_sums.all_reduce_sum_(squares.view(-1)).view(2, -1).sqrt()
            norms = norms if every else norms[:, live]
        else:
            norms = torch.stack(one_dtype(torch._foreach_norm(halves), self.mixed)).double().view(2, -1)
        return norms * (self.inverse_widths if every else self.inverse_widths[:, live])
