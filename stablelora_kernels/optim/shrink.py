"""The shrinkage of the pairs on one device before another optimizer's step, on each backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.optim import staging
from stablelora_kernels.optim.latch import LatchRule, Widths
from stablelora_kernels.optim.options import LOW_PRECISION, Number
from stablelora_kernels.optim.rounding import flat, mix_, stochastic_round
from stablelora_kernels.optim.sharding import LatchMonitor, Shard, ShardSums
from stablelora_kernels.optim.staging import upload

if TYPE_CHECKING:
    from stablelora_kernels.launch.stable_shrink import Memory, Repeated, tables


class Parts(NamedTuple):
    """This process's parts of a pair's tensors, which share their memory."""

    a: Tensor
    b: Tensor
    # A tensor of A's shape, dtype and strides that shrinks with A, or None.
    beside: Tensor | None = None


class ShrinkMember(NamedTuple):
    """One pair as an engine sees it."""

    widths: Widths
    # The elements of A that this process has.
    shard: Shard


class ShrinkStep(NamedTuple):
    """What a step tells an engine, by pair."""

    # What there is of the pairs now; none of it is asked for once all have latched.
    parts: Callable[[], list[Parts]]
    # Whether A has a gradient.
    present: list[bool]
    ratios: list[Number]
    # The seeds' parts of the rounding keys, int32.
    seeds: list[int]
    # float32 scalar; if it is not 0, nothing changes.
    found_inf: Tensor | None


class Counters(NamedTuple):
    """int32 [pairs]: the steps that A has taken, and the one at which the pair latched, 0 for not
    yet.
    """

    steps: Tensor
    latched: Tensor


class _MadeOf(NamedTuple):
    """What a pair's row in the table is made of: addresses, and what else may change."""

    a: int
    b: int
    beside: int
    present: bool
    seed: int

    @classmethod
    def of(cls, parts: Parts, present: bool, seed: int) -> _MadeOf:
        a, b, beside = parts
        at = 0 if beside is None else beside.data_ptr()
        return cls(a.data_ptr(), b.data_ptr(), at, present, seed)


class TorchShrink:
    """On PyTorch's operators. The host decides the latch, so on a GPU it waits for the norms.

    Nothing is written before all has been allocated.
    """

    def __init__(
        self, members: Sequence[ShrinkMember], counters: Counters, sums: ShardSums
    ) -> None:
        self.members = members
        self.counters = counters
        self.sums = sums
        self.device = counters.steps.device
        self.rule = LatchRule([member.widths for member in members], sums, self.device)

    def step(self, step: ShrinkStep) -> None:
        """Shrink or latch each pair whose A has a gradient."""
        if self.device.type == "cuda" and staging.capturing():
            raise RuntimeError(
                f"PyTorch's operators on {self.device} decide the latch on the host, so no CUDA graph can hold this step: use "
                "backend 'triton', and no float64 parameters"
            )
        if step.found_inf is not None and _any_inf(step.found_inf, self.sums):
            return
        steps = self.counters.steps.tolist()
        latched = self.counters.latched.tolist()
        live = [k for k, present in enumerate(step.present) if present and not latched[k]]
        rounded: list[tuple[Tensor, Tensor]] = []
        by_ratio: dict[float, list[Tensor]] = {}
        if live:
            parts = step.parts()
            verdict = self.rule.decide(
                live, [each.a for each in parts], [each.b for each in parts], set()
            )
            for k in verdict.latch:
                latched[k] = steps[k] + 1
            for k in verdict.shrink:
                value = step.ratios[k]
                ratio = value.item() if isinstance(value, Tensor) else value
                for target in (parts[k].a, parts[k].beside):
                    if target is None:
                        continue
                    if target.dtype in LOW_PRECISION:
                        word = steps[k] + 1 + step.seeds[k]
                        rounded.append((target, self._rounded(k, target, ratio, word)))
                    else:
                        by_ratio.setdefault(ratio, []).append(target)
        self.counters.latched.copy_(torch.tensor(latched, dtype=torch.int32))
        self.counters.steps.add_(torch.tensor(step.present, dtype=torch.int32, device=self.device))
        for ratio, targets in by_ratio.items():
            # As a small difference: the product with a rounding of 1 - ratio would drift.
            torch._foreach_add_(targets, targets, alpha=-ratio)
        for target, value in rounded:
            flat(target).copy_(value)

    def _rounded(self, k: int, target: Tensor, ratio: float, word: int) -> Tensor:
        """(1 - ratio) target of pair ``k`` in memory order, rounded at random. ``word``: A's step plus
        the seed's part of the key.
        """
        elements = self.members[k].shard.element_indices(target.numel(), self.device)
        key = mix_(torch.tensor([word], dtype=torch.int64).to(torch.int32))
        x = flat(target).float()
        x.sub_(x * ratio)
        return stochastic_round(x, target.dtype, mix_(elements ^ key.to(self.device)))


class TritonShrink:
    """One launch for all pairs of the device, with the interface of :class:`TorchShrink`. The host
    reads nothing of the device's.
    """

    # Elements that a program sums, and that the last program of a pair shrinks at a time.
    CHUNK = 4096

    def __init__(
        self, members: Sequence[ShrinkMember], counters: Counters, sums: ShardSums
    ) -> None:
        # Triton is optional, so nothing imports a launcher before it is used.
        from stablelora_kernels.launch import stable_shrink as launcher

        self.launcher = launcher
        self.members = members
        self.counters = counters
        self.sums = sums
        self.device = counters.steps.device
        self.summed = bool(sums)
        self.latch_monitor = LatchMonitor(counters.latched, range(len(members)))
        self.ratios = torch.zeros(len(members), dtype=torch.float32, device=self.device)
        self.arrived = torch.zeros(len(members), dtype=torch.int32, device=self.device)
        # Of the last step: what its tables and its launch were made of.
        self.numbers: list[float | None] = []
        self.made_of: list[_MadeOf] = []
        self.found_inf: Tensor | None = None
        self.memory: Memory | None = None
        self.launch: Repeated | None = None
        self.stream: int | None = None
        # What captured launches read, also when later steps have other tables.
        self.captured: list[Memory] = []

    def step(self, step: ShrinkStep) -> None:
        """Shrink or latch each pair whose A has a gradient."""
        self._set_ratios(step.ratios)
        parts = step.parts()
        made_of = list(map(_MadeOf.of, parts, step.present, step.seeds))
        found_inf = step.found_inf
        if found_inf is not None and self.summed:
            found_inf = self.sums.all_reduce_max_(found_inf.clone())
        if self.memory is None or made_of != self.made_of:
            self._check_not_capturing()
            self.made_of = made_of
            self._upload_tables(parts)
            self.launch = None
        assert self.memory is not None
        if self.summed and self.latch_monitor.any_unlatched():
            halves = [each.a for each in parts] + [each.b for each in parts]
            norms = torch.stack(torch._foreach_norm(halves, 2, torch.float64))
            self.memory.squares.copy_(self.sums.all_reduce_sum_(norms.square_()))
        stream = staging.stream_of(self.device)
        if self.stream != stream:
            staging.keep_for_stream(self.memory)
            self.stream = stream
        if self.launch is None or found_inf is not self.found_inf:
            cut = any(member.shard.columns for member in self.members)
            planned = self.launcher.plan_stable_shrink(
                self.memory, found_inf, self.summed, cut, self.variants, self.CHUNK
            )
            self.launch = self.launcher.Repeated(planned)
            self.found_inf = found_inf
        self.launch.run(self.device)
        # Autograd then notices a backward pass through what was overwritten.
        torch.autograd.graph.increment_version([each.a for each in parts])
        if staging.capturing():
            self.captured.append(self.memory)
        if self.summed:
            self.latch_monitor.record()

    def _check_not_capturing(self) -> None:
        if staging.capturing():
            raise RuntimeError(
                "run step() once before capturing it in a CUDA graph, so that the tables of its pairs exist, and let the same "
                "parameters have gradients then"
            )

    def _set_ratios(self, ratios: Sequence[Number]) -> None:
        """Let the device have the ratios; those that are tensors are copied at every step."""
        numbers = [None if isinstance(ratio, Tensor) else ratio for ratio in ratios]
        if numbers != self.numbers:
            if self.numbers and staging.capturing():
                was, now = next(
                    (a, b) for a, b in zip(self.numbers, numbers, strict=True) if a != b
                )
                raise RuntimeError(
                    f"shrink_ratio was {_said(was)} in the last step and is {_said(now)} in the one that a CUDA graph captures: "
                    "run step() once before the capture; a 0-d tensor as shrink_ratio may change between replays"
                )
            self._check_not_capturing()
            known = [0.0 if number is None else number for number in numbers]
            self.ratios.copy_(upload(known, torch.float32, self.device))
            self.numbers = numbers
        # The pairs of a group, which share its tensor, follow one another. Not compared by value,
        # which would read the device.
        first = 0
        for _, of_group in groupby(ratios, id):
            ratio, *others = of_group
            last = first + len(others)
            if isinstance(ratio, Tensor):
                self.ratios[first : last + 1].copy_(ratio.reshape(()), non_blocking=True)
            first = last + 1

    def _upload_tables(self, parts: Sequence[Parts]) -> None:
        """Make the tables of the pairs' addresses and of the programs."""
        rows: list[tables.PairRow] = []
        programs: list[int] = []
        used = 0
        for k, (member, each) in enumerate(zip(self.members, parts, strict=True)):
            row = self._row(member, each, self.made_of[k], len(programs))
            rows.append(row)
            programs += [k] * row.chunks
            used |= 1 << row.a_variant | 1 << row.b_variant
        self.variants = used
        count = 2 * len(rows) if self.summed else len(programs)
        self.memory = self.launcher.Memory(
            pairs=upload(rows, torch.int64, self.device),
            programs=upload(programs, torch.int32, self.device),
            ratios=self.ratios,
            steps=self.counters.steps,
            latched=self.counters.latched,
            arrived=self.arrived,
            squares=torch.zeros(count, dtype=torch.float32, device=self.device),
        )

    def _row(
        self, member: ShrinkMember, parts: Parts, made_of: _MadeOf, first_program: int
    ) -> tables.PairRow:
        """The row of a pair whose programs begin at ``first_program``."""
        a, b, _ = parts
        # An empty tensor has a program too.
        a_chunks, b_chunks = (max(1, -(-t.numel() // self.CHUNK)) for t in (a, b))
        row: tables.PairRow = self.launcher.tables.PairRow(
            a=made_of.a,
            b=made_of.b,
            beside=made_of.beside,
            a_numel=a.numel(),
            b_numel=b.numel(),
            a_variant=self._variant(a.dtype, made_of.a | made_of.beside | a.numel()),
            b_variant=self._variant(b.dtype, made_of.b | b.numel()),
            n=max(member.widths.n, 1),
            m=max(member.widths.m, 1),
            present=int(made_of.present),
            seed=made_of.seed,
            base=member.shard.base,
            shard_columns=member.shard.columns,
            shard_pitch=member.shard.pitch,
            first_program=first_program,
            a_chunks=a_chunks,
            chunks=1 if self.summed else a_chunks + b_chunks,
        )
        return row

    def _variant(self, dtype: torch.dtype, addresses: int) -> int:
        """The variant of the code for a tensor; ``addresses`` has a bit of each address and size."""
        return 2 * self.launcher.tables.KINDS.index(dtype) + (addresses & 15 == 0)


def _any_inf(found_inf: Tensor, sums: ShardSums) -> bool:
    """Whether some process has found an infinite gradient."""
    return bool(sums.all_reduce_max_(found_inf.clone()).item())


def _said(ratio: float | None) -> str:
    """A ratio for an error message; None stands for a tensor's."""
    return "a tensor" if ratio is None else str(ratio)
