"""The whole optimizer step on PyTorch's fused and foreach operators: the CPU path, and a GPU's
without Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.optim import snapshot, state
from stablelora_kernels.optim.options import LOW_PRECISION, Storage
from stablelora_kernels.optim.snapshot import Change, Gradients, upload
from stablelora_kernels.optim.state import Engine, Member, mix_
from stablelora_kernels.pairs import LoRAPair


class _FusedCall(NamedTuple):
    """Members that one call of the fused operator updates: same setting, same dtype, all shrink or
    none.
    """

    members: list[Member]
    # Their places in the engine.
    indices: list[int]
    shrinks: bool
    # What the arithmetic runs on.
    params: list[Tensor]
    # Lists of exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq.
    moments: list[list[Tensor]]
    steps: list[Tensor]

    def update(self, grads: Sequence[Any], grad_scale: Tensor | None) -> None:
        """The shrink, weight decay and AdamW."""
        exp_avgs, exp_avg_sqs, *largest = self.moments
        setting = self.members[0].setting
        group = setting.group
        lr, decay, ratio = (v.item() if isinstance(v, Tensor) else v for v in setting.live())
        lr *= setting.lr_ratio
        if self.shrinks and lr > 1e-12:
            # Shrink and decay are one multiplication: (1 - ratio)(1 - lr wd) = 1 - lr wd'.
            decay += ratio / lr - ratio * decay
        elif self.shrinks:
            torch._foreach_mul_(self.params, 1 - ratio)
        torch._fused_adamw_(
            self.params,
            [grads[i] for i in self.indices],
            exp_avgs,
            exp_avg_sqs,
            largest[0] if largest else [],
            self.steps,
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=decay,
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            grad_scale=grad_scale,
            found_inf=None,
        )


class TorchStep(Engine):
    """The step of all parameters on one device. The host decides the latch, so on a GPU it waits
    for the norms.

    A step allocates first and writes then, so a step that runs out of memory has changed nothing.
    """

    def __init__(
        self,
        members: Sequence[Member],
        pairs: Sequence[LoRAPair],
        storage: Storage,
        skipped: Tensor,
    ) -> None:
        super().__init__(members, pairs, storage, [1] * len(members))
        self.skipped, self.low_moments = skipped, storage.moments_dtype is not torch.float32
        self.seeds = upload(
            [state.seed_word(m.setting.group["seed"]) for m in members], torch.int32, self.device
        )
        # [2, pairs]: multiplied by these, ||A||_F and ||B||_F become ||A||_F / n and ||B||_F / m.
        per_n = [1 / max(members[a].owner.shape[1], 1) for a, _ in self.pairs]
        per_m = [1 / max(members[b].owner.shape[0], 1) for _, b in self.pairs]
        self.inverse_widths = upload([per_n, per_m], torch.float64, self.device)
        # Low-precision parameters without a master are computed in float32 copies.
        self.scratch: list[_Scratch] = []
        for dtype in () if storage.master_weights else LOW_PRECISION:
            if indices := [i for i, p in enumerate(self.params) if p.dtype is dtype]:
                self.scratch.append(_Scratch(dtype, [members[i] for i in indices], indices))
                for i, view in zip(indices, self.scratch[-1].views, strict=True):
                    self.work[i] = view
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
        if self.device.type == "cuda" and snapshot.capturing():
            raise RuntimeError(
                f"PyTorch's operators on {self.device} decide the latch on the host, so no CUDA graph can hold this step: use "
                "backend 'triton', and no float64 parameters"
            )
        # Before anything may skip the step: each change is told once.
        grads = gradients.tensors
        if change.gradients or not self.direct:
            self.present = [g is not None for g in grads]
            self.taken = (
                1 if all(self.present) else upload(self.present, torch.float32, self.device)
            )
            grads, self.direct = gradients.converted(self.work)
        if change.written:
            self.refresh_masters()
        if found_inf is not None and self.grad_sums.all_reduce_max_(found_inf.clone()).item():
            return
        if self.max_grad_norm is not None:
            norm, grad_scale = self._norm_and_clip_scale(grads, grad_scale)
            if not math.isfinite(norm.item()):
                self.skipped += 1
                return
        for scratch in self.scratch:
            scratch.load(self.steps.int() + 1, self.seeds)
        shrinking, latched = self._decide_latch()
        calls = self._plan(shrinking)
        copies = self._update_copies(calls, grads, grad_scale) if self.low_moments else []

        # Nothing below allocates.
        if latched is not None:
            self.latched.copy_(latched)
        self.steps.add_(self.taken)
        for old, new in copies:
            old.copy_(new)
        for call in () if self.low_moments else calls:
            call.update(grads, grad_scale)
        # Round the working copies into the parameters.
        for scratch in self.scratch:
            scratch.store(self.present)
        _copy_where([self.present[i] for i in self.watched], self.mastered, self.masters)

    def _norm_and_clip_scale(
        self, grads: Sequence[Tensor | None], grad_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The norm of the unscaled gradients, and the divisor that unscales and clips them: float32
        scalars.
        """
        norms = torch.stack(
            torch._foreach_norm([g for g in grads if g is not None], 2, self.norm_dtype)
        ).float()
        if self.grad_sums:
            indices = upload([*compress(range(len(grads)), self.present)], torch.int64, self.device)
            squares = torch.zeros(len(grads), dtype=torch.float32, device=self.device)
            squares.index_copy_(0, indices, norms.square())
            norms = self.grad_sums.all_reduce_sum_(squares).sqrt()
        one = torch.ones((), dtype=torch.float32, device=self.device)
        scale = one if grad_scale is None else grad_scale.reshape(())
        total = torch.linalg.vector_norm(norms) / scale
        return total, scale / (self.max_grad_norm / (total + 1e-6)).clamp_(max=1.0)

    def _decide_latch(self) -> tuple[list[int], Tensor | None]:
        """The latch rule, on the values before the update: shrink A if ||A||_F / n > ||B||_F / m,
        else latch the pair.

        Returns:
            The A's that the update shrinks, and the new ``latched`` if a pair latches. Nothing is
            written.
        """
        latched = self.latched.tolist()
        live = [k for k, (a, _) in enumerate(self.pairs) if not latched[a] and self.present[a]]
        if not live:
            return [], None
        scaled = self._scaled_norms(live)
        # In most steps all pairs shrink clearly. A NaN fails the first comparison, an infinity the
        # second. Below the minimum float32 loses some of the squares.
        if bool((scaled[0] * 0.999 > scaled[1].clamp(min=1e-12)).all()) and bool(
            scaled.sum() < math.inf
        ):
            return [self.pairs[k][0] for k in live], None
        shrinking, before = [], list(latched)
        inverse_n, inverse_m = self.inverse_widths.tolist()
        for k, a_norm, b_norm in zip(live, *scaled.tolist(), strict=True):
            a, b = self.pairs[k]
            clear = abs(a_norm - b_norm) > 1e-3 * a_norm and 1e-12 < max(a_norm, b_norm) < math.inf
            if not clear and not self.pair_sums:
                # PyTorch's float32 norm of millions of elements is off by 1e-4, and its squares
                # over- and underflow, so decide a close call and very large or small norms in
                # float64.
                a_norm = self.work[a].double().norm().item() * inverse_n[k]
                b_norm = self.work[b].double().norm().item() * inverse_m[k]
            if not (math.isfinite(a_norm) and math.isfinite(b_norm)):
                continue
            if a_norm > b_norm or self.members[a].setting.group["stop_condition"] == "never":
                shrinking.append(a)
            else:
                latched[a] = int(self.steps[a].item()) + 1
        return shrinking, None if latched == before else upload(latched, torch.int32, self.device)

    def _scaled_norms(self, live: list[int]) -> Tensor:
        """float64 [2, len(live)]: ||A||_F / n and ||B||_F / m of the pairs ``live``, over all
        processes.
        """
        halves = [self.work[self.pairs[k][half]] for half in (0, 1) for k in live]
        if self.pair_sums:
            # In float64 throughout, since deciding a close call again would take a second
            # collective.
            squares = torch.zeros(2, len(self.pairs), dtype=torch.float64, device=self.device)
            squares[:, live] = (
                torch.stack(torch._foreach_norm(halves, 2, torch.float64)).view(2, -1).square()
            )
            norms = self.pair_sums.all_reduce_sum_(squares.view(-1)).view(2, -1).sqrt()[:, live]
        else:
            norms = (
                torch.stack(torch._foreach_norm(halves, 2, self.norm_dtype)).double().view(2, -1)
            )
        return norms * (
            self.inverse_widths if len(live) == len(self.pairs) else self.inverse_widths[:, live]
        )

    def _plan(self, shrinking: list[int]) -> list[_FusedCall]:
        """The calls of this step, reused if the same gradients are present and the same A's shrink
        as before.
        """
        key = (self.present, shrinking)
        if key != self.calls_key:
            shrinks_at = set(shrinking)
            alike: dict[tuple[int, bool, bool], list[int]] = {}
            for i, member in enumerate(self.members):
                if self.present[i]:
                    kind = (
                        id(member.setting),
                        i in shrinks_at,
                        member.param.dtype is torch.float64,
                    )
                    alike.setdefault(kind, []).append(i)
            calls = []
            for (_, shrinks, _), indices in alike.items():
                members, work = [self.members[i] for i in indices], [self.work[i] for i in indices]
                names = (*state.moment_names(members[0].setting.group["amsgrad"]), "step")
                *moments, steps = ([member.entry[name] for member in members] for name in names)
                calls.append(_FusedCall(members, indices, shrinks, work, moments, steps))
            self.calls, self.calls_key = calls, key
        return self.calls

    def _update_copies(
        self, calls: Sequence[_FusedCall], grads: Sequence[Any], grad_scale: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """With moments in few bits: the tensors that the step changes, and their new values.
        Rounding moments allocates.

        One call's moments are in float32 at a time.
        """
        if grad_scale is not None:
            # The fused operator writes the unscaled gradients back.
            grads = [g if g is None else g.clone() for g in grads]
        changes: list[tuple[Tensor, Tensor]] = []
        for call in calls:
            moments = [
                [
                    state.load_moment(m.entry, name, p.dtype)
                    for m, p in zip(call.members, call.params, strict=True)
                ]
                for name in state.moment_names(amsgrad=False)
            ]
            params, steps = [p.clone() for p in call.params], [step + 1 for step in call.steps]
            call._replace(params=params, moments=moments, steps=steps).update(grads, grad_scale)
            changes += zip(call.params, params, strict=True)
            for i, member, step, *values in zip(
                call.indices, call.members, steps, *moments, strict=True
            ):
                indices = member.shard.element_indices(values[0].numel(), self.device)
                words = mix_(indices ^ mix_((step.int() + self.seeds[i]).reshape(1)))
                changes += _rounded_moments(member.entry, values, words)
        return changes


def _rounded_moments(
    entry: dict[str, Any], values: Sequence[Tensor], words: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Views of the moments of ``entry``, and new ones rounded at random by
    ``reference.optimizer.moment_noise_ref``.

    Args:
        values: exp_avg and exp_avg_sq in the dtype of the arithmetic; float64 is not rounded.
        words: int32, the words that round the parameter's elements.
    """
    changes: list[tuple[Tensor, Tensor]] = []
    words = mix_(words.add_(state.MOMENT_WORD - 2**32))
    for name, value in zip(state.moment_names(amsgrad=False), map(state.flat, values), strict=True):
        kept = state.flat(entry[name])
        if kept.dtype is torch.uint8:
            codes, scales = state.encode8(value, words, name == "exp_avg")
            changes += [(kept, codes), (entry[f"{name}_scale"], scales)]
            words = mix_(words.add_(state.MOMENT_WORD - 2**32))
        else:
            changes.append(
                (
                    kept,
                    value
                    if kept.dtype is torch.float64
                    else stochastic_round(value, kept.dtype, words),
                )
            )
            words = words >> 16
    return changes


class _Scratch:
    """float32 working copies of all parameters of one low-precision dtype, in one buffer."""

    def __init__(self, dtype: torch.dtype, members: Sequence[Member], indices: list[int]) -> None:
        """Make the buffer, uninitialized.

        Args:
            dtype: torch.bfloat16 or torch.float16.
            members: the parameters of that dtype.
            indices: their indices among the engine's members.
        """
        self.dtype, self.indices, self.params = dtype, indices, [m.param for m in members]
        self.sizes, device = [p.numel() for p in self.params], self.params[0].device
        self.flat = torch.empty(sum(self.sizes), dtype=torch.float32, device=device)
        self.repeats = upload(self.sizes, torch.int64, device)
        self.indices_on_device = upload(indices, torch.int64, device)
        elements = [
            m.shard.element_indices(size, device)
            for m, size in zip(members, self.sizes, strict=True)
        ]
        self.element_indices = torch.cat(elements)
        # In the parameters' shapes and strides.
        self.views = [
            part.as_strided(p.shape, p.stride(), part.storage_offset())
            for part, p in zip(self.flat.split(self.sizes), self.params, strict=True)
        ]

    def load(self, steps: Tensor, seeds: Tensor) -> None:
        """Copy the parameters into the buffer, and allocate what :meth:`store` needs; one int32 a
        member of the engine.
        """
        torch._foreach_copy_(self.views, self.params)
        keys = mix_(steps[self.indices_on_device] + seeds[self.indices_on_device])
        noise = mix_(
            torch.repeat_interleave(keys, self.repeats, output_size=self.flat.numel())
            ^ self.element_indices
        )
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


class Rounding:
    """Rounds float32 values up or down at random, in place. It allocates all of its memory as it is
    made.
    """

    def __init__(self, noise: Tensor, dtype: torch.dtype) -> None:
        """``noise``: int32 words, one a value. ``dtype``: torch.bfloat16 or torch.float16."""
        # Random bits added below the cut carry into the kept bits with the probability of the
        # fraction cut off.
        self.cut = 0xFFFF if dtype is torch.bfloat16 else 0x1FFF
        self.noise = noise & self.cut
        self.is_nan = torch.empty_like(noise, dtype=torch.bool)
        self.has_subnormals = dtype is torch.float16
        if self.has_subnormals:
            self.thresholds = (2**24 - (noise & 0xFFFFFF)).float().mul_(2.0**-24)
            self.whole, self.fraction = (
                torch.empty_like(self.thresholds),
                torch.empty_like(self.thresholds),
            )
            self.is_small = torch.empty_like(self.is_nan)

    def round_(self, x: Tensor) -> Tensor:
        """Round ``x``, float32 of the noise's shape, to values of the dtype."""
        torch.ne(x, x, out=self.is_nan)
        if self.has_subnormals:
            # Below 2^-14 float16 is subnormal: every step is 2^-24.
            torch.abs(x, out=self.fraction)
            torch.lt(self.fraction, 2.0**-14, out=self.is_small)
            torch.floor(self.fraction.mul_(2.0**24), out=self.whole)
            up = self.fraction.sub_(self.whole).ge_(self.thresholds)
            torch.copysign(self.whole.add_(up).mul_(2.0**-24), x, out=self.whole)
        x.view(torch.int32).add_(self.noise).bitwise_and_(~self.cut)
        if self.has_subnormals:
            torch.where(self.is_small, self.whole, x, out=x)
        # Noise added to a NaN's bits could carry into its sign.
        return x.masked_fill_(self.is_nan, torch.nan)


def stochastic_round(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 ``x`` up or down at random to ``dtype``, bfloat16 or float16; ``noise`` holds
    int32 words of its shape.

    The same bits as :func:`~stablelora_kernels.reference.optimizer.stochastic_round_ref`
    elementwise.
    """
    return Rounding(noise, dtype).round_(x.clone()).to(dtype)
