"""The whole optimizer step on PyTorch's fused and foreach operators: the CPU path, and a GPU's without Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stablelora_kernels.optim.gradients import Gradients, Layout, convert_gradients
from stablelora_kernels.optim.graph_capture import upload
from stablelora_kernels.optim.hyperparameters import Member, Setting
from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.optim.state import (
    Pair,
    Storage,
    init_masters,
    init_moments,
    load_moment,
    refresh_masters,
    rounded_moments,
    stack_counters,
    work_dtype,
)
from stablelora_kernels.optim.stochastic_rounding import LOW_PRECISION, Scratch, seed_word
from stablelora_kernels.optim.torch_latch import Latching, LatchRule, one_dtype


class _Bucket(NamedTuple):
    """Members that one call of the fused operator updates: same setting, same dtype, all shrink or none."""

    setting: Setting
    shrinks: bool
    indices: list[int]
    params: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    max_exp_avg_sqs: list[torch.Tensor]
    steps: list[torch.Tensor]


class _Update(NamedTuple):
    """A bucket's hyperparameters in one step; its parameters are first multiplied by each of ``factors``."""

    bucket: _Bucket
    lr: Any
    decay: float
    factors: list[Any]


class TorchStep:
    """The step of all parameters on one device.

    A step allocates first and writes then, so a step that runs out of memory has changed nothing.

    On a CPU the host decides the latch, and takes a pair's norms only until it latches. On a GPU everything stays on the
    device. Counters of one kind share a tensor; the optimizer's state holds 0-d views of it.
    """

    def __init__(
        self,
        members: Sequence[Member],
        pairs: Sequence[Pair],
        settings: Sequence[Setting],
        state: dict[torch.Tensor, dict[str, Any]],
        skipped: torch.Tensor,
        storage: Storage,
    ) -> None:
        """Complete ``state`` and make the working copies.

        Args:
            members: the parameters, all on one device.
            pairs: the pairs among them.
            settings: the settings that ``members`` refer to.
            state: the optimizer's state of each member's ``param``. Missing entries are filled; counters become views.
            skipped: int32 scalar on the device, counts steps not taken because the gradients' norm was not finite.
            storage: how moments and masters are kept.
        """
        self.members, self.pairs, self.settings, self.state, self.skipped = members, pairs, settings, state, skipped
        self.device = members[0].param.device
        self.on_host = self.device.type == "cpu"
        init_moments(state, members, settings, storage)
        init_masters(state, [m.param for m in members], storage)
        self.low_moments = storage.moments_dtype is not torch.float32
        self._make_counters()
        self._make_working_copies(storage)
        self.all_present = [True] * len(members)
        self.seeds = upload([seed_word(settings[m.setting_index]["seed"]) for m in members], torch.int32, self.device)
        self.grad_sums = ShardSums([member.owner for member in members])
        self.latch_rule = LatchRule(members, pairs, settings, self.work, self.steps, self.latched)
        # The layout of the last gradients, if the step could read all of them without a copy.
        self.layout: Layout | None = None
        self.bucket_key: tuple[list[bool], list[int]] | None = None
        self.buckets: list[_Bucket] = []

    @property
    def float32_squares(self) -> bool:
        """Whether norms come from sums of squares in float32 alone."""
        return not self.on_host and not self.latch_rule.pair_sums

    def _make_counters(self) -> None:
        """One tensor of steps, one a member, and one of latches, one a pair; the state gets views of them."""
        params = [m.param for m in self.members]
        owners = [params[pair.a] for pair in self.pairs]
        self.steps = stack_counters([self.state[p].get("step") for p in params], torch.float32, self.device)
        self.latched = stack_counters([self.state[a].get("latched_at") for a in owners], torch.int32, self.device)
        self.step_views = list(self.steps.unbind())
        for p, view in zip(params, self.step_views, strict=True):
            self.state[p]["step"] = view
        for a, view in zip(owners, self.latched.unbind(), strict=True):
            self.state[a]["latched_at"] = view

    def _make_working_copies(self, storage: Storage) -> None:
        """``work``: the tensors that the arithmetic runs on: parameters, their float32 masters or float32 copies."""
        params = [m.param for m in self.members]
        self.master_indices = [i for i, p in enumerate(params) if storage.has_master(p)]
        self.mastered = [params[i] for i in self.master_indices]
        self.masters = [self.state[p]["master"] for p in self.mastered]
        # The versions of the mastered parameters after the last step; None to refresh all masters.
        self.versions: list[int] | None = None
        self.work = [self.state[p].get("master", p) for p in params]
        self.scratch: list[Scratch] = []
        for dtype in () if storage.master_weights else LOW_PRECISION:
            indices = [i for i, p in enumerate(params) if p.dtype is dtype]
            if indices:
                elements = [self.members[i].shard.element_indices(params[i].numel(), self.device) for i in indices]
                scratch = Scratch(dtype, [params[i] for i in indices], elements, indices)
                self.scratch.append(scratch)
                for i, view in zip(indices, scratch.views, strict=True):
                    self.work[i] = view

    def step(
        self,
        gradients: Gradients,
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        max_grad_norm: float | None,
    ) -> None:
        """Take one step.

        Args:
            gradients: one a member.
            grad_scale: float32 scalar that the gradients are to be divided by.
            found_inf: float32 scalar; if it is not 0, nothing changes.
            max_grad_norm: clip the gradients to this norm.
        """
        grads, layout = gradients.tensors, gradients.layout
        if found_inf is not None and self.grad_sums:
            found_inf = self.grad_sums.all_reduce_max_(found_inf.clone())
        if self.on_host and found_inf is not None:
            if found_inf.item():
                return
            found_inf = None
        if found_inf is not None:
            # GradScaler adds up those of several devices. The fused operator takes 1 alone.
            found_inf = (found_inf != 0).float()
        present, ready, skipped = self.all_present, grads, None
        if layout is None or layout != self.layout:
            present = [g is not None for g in grads]
            if all(present):
                present = self.all_present
            ready, direct = convert_gradients(self.work, grads)
            self.layout = layout if direct else None
        if max_grad_norm is not None:
            norm, grad_scale = self._norm_and_clip_scale(ready, present, grad_scale, max_grad_norm)
            nonfinite = norm.isfinite().logical_not_()
            if self.on_host:
                if nonfinite.item():
                    self.skipped += 1
                    return
            else:
                found_inf, skipped = self._skip_nonfinite(nonfinite, found_inf)
        if self.versions != [p._version for p in self.mastered]:
            refresh_masters(self.masters, self.mastered)
        for scratch in self.scratch:
            scratch.load()
            scratch.prepare(self.steps.int() + 1, self.seeds)
        if self.on_host:
            latching = self.latch_rule.decide_on_host(present)
        else:
            # The plan of a device, where no A shrinks in the update, has the present members.
            self._plan(present, [])
            latching = self.latch_rule.decide_on_device(self.present_on_device, found_inf, self._scalar)
        updates = [self._update(bucket, found_inf) for bucket in self._plan(present, list(latching.shrinking))]
        taken_back = None if found_inf is None else found_inf.reshape(()) * self.present_on_device
        copies = self._adamw_on_copies(updates, latching, ready, grad_scale, found_inf) if self.low_moments else []

        # Nothing below allocates.
        if skipped is not None:
            self.skipped += skipped
        if latching.latched is not None:
            self.latched.copy_(latching.latched)
        if present is self.all_present:
            self.steps.add_(1)
        else:
            torch._foreach_add_(
                [view for view, is_present in zip(self.step_views, present, strict=True) if is_present], 1
            )
        if self.low_moments:
            for old, new in copies:
                old.copy_(new)
        else:
            self._shrink_on_device(self.work, latching)
            for update in updates:
                self._adamw(update, ready, grad_scale, found_inf)
        if taken_back is not None:
            self.steps.sub_(taken_back)
        self._write_back(present)
        if not self.on_host:
            self.latch_rule.record()

    def _skip_nonfinite(
        self, nonfinite: torch.Tensor, found_inf: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``found_inf`` that skips a step whose gradients' norm is not finite, and what to add to the count of such steps."""
        if found_inf is None:
            return nonfinite.float(), nonfinite
        given = found_inf.reshape(()) != 0
        return (nonfinite | given).float(), nonfinite & ~given

    def _write_back(self, present: list[bool]) -> None:
        """Round the working copies into the parameters."""
        for scratch in self.scratch:
            scratch.store(present)
        written = [k for k, i in enumerate(self.master_indices) if present[i]]
        if written:
            torch._foreach_copy_([self.mastered[k] for k in written], [self.masters[k] for k in written])
        # The fused operator leaves versions alone. With them a backward pass through overwritten values is noticed.
        torch.autograd.graph.increment_version(
            [m.owner for m, is_present in zip(self.members, present, strict=True) if is_present]
        )
        self.versions = [p._version for p in self.mastered]

    def _norm_and_clip_scale(
        self,
        grads: Sequence[torch.Tensor | None],
        present: list[bool],
        grad_scale: torch.Tensor | None,
        max_grad_norm: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the unscaled gradients, and the divisor that unscales and clips them: float32 scalars."""
        each = torch._foreach_norm([g for g in grads if g is not None])
        norms = torch.stack(one_dtype(each, self.latch_rule.mixed)).float()
        if self.grad_sums:
            # Indices, not a mask: the host would wait for a GPU to count a mask.
            indices = upload([i for i, is_present in enumerate(present) if is_present], torch.int64, self.device)
            squares = torch.zeros(len(grads), dtype=torch.float32, device=self.device).index_copy_(
                0, indices, norms.square()
            )
            norms = self.grad_sums.all_reduce_sum_(squares).sqrt()
        scale = (
            torch.ones((), dtype=torch.float32, device=self.device) if grad_scale is None else grad_scale.reshape(())
        )
        total = torch.linalg.vector_norm(norms) / scale
        return total, scale / (max_grad_norm / (total + 1e-6)).clamp_(max=1.0)

    def _plan(self, present: list[bool], shrinking: list[int]) -> list[_Bucket]:
        """The buckets of this step, reused if the same gradients are present and the same A's shrink as before."""
        key = (present, shrinking)
        if key != self.bucket_key:
            shrinks_at = set(shrinking)
            buckets: dict[tuple[int, bool, torch.dtype], list[int]] = {}
            for i, (p, setting_index, *_) in enumerate(self.members):
                if present[i]:
                    buckets.setdefault((setting_index, i in shrinks_at, work_dtype(p)), []).append(i)
            made = [
                self._bucket(self.settings[setting_index], shrinks, indices)
                for (setting_index, shrinks, _), indices in buckets.items()
            ]
            self.present_on_device = upload(present, torch.bool, self.device)
            # After the last allocation: buckets of another key would be another step's.
            self.buckets, self.bucket_key = made, key
        return self.buckets

    def _bucket(self, setting: Setting, shrinks: bool, indices: list[int]) -> _Bucket:
        entries = [self.state[self.members[i].param] for i in indices]
        return _Bucket(
            setting,
            shrinks,
            indices,
            params=[self.work[i] for i in indices],
            exp_avgs=[entry["exp_avg"] for entry in entries],
            exp_avg_sqs=[entry["exp_avg_sq"] for entry in entries],
            max_exp_avg_sqs=[entry["max_exp_avg_sq"] for entry in entries] if setting["amsgrad"] else [],
            steps=[self.step_views[i] for i in indices],
        )

    def _update(self, bucket: _Bucket, found_inf: torch.Tensor | None) -> _Update:
        """Work out the bucket's hyperparameters: weight decay and shrink in one where numbers allow it."""
        setting, factors = bucket.setting, []
        lr, decay = self._scalar(setting["lr"]) * setting.lr_ratio, self._scalar(setting["weight_decay"])
        if isinstance(decay, torch.Tensor):
            # The fused operator takes the decay as a number only.
            kept = 1 - lr * decay
            factors.append(kept if found_inf is None else kept.where(found_inf.reshape(()) == 0, 1.0))
            decay = 0.0
        if bucket.shrinks:
            ratio = self._scalar(setting["shrink_ratio"])
            if isinstance(lr, float) and lr > 1e-12:
                # Shrink and decay are one multiplication: (1 - ratio)(1 - lr wd) = 1 - lr wd'.
                decay = decay + ratio / lr - ratio * decay
            else:
                factors.append(1 - ratio)
        return _Update(bucket, lr, decay, factors)

    def _shrink_on_device(self, work: Sequence[torch.Tensor], latching: Latching) -> None:
        if latching.a_factors:
            torch._foreach_mul_([work[pair.a] for pair in self.pairs], list(latching.a_factors))

    def _adamw(
        self, update: _Update, grads: Sequence[Any], grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None
    ) -> None:
        """Weight decay, the shrink and AdamW of one bucket."""
        bucket, setting = update.bucket, update.bucket.setting
        for factor in update.factors:
            torch._foreach_mul_(bucket.params, factor)
        torch._fused_adamw_(
            bucket.params,
            [grads[i] for i in bucket.indices],
            bucket.exp_avgs,
            bucket.exp_avg_sqs,
            bucket.max_exp_avg_sqs,
            bucket.steps,
            lr=update.lr,
            beta1=setting["betas"][0],
            beta2=setting["betas"][1],
            weight_decay=update.decay,
            eps=setting["eps"],
            amsgrad=setting["amsgrad"],
            maximize=setting["maximize"],
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _adamw_on_copies(
        self,
        updates: list[_Update],
        latching: Latching,
        grads: Sequence[Any],
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """With moments in few bits: the tensors that the step changes, and their new values. Rounding moments allocates.

        One bucket's moments are in float32 at a time.
        """
        work = [w.clone() for w in self.work]
        self._shrink_on_device(work, latching)
        if grad_scale is not None:
            # The fused operator writes the unscaled gradients back.
            grads = [g if g is None else g.clone() for g in grads]
        changes = list(zip(self.work, work, strict=True))
        for update in updates:
            bucket = update.bucket
            exp_avgs, exp_avg_sqs = (self._load_moments(bucket, name) for name in ("exp_avg", "exp_avg_sq"))
            copied = bucket._replace(
                params=[work[i] for i in bucket.indices],
                exp_avgs=exp_avgs,
                exp_avg_sqs=exp_avg_sqs,
                steps=[step + 1 for step in bucket.steps],
            )
            self._adamw(update._replace(bucket=copied), grads, grad_scale, found_inf)
            for i, *values in zip(bucket.indices, exp_avgs, exp_avg_sqs, strict=True):
                entry, step = self.state[self.members[i].param], self.steps[i].int() + 1
                changes += rounded_moments(entry, values, self.members[i].shard, step, self.seeds[i], found_inf)
        return changes

    def _load_moments(self, bucket: _Bucket, name: str) -> list[torch.Tensor]:
        """Copies of moments, in the dtype of the arithmetic."""
        entries = [self.state[self.members[i].param] for i in bucket.indices]
        loaded = [load_moment(entry, name, p.dtype) for entry, p in zip(entries, bucket.params, strict=True)]
        return [t.clone() if t is entry[name] else t for t, entry in zip(loaded, entries, strict=True)]

    def _scalar(self, value: float | torch.Tensor) -> Any:
        """A hyperparameter as a float, or as a float32 scalar on the GPU if the host must not read it."""
        if not isinstance(value, torch.Tensor):
            return value
        if self.on_host or value.device.type == "cpu" != self.device.type:
            return value.item()
        return value.to(self.device, torch.float32, non_blocking=True)
