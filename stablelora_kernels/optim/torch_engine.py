"""The whole optimizer step on PyTorch's own fused and foreach operators: the CPU path, and a GPU's without Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stablelora_kernels.optim.gradients import Seen, readable
from stablelora_kernels.optim.hyperparameters import Member, Setting
from stablelora_kernels.optim.sharding import ShardSums, Unlatched
from stablelora_kernels.optim.state import (
    Pair,
    Storage,
    decode8,
    follow_parameters,
    init_moments,
    keep_moments,
    make_masters,
    take_counters,
    work_dtype,
)
from stablelora_kernels.optim.stochastic_rounding import LOW_PRECISION, Scratch, seed_word, upload


class _Bucket(NamedTuple):
    """Parameters that one call of the fused operator updates: one group, one dtype, all shrunk or none."""

    group: int
    shrinks: bool
    places: list[int]
    params: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    max_exp_avg_sqs: list[torch.Tensor]
    steps: list[torch.Tensor]


class TorchStep:
    """The step on one device. Counters live in one tensor each, whose 0-d views are the optimizer's state.

    On a CPU the latch is decided on the host, which costs nothing there, and a pair's norms are taken only until it
    latches. On a GPU everything stays on the device.
    """

    def __init__(
        self,
        members: Sequence[Member],
        pairs: Sequence[Pair],
        groups: Sequence[Setting],
        state: dict[torch.Tensor, dict[str, Any]],
        skipped: torch.Tensor,
        storage: Storage,
    ) -> None:
        """``skipped`` counts, on the device, the steps that were not taken since the gradients' norm was not finite."""
        self.members, self.pairs, self.groups, self.state, self.skipped = members, pairs, groups, state, skipped
        self.device = members[0].param.device
        self.on_host = self.device.type == "cpu"
        init_moments(state, members, groups, storage)
        make_masters(state, [m.param for m in members], storage)
        self.low_moments = storage.moments_dtype is not torch.float32
        self.steps = take_counters([state[m.param].get("step") for m in members], torch.float32, self.device)
        self.step_views = list(self.steps.unbind())
        for (p, *_), view in zip(members, self.step_views, strict=True):
            state[p]["step"] = view
        owners = [members[pair.a].param for pair in pairs]
        self.latched = take_counters([state[a].get("latched_at") for a in owners], torch.int32, self.device)
        for a, view in zip(owners, self.latched.unbind(), strict=True):
            state[a]["latched_at"] = view
        self.low_at = [i for i, m in enumerate(members) if storage.has_master(m.param)]
        self.low = [members[i].param for i in self.low_at]
        self.masters = [state[p]["master"] for p in self.low]
        self.versions: list[int] | None = None
        rounded = () if storage.master_weights else LOW_PRECISION
        low = {d: [i for i, m in enumerate(members) if m.param.dtype is d] for d in rounded}
        self.scratch = [
            Scratch(
                d,
                [members[i].param for i in places],
                [members[i].place.numbers(members[i].param.numel(), self.device) for i in places],
                places,
            )
            for d, places in low.items()
            if places
        ]
        # What the arithmetic runs on: the parameters themselves, their float32 masters or copies.
        self.work = [state[m.param].get("master", m.param) for m in members]
        for scratch in self.scratch:
            for i, view in zip(scratch.places, scratch.views, strict=True):
                self.work[i] = view
        # Where the last gradients lay, if all were read there.
        self.seen: Seen | None = None
        self.mixed = len({w.dtype for w in self.work}) > 1
        self.everyone = [True] * len(members)
        # ||A||_F / n and ||B||_F / m, as factors of the norms.
        per_n = [1 / max(members[pair.a].owner.shape[1], 1) for pair in pairs]
        per_m = [1 / max(members[pair.b].owner.shape[0], 1) for pair in pairs]
        self.seeds = upload([seed_word(groups[m.group]["seed"]) for m in members], torch.int32, self.device)
        self.a_at = upload([pair.a for pair in pairs], torch.int64, self.device)
        self.inverse_widths = upload([per_n, per_m], torch.float64, self.device)
        # The pairs that shrink whatever the norms are, so long as those are finite.
        self.never = [groups[members[pair.a].group]["stop_condition"] == "never" for pair in pairs]
        self.never_there = upload(self.never, torch.bool, self.device)
        self.pair_sums = ShardSums([members[at].owner for half in zip(*pairs, strict=True) for at in half])
        self.grad_sums = ShardSums([member.owner for member in members])
        self.unlatched = Unlatched(self.latched, range(len(pairs)))
        self.ratios: list[Any] = []
        self.plan_key: tuple[list[bool], list[int]] | None = None
        self.plan: list[_Bucket] = []

    def __call__(
        self,
        grads: Sequence[torch.Tensor | None],
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        max_grad_norm: float | None,
        seen: Seen | None,
    ) -> None:
        """``seen``: what ``look_at`` says of the gradients."""
        if found_inf is not None and self.grad_sums:
            found_inf = self.grad_sums.agree_(found_inf.clone())
        if self.on_host and found_inf is not None:
            if found_inf.item():
                return
            found_inf = None
        present, ready = self.everyone, grads
        if seen is None or seen != self.seen:
            present = [g is not None for g in grads]
            if all(present):
                present = self.everyone
            ready, direct = readable(self.work, grads)
            self.seen = seen if direct else None
        if max_grad_norm is not None:
            total, grad_scale = self._clipping(ready, present, grad_scale, max_grad_norm)
            unknown = total.isfinite().logical_not_()
            if self.on_host:
                if unknown.item():
                    self.skipped += 1
                    return
            else:
                if found_inf is not None:
                    self.skipped += unknown & (found_inf.reshape(()) == 0)
                    unknown |= found_inf.reshape(()) != 0
                else:
                    self.skipped += unknown
                found_inf = unknown.float()
        if self.versions != [p._version for p in self.low]:
            follow_parameters(self.masters, self.low)
        for scratch in self.scratch:
            scratch.load()
        shrinking: list[int] = []
        if self.on_host:
            shrinking = self._decide_on_host(present)
        else:
            self._shrink_on_device(present, found_inf)
        self._update(present, shrinking, ready, grad_scale, found_inf)
        for scratch in self.scratch:
            scratch.store(self.steps.int(), self.seeds, present)
        shadowed = [k for k, i in enumerate(self.low_at) if present[i]]
        if shadowed:
            torch._foreach_copy_([self.low[k] for k in shadowed], [self.masters[k] for k in shadowed])
        # So that a backward pass through what has been overwritten is noticed: the fused operator does not say so.
        torch.autograd.graph.increment_version(
            [m.owner for m, there in zip(self.members, present, strict=True) if there]
        )
        self.versions = [p._version for p in self.low]

    def _one_dtype(self, norms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``norms``, in float64 if there are float64 parameters among others."""
        return [x.double() for x in norms] if self.mixed else list(norms)

    def _clipping(
        self,
        grads: Sequence[torch.Tensor | None],
        present: list[bool],
        grad_scale: torch.Tensor | None,
        max_grad_norm: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The unscaled gradients' norm, and what the fused operator must divide by to unscale and clip: float32 scalars."""
        norms = torch.stack(self._one_dtype(torch._foreach_norm([g for g in grads if g is not None]))).float()
        if self.grad_sums:
            # By places: a mask would have the host wait for a GPU to count it.
            places = upload([i for i, there in enumerate(present) if there], torch.int64, self.device)
            squares = torch.zeros(len(grads), device=self.device).index_copy_(0, places, norms.square())
            norms = self.grad_sums.add_up_(squares).sqrt()
        scale = torch.ones((), device=self.device) if grad_scale is None else grad_scale.reshape(())
        total = torch.linalg.vector_norm(norms) / scale
        return total, scale / (max_grad_norm / (total + 1e-6)).clamp_(max=1.0)

    def _scaled_norms(self, live: list[int]) -> torch.Tensor:
        """[2, pairs]: ||A||_F / n and ||B||_F / m of the pairs ``live``, over all processes, in float64."""
        every = len(live) == len(self.pairs)
        halves = [self.work[self.pairs[k].a] for k in live] + [self.work[self.pairs[k].b] for k in live]
        if self.pair_sums:
            # In float64 throughout: a second look at a close call would be a second collective.
            norms = torch.stack(torch._foreach_norm(halves, 2, torch.float64)).view(2, -1)
            squares = norms.square()
            if not every:
                squares = torch.zeros(2, len(self.pairs), dtype=torch.float64, device=self.device)
                squares[:, live] = norms.square()
            norms = self.pair_sums.add_up_(squares.view(-1)).view(2, -1).sqrt()
            norms = norms if every else norms[:, live]
        else:
            norms = torch.stack(self._one_dtype(torch._foreach_norm(halves))).double().view(2, -1)
        return norms * (self.inverse_widths if every else self.inverse_widths[:, live])

    def _decide_on_host(self, present: list[bool]) -> list[int]:
        """The places of the A's that shrink in this step; pairs whose time has come are latched."""
        latched = self.latched.tolist()
        live = [k for k, pair in enumerate(self.pairs) if not latched[k] and present[pair.a]]
        if not live:
            return []
        scaled = self._scaled_norms(live)
        # Most steps leave no doubt about any pair. A NaN fails the first comparison, an infinity the second.
        if bool((scaled[0] * 0.999 > scaled[1]).all()) and bool(scaled.sum() < math.inf):
            return [self.pairs[k].a for k in live]
        shrinking = []
        inverse_n, inverse_m = self.inverse_widths.tolist()
        for k, a_norm, b_norm in zip(live, *scaled.tolist(), strict=True):
            if abs(a_norm - b_norm) <= 1e-3 * a_norm and not self.pair_sums:
                # PyTorch's float32 norm of millions of elements is off by 1e-4: a close call is taken in float64.
                pair = self.pairs[k]
                a_norm = self.work[pair.a].double().norm().item() * inverse_n[k]
                b_norm = self.work[pair.b].double().norm().item() * inverse_m[k]
            if not (math.isfinite(a_norm) and math.isfinite(b_norm)):
                continue
            if a_norm > b_norm or self.never[k]:
                shrinking.append(self.pairs[k].a)
            else:
                self.latched[k] = int(self.step_views[self.pairs[k].a].item()) + 1
        return shrinking

    def _shrink_on_device(self, present: list[bool], found_inf: torch.Tensor | None) -> None:
        """Algorithm 1 without a look from the host: factors and latches stay on the device."""
        self._plan(present, [])
        if self.pair_sums and not self.unlatched:
            return
        ratios = [self._number(self.groups[self.members[pair.a].group]["shrink_ratio"]) for pair in self.pairs]
        if any(isinstance(ratio, torch.Tensor) for ratio in ratios):
            self.ratios = []
            self.ratios_there = take_counters(ratios, torch.float64, self.device)
        elif ratios != self.ratios:
            self.ratios, self.ratios_there = ratios, upload(ratios, torch.float64, self.device)
        a_works = [self.work[pair.a] for pair in self.pairs]
        a_norms, b_norms = self._scaled_norms(list(range(len(self.pairs))))
        undecided = (self.latched == 0) & self.present_there[self.a_at] & a_norms.isfinite() & b_norms.isfinite()
        if found_inf is not None:
            undecided &= found_inf.reshape(()) == 0
        shrink = undecided & ((a_norms > b_norms) | self.never_there)
        factors = 1 - self.ratios_there * shrink
        torch._foreach_mul_(a_works, [f.to(w.dtype) for f, w in zip(factors.unbind(), a_works, strict=True)])
        now = self.steps[self.a_at].int() + 1
        self.latched.copy_(torch.where(undecided & ~shrink, now, self.latched))
        if self.pair_sums:
            self.unlatched.look()

    def _plan(self, present: list[bool], shrinking: list[int]) -> list[_Bucket]:
        """The buckets of this step, kept from the step before if the same gradients are there and the same A's shrink."""
        key = (present, shrinking)
        if key != self.plan_key:
            shrinks_at = set(shrinking)
            buckets: dict[tuple[int, bool, torch.dtype], list[int]] = {}
            for i, (p, group, *_) in enumerate(self.members):
                if present[i]:
                    buckets.setdefault((group, i in shrinks_at, work_dtype(p)), []).append(i)
            self.plan = [
                _Bucket(
                    group,
                    shrinks,
                    places,
                    [self.work[i] for i in places],
                    [self.state[self.members[i].param]["exp_avg"] for i in places],
                    [self.state[self.members[i].param]["exp_avg_sq"] for i in places],
                    [self.state[self.members[i].param]["max_exp_avg_sq"] for i in places]
                    if self.groups[group]["amsgrad"]
                    else [],
                    [self.step_views[i] for i in places],
                )
                for (group, shrinks, _), places in buckets.items()
            ]
            self.present_there = upload(present, torch.bool, self.device)
            self.plan_key = key
        return self.plan

    def _update(
        self,
        present: list[bool],
        shrinking: list[int],
        grads: Sequence[Any],
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        plan = self._plan(present, shrinking)
        if present is self.everyone:
            self.steps.add_(1)
        else:
            torch._foreach_add_([view for view, there in zip(self.step_views, present, strict=True) if there], 1)
        for bucket in plan:
            group = self.groups[bucket.group]
            lr, decay = self._number(group["lr"]) * group.lr_ratio, self._number(group["weight_decay"])
            if isinstance(decay, torch.Tensor):
                # The fused operator takes the decay as a number only.
                kept = 1 - lr * decay
                if found_inf is not None:
                    kept = kept.where(found_inf.reshape(()) == 0, 1.0)
                torch._foreach_mul_(bucket.params, kept)
                decay = 0.0
            if bucket.shrinks:
                lam = self._number(group["shrink_ratio"])
                if isinstance(lr, float) and lr > 1e-12:
                    # The shrink and the decay are one multiplication: (1 - lam)(1 - lr wd) = 1 - lr wd'.
                    decay = decay + lam / lr - lam * decay
                else:
                    torch._foreach_mul_(bucket.params, 1 - lam)
            moments = bucket.exp_avgs, bucket.exp_avg_sqs
            if self.low_moments:
                moments = self._moments(bucket, "exp_avg"), self._moments(bucket, "exp_avg_sq")
            torch._fused_adamw_(
                bucket.params,
                [grads[i] for i in bucket.places],
                *moments,
                bucket.max_exp_avg_sqs,
                bucket.steps,
                lr=lr,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=decay,
                eps=group["eps"],
                amsgrad=group["amsgrad"],
                maximize=group["maximize"],
                grad_scale=grad_scale,
                found_inf=found_inf,
            )
            if self.low_moments:
                self._keep_moments(bucket, moments, found_inf)
        if found_inf is not None:
            self.steps.sub_(found_inf.reshape(()) * self.present_there)

    def _moments(self, bucket: _Bucket, name: str) -> list[torch.Tensor]:
        """One moment of all, in float32; of float64 parameters the one that is kept."""
        entries = [self.state[self.members[i].param] for i in bucket.places]
        return [
            decode8(entry[name], entry[f"{name}_scale"], name == "exp_avg")
            if entry[name].dtype is torch.uint8
            else entry[name].to(p.dtype)
            for entry, p in zip(entries, bucket.params, strict=True)
        ]

    def _keep_moments(
        self, bucket: _Bucket, moments: tuple[list[torch.Tensor], list[torch.Tensor]], found_inf: torch.Tensor | None
    ) -> None:
        for i, *values in zip(bucket.places, *moments, strict=True):
            entry = self.state[self.members[i].param]
            if entry["exp_avg"].dtype is not torch.float64:
                keep_moments(entry, values, self.members[i].place, self.steps[i].int(), self.seeds[i], found_inf)

    def _number(self, value: float | torch.Tensor) -> Any:
        """A hyper-parameter as a float, or as a scalar on a GPU, which is not read on the host."""
        if not isinstance(value, torch.Tensor):
            return value
        if self.on_host or value.device.type == "cpu" != self.device.type:
            return value.item()
        return value.to(self.device, torch.float32, non_blocking=True)
