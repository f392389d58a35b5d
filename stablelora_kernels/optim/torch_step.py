"""The whole optimizer step on PyTorch's fused and foreach operators: the CPU path, and a GPU's
without Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple, cast

import torch
from torch import Tensor

from stablelora_kernels.optim import staging
from stablelora_kernels.optim.engine import Change, Engine, Gradients, Member
from stablelora_kernels.optim.latch import LatchRule, Widths
from stablelora_kernels.optim.options import LOW_PRECISION, Number
from stablelora_kernels.optim.rounding import (
    MOMENT_WORD,
    Rounding,
    encode8,
    flat,
    mix_,
    seed_word,
    stochastic_round,
)
from stablelora_kernels.optim.staging import upload
from stablelora_kernels.optim.state import MOMENTS, Entry, load_moment
from stablelora_kernels.pairs import LoRAPair


class _FusedCall(NamedTuple):
    """Members that one call of the fused operator updates: same setting, same dtype, all shrink or
    none, all with a gradient.
    """

    members: list[Member]
    # Where they are among the engine's.
    indices: list[int]
    shrinks: bool
    # What the arithmetic runs on.
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    def update(self, grads: Sequence[Tensor | None], grad_scale: Tensor | None) -> None:
        """The shrink, weight decay and AdamW."""
        setting = self.members[0].setting
        group = setting.group
        live = setting.live()
        lr = _on_host(live.lr) * setting.lr_ratio
        decay = _on_host(live.weight_decay)
        ratio = _on_host(live.shrink_ratio)
        if self.shrinks and lr > 1e-12:
            # Shrink and decay are one multiplication: (1 - ratio)(1 - lr wd) = 1 - lr wd'.
            decay += ratio / lr - ratio * decay
        elif self.shrinks:
            torch._foreach_mul_(self.params, 1 - ratio)
        torch._fused_adamw_(
            self.params,
            cast("list[Tensor]", [grads[i] for i in self.indices]),
            self.exp_avgs,
            self.exp_avg_sqs,
            [],
            self.steps,
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=decay,
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
            grad_scale=grad_scale,
            found_inf=None,
        )


def _on_host(value: Number) -> float:
    return value.item() if isinstance(value, Tensor) else value


class _Latch(NamedTuple):
    """What the latch rule decides in one step; nothing is written yet."""

    # The indices of the A's that the update shrinks.
    shrinking: list[int]
    # The new ``latched``, if a pair latches.
    latched: Tensor | None


class TorchStep(Engine):
    """The step of all parameters on one device. The host decides the latch, so on a GPU it waits
    for the norms.

    A step allocates first and writes then, so a step that runs out of memory has changed nothing.
    Trainer's ``auto_find_batch_size`` needs that: it catches the error and trains on, with smaller
    batches and with the parameters and the optimizer as the failed step left them.
    """

    def __init__(
        self,
        members: Sequence[Member],
        pairs: Sequence[LoRAPair],
        skipped: Tensor,
    ) -> None:
        super().__init__(members, pairs, [1] * len(members))
        self.skipped = skipped
        group = members[0].setting.group
        self.low_moments = group["moments_dtype"] is not torch.float32
        seeds = [seed_word(member.setting.group["seed"]) for member in members]
        self.seeds = upload(seeds, torch.int32, self.device)
        widths = [
            Widths(n=members[pair.a].owner.shape[1], m=members[pair.b].owner.shape[0])
            for pair in self.pairs
        ]
        self.rule = LatchRule(widths, self.pair_sums, self.device)
        # The indices of the pairs that shrink at every step.
        self.never = {
            k
            for k, pair in enumerate(self.pairs)
            if members[pair.a].setting.group["stop_condition"] == "never"
        }
        # Low-precision parameters without a master are computed in float32 copies.
        self.scratch: list[_Scratch] = []
        for dtype in () if group["master_weights"] else LOW_PRECISION:
            indices = [i for i, p in enumerate(self.params) if p.dtype is dtype]
            if indices:
                scratch = _Scratch(dtype, [members[i] for i in indices], indices)
                self.scratch.append(scratch)
                for i, view in zip(indices, scratch.views, strict=True):
                    self.work[i] = view
        # The same by pair, of its A and of its B.
        self.work_a = [self.work[pair.a] for pair in self.pairs]
        self.work_b = [self.work[pair.b] for pair in self.pairs]
        # Norms of float64 parameters among others need a common dtype.
        self.norm_dtype = torch.float64 if len({w.dtype for w in self.work}) > 1 else None
        # Which members have a gradient, and what that adds to their steps.
        self.present = [True] * len(members)
        self.taken: int | Tensor = 1
        self.calls_key: tuple[list[bool], list[int]] | None = None
        self.calls: list[_FusedCall] = []

    def step(
        self,
        gradients: Gradients,
        change: Change,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Take one step.

        Args:
            gradients: one a member.
            change: what has changed since the last step.
            grad_scale: float32 scalar that the gradients are to be divided by.
            found_inf: float32 scalar; if it is not 0, only masters change, where someone else has
                written to their parameter.
        """
        if self.device.type == "cuda" and staging.capturing():
            raise RuntimeError(
                f"PyTorch's operators on {self.device} decide the latch on the host, so no CUDA graph can hold this step: use "
                "backend 'triton', and no float64 parameters"
            )
        # Before anything may skip the step: each change is told once.
        grads = gradients.tensors
        if change.gradients or not self.direct:
            grads = self._read(gradients)
        if change.written:
            self.refresh_masters()
        if found_inf is not None and self.grad_sums.all_reduce_max_(found_inf.clone()).item():
            return
        if self.max_grad_norm is not None:
            grad_scale = self._clip(grads, grad_scale, self.max_grad_norm)
            if grad_scale is None:
                self.skipped += 1
                return
        for scratch in self.scratch:
            scratch.load(self.steps.int() + 1, self.seeds)
        latch = self._decide_latch()
        calls = self._plan(latch.shrinking)
        values = self._update_copies(calls, grads, grad_scale) if self.low_moments else {}

        # Nothing below allocates.
        if latch.latched is not None:
            self.latched.copy_(latch.latched)
        self.steps.add_(self.taken)
        if self.low_moments:
            for target, value in values.items():
                target.copy_(value)
        else:
            for call in calls:
                call.update(grads, grad_scale)
        # Round the working copies into the parameters.
        for scratch in self.scratch:
            scratch.store(self.present)
        _copy_where([self.present[i] for i in self.watched], self.mastered, self.masters)

    def _read(self, gradients: Gradients) -> list[Tensor | None]:
        """The gradients in the dtypes and strides of the arithmetic. Note which there are."""
        self.present = [g is not None for g in gradients.tensors]
        self.taken = 1
        if not all(self.present):
            self.taken = upload(self.present, torch.float32, self.device)
        converted = gradients.converted(self.work)
        self.direct = converted is gradients.tensors
        return converted

    def _clip(
        self, grads: Sequence[Tensor | None], grad_scale: Tensor | None, max_norm: float
    ) -> Tensor | None:
        """The divisor that unscales the gradients and clips the norm of all together to
        ``max_norm``: a float32 scalar. None if the norm is not finite.
        """
        present = [g for g in grads if g is not None]
        norms = torch.stack(torch._foreach_norm(present, 2, self.norm_dtype)).float()
        if self.grad_sums:
            indices = upload([*compress(range(len(grads)), self.present)], torch.int64, self.device)
            squares = torch.zeros(len(grads), dtype=torch.float32, device=self.device)
            squares.index_copy_(0, indices, norms.square())
            norms = self.grad_sums.all_reduce_sum_(squares).sqrt()
        one = torch.ones((), dtype=torch.float32, device=self.device)
        scale = one if grad_scale is None else grad_scale.reshape(())
        norm = torch.linalg.vector_norm(norms) / scale
        if not math.isfinite(norm.item()):
            return None
        divisor: Tensor = scale / (max_norm / (norm + 1e-6)).clamp_(max=1.0)
        return divisor

    def _decide_latch(self) -> _Latch:
        """The latch rule, on the values before the update: shrink A if ||A||_F / n > ||B||_F / m,
        else latch the pair. A pair without a gradient of A or a finite norm does neither.
        """
        latched = self.latched.tolist()
        live = [k for k, (a, _) in enumerate(self.pairs) if not latched[a] and self.present[a]]
        if not live:
            return _Latch([], None)
        verdict = self.rule.decide(live, self.work_a, self.work_b, self.never)
        for k in verdict.latch:
            a = self.pairs[k].a
            latched[a] = int(self.steps[a].item()) + 1
        shrinking = [self.pairs[k].a for k in verdict.shrink]
        return _Latch(
            shrinking, upload(latched, torch.int32, self.device) if verdict.latch else None
        )

    def _plan(self, shrinking: list[int]) -> list[_FusedCall]:
        """The calls of this step, reused if the same gradients are present and the same A's shrink
        as before.
        """
        key = (self.present, shrinking)
        if key == self.calls_key:
            return self.calls
        shrinking_set = set(shrinking)
        alike: dict[tuple[int, bool, bool], list[int]] = {}
        for i, member in enumerate(self.members):
            if self.present[i]:
                is_float64 = member.param.dtype is torch.float64
                alike.setdefault((id(member.setting), i in shrinking_set, is_float64), []).append(i)
        self.calls = []
        for indices in alike.values():
            members = [self.members[i] for i in indices]
            call = _FusedCall(
                members=members,
                indices=indices,
                shrinks=indices[0] in shrinking_set,
                params=[self.work[i] for i in indices],
                exp_avgs=[member.entry["exp_avg"] for member in members],
                exp_avg_sqs=[member.entry["exp_avg_sq"] for member in members],
                steps=[member.entry["step"] for member in members],
            )
            self.calls.append(call)
        self.calls_key = key
        return self.calls

    def _update_copies(
        self,
        calls: Sequence[_FusedCall],
        grads: Sequence[Tensor | None],
        grad_scale: Tensor | None,
    ) -> dict[Tensor, Tensor]:
        """With moments in few bits: the new value of each tensor that the step changes. Rounding
        moments allocates, so nothing is written before all values exist.

        One call's moments are in float32 at a time.
        """
        if grad_scale is not None:
            # The fused operator writes the unscaled gradients back.
            grads = [g if g is None else g.clone() for g in grads]
        values: dict[Tensor, Tensor] = {}
        for call in calls:
            copy = call._replace(
                params=[p.clone() for p in call.params],
                exp_avgs=[
                    load_moment(member.entry, "exp_avg", p.dtype)
                    for member, p in zip(call.members, call.params, strict=True)
                ],
                exp_avg_sqs=[
                    load_moment(member.entry, "exp_avg_sq", p.dtype)
                    for member, p in zip(call.members, call.params, strict=True)
                ],
                steps=[step + 1 for step in call.steps],
            )
            copy.update(grads, grad_scale)
            values.update(zip(call.params, copy.params, strict=True))
            for k, member in enumerate(call.members):
                moments = [copy.exp_avgs[k], copy.exp_avg_sqs[k]]
                elements = member.shard.element_indices(moments[0].numel(), self.device)
                word = (copy.steps[k].int() + self.seeds[call.indices[k]]).reshape(1)
                values |= _rounded_moments(member.entry, moments, mix_(elements ^ mix_(word)))
        return values


def _rounded_moments(
    entry: Entry, moments: Sequence[Tensor], words: Tensor
) -> dict[Tensor, Tensor]:
    """The new values of the stored moments of ``entry``, rounded at random by
    ``reference.optimizer.moment_noise_ref``.

    Args:
        moments: exp_avg and exp_avg_sq in the dtype of the arithmetic; float64 is not rounded.
        words: int32, the words that round the parameter's elements.
    """
    values: dict[Tensor, Tensor] = {}
    words = mix_(words.add_(MOMENT_WORD - 2**32))
    for name, moment in zip(MOMENTS, map(flat, moments), strict=True):
        stored = flat(entry[name])
        if stored.dtype is torch.uint8:
            values[stored], values[entry[f"{name}_scale"]] = encode8(
                moment, words, name == "exp_avg"
            )
            words = mix_(words.add_(MOMENT_WORD - 2**32))
        else:
            if stored.dtype is not torch.float64:
                moment = stochastic_round(moment, stored.dtype, words)
            values[stored] = moment
            words = words >> 16
    return values


class _Scratch:
    """float32 working copies of all parameters of one low-precision dtype, in one buffer."""

    def __init__(self, dtype: torch.dtype, members: Sequence[Member], indices: list[int]) -> None:
        """Make the buffer, uninitialized.

        Args:
            dtype: torch.bfloat16 or torch.float16.
            members: the parameters of that dtype.
            indices: their indices among the engine's members.
        """
        self.dtype = dtype
        self.indices = indices
        self.params = [member.param for member in members]
        device = self.params[0].device
        sizes = [p.numel() for p in self.params]
        self.flat = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        self.repeats = upload(sizes, torch.int64, device)
        self.indices_on_device = upload(indices, torch.int64, device)
        self.element_indices = torch.cat(
            [
                member.shard.element_indices(size, device)
                for member, size in zip(members, sizes, strict=True)
            ]
        )
        # In the parameters' shapes and strides.
        self.views = [
            copy.as_strided(p.shape, p.stride(), copy.storage_offset())
            for copy, p in zip(self.flat.split(sizes), self.params, strict=True)
        ]

    def load(self, steps: Tensor, seeds: Tensor) -> None:
        """Copy the parameters into the buffer, and allocate what :meth:`store` needs; one int32 a
        member of the engine.
        """
        torch._foreach_copy_(self.views, self.params)
        keys = mix_(steps[self.indices_on_device] + seeds[self.indices_on_device])
        key_of_element = torch.repeat_interleave(keys, self.repeats, output_size=self.flat.numel())
        noise = mix_(key_of_element ^ self.element_indices)
        self.rounding: Rounding | None = Rounding(noise, self.dtype)

    def store(self, present: list[bool]) -> None:
        """Round the copies of present members back; ``present`` holds one bool a member of the
        engine.
        """
        assert self.rounding is not None
        self.rounding.round_(self.flat)
        self.rounding = None
        _copy_where([present[i] for i in self.indices], self.params, self.views)


def _copy_where(
    chosen: Sequence[bool], targets: Sequence[Tensor], sources: Sequence[Tensor]
) -> None:
    """Copy those of ``sources`` that are chosen."""
    if any(chosen):
        torch._foreach_copy_(list(compress(targets, chosen)), list(compress(sources, chosen)))
