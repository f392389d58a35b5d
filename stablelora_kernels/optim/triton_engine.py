"""The optimizer step as one Triton launch, and the tables on the device that it reads."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.kernels.stable_adamw import tables
from stablelora_kernels.launch import stable_adamw
from stablelora_kernels.optim import graph_capture as staging
from stablelora_kernels.optim.gradients import Seen, readable
from stablelora_kernels.optim.hyperparameters import Member, Setting
from stablelora_kernels.optim.sharding import ShardSums, Unlatched
from stablelora_kernels.optim.state import (
    Pair,
    Storage,
    follow_parameters,
    init_moments,
    make_masters,
    moment_names,
    take_counters,
)
from stablelora_kernels.optim.stochastic_rounding import seed_word, upload

_version = attrgetter("_version")
# Whether an address is no multiple of 16.
_off_16 = (15).__and__
_MOMENTS = ("exp_avg", "exp_avg_sq")


class TritonStep:
    """The step on one device, with the interface of :class:`~stablelora_kernels.optim.torch_engine.TorchStep`.

    All members are in the tables, with a gradient or without: a step in which other gradients are missing only uploads
    other addresses. The sums of squares that the latch is decided by are measured anew when the tables are built and when
    a parameter's version shows that someone else wrote to it.
    """

    # Elements that one program updates.
    CHUNK = 4096

    def __init__(
        self,
        members: Sequence[Member],
        pairs: Sequence[Pair],
        groups: Sequence[Setting],
        state: dict[Tensor, dict[str, Any]],
        skipped: Tensor,
        storage: Storage,
    ) -> None:
        self.members, self.pairs, self.groups, self.skipped = members, pairs, groups, skipped
        self.params = [member.param for member in members]
        self.device = self.params[0].device
        init_moments(state, members, groups, storage)
        make_masters(state, self.params, storage)
        self.low = [p for p in self.params if storage.has_master(p)]
        self.masters = [state[p]["master"] for p in self.low]
        self.storage_flags = tables.FLAG_MASTER * bool(self.low)
        self.storage_flags |= tables.FLAG_LOW_MOMENTS * (storage.moments_dtype is torch.bfloat16)
        self.storage_flags |= tables.FLAG_8BIT_MOMENTS * (storage.moments_dtype is torch.uint8)
        # In the order of the moments.
        self.scales = [
            [state[p][f"{key}_scale"] for key in _MOMENTS if f"{key}_scale" in state[p]] for p in self.params
        ]
        self.moments = [[state[p][key] for key in moment_names(groups[group])] for p, group, *_ in members]
        # An empty tensor has one chunk too, for its counters.
        counts = [max(1, -(-p.numel() // self.CHUNK)) for p in self.params]
        self.firsts = _starts(counts)
        halves = [place for half in zip(*pairs, strict=True) for place in half]
        self.pair_sums = ShardSums([members[place].owner for place in halves])
        self.grad_sums = ShardSums([member.owner for member in members])
        self.sharded = bool(self.grad_sums)
        self.halves = [state[self.params[place]].get("master", self.params[place]) for place in halves]
        self.totals = torch.zeros(len(halves), dtype=torch.float32, device=self.device)
        self._make_counters(state, counts)
        self.unlatched = Unlatched(self.latched, [self.firsts[pair.a] for pair in pairs])
        self._make_tables(counts)
        capturable = any(group["capturable"] for group in groups)
        size = max(16 * len(members), max(4 * len(tables.HYPER_COLUMNS), 8 * len(tables.WORD_COLUMNS)) * len(groups))
        self.staging = staging.Staging(self.device, size, capturable)
        # Whose versions tell that someone else wrote to them. Versions only rise, so their sum tells it too.
        self.watched_at = [i for i, m in enumerate(members) if i in set(halves) or storage.has_master(m.param)]
        self.watched = [self.params[i] for i in self.watched_at]
        self.versions: int | None = None
        self.dtypes = [p.dtype for p in self.params]
        self.contiguous = all(p.is_contiguous() for p in self.params)
        # Where the gradients in the table lie, if all are read there and not from copies.
        self.seen: Seen | None = None
        self.address_key: tuple[list[int], list[int]] | None = None
        self.present_key: list[int] | None = None
        self.hyper_key: list[tuple[Any, ...]] | None = None
        self.cells: dict[tuple[int, str], Tensor] = {}

    def _make_counters(self, state: dict[Tensor, dict[str, Any]], counts: list[int]) -> None:
        """The counters of every chunk, from the state, whose entries become views of the first chunks' counters."""
        total, repeats = sum(counts), upload(counts, torch.int64, self.device)
        old_steps = take_counters([state[p].get("step") for p in self.params], torch.float32, self.device)
        old_latched = take_counters([state[p].get("latched_at") for p in self.params], torch.int32, self.device)
        self.steps = torch.repeat_interleave(old_steps, repeats, output_size=total)
        self.latched = torch.repeat_interleave(old_latched, repeats, output_size=total)
        self.turns = torch.zeros(total, dtype=torch.int8, device=self.device)
        self.squares = torch.zeros(2, total, dtype=torch.float32, device=self.device)
        sums = 1 if self.sharded else min(total, tables.MAX_GRAD_SUMS)
        self.grad_squares = torch.zeros(sums, dtype=torch.float32, device=self.device)
        for p, first in zip(self.params, self.firsts, strict=True):
            state[p]["step"] = self.steps[first]
        for pair in self.pairs:
            state[self.params[pair.a]]["latched_at"] = self.latched[self.firsts[pair.a]]

    def _make_tables(self, counts: list[int]) -> None:
        never = {pair.a for pair in self.pairs if self.groups[self.members[pair.a].group]["stop_condition"] == "never"}
        self.has_never = bool(never)
        roles = {pair.a: tables.ROLE_A_NEVER if pair.a in never else tables.ROLE_A for pair in self.pairs}
        roles |= {pair.b: tables.ROLE_B for pair in self.pairs}
        partners = {place: (k, pair) for k, pair in enumerate(self.pairs) for place in pair}
        masters = {id(p): master.data_ptr() for p, master in zip(self.low, self.masters, strict=True)}
        # All A's first, then all B's, 4 bytes each.
        totals_at = [self.totals.data_ptr() + 4 * k for k in range(self.totals.numel())]
        rows = []
        for i, (p, group, place, _) in enumerate(self.members):
            addresses = [moment.data_ptr() for moment in self.moments[i]]
            row = [p.data_ptr(), *addresses[:2], p.numel(), group, roles.get(i, tables.ROLE_LONE), place.base]
            if i in partners:
                k, (a, b) = partners[i]
                if self.sharded:
                    row += [totals_at[k], 1, totals_at[len(self.pairs) + k], 1]
                else:
                    row += [self.firsts[a], counts[a], self.firsts[b], counts[b]]
                row += [max(self.members[a].owner.shape[1], 1), max(self.members[b].owner.shape[0], 1)]
            else:
                row += [0] * 6
            row += [*(addresses[2:] or [0]), masters.get(id(p), 0)]
            row += [scale.data_ptr() for scale in self.scales[i]] or [0, 0]
            rows.append([*row, place.columns, place.pitch, self.firsts[i], 0])
        self.tensors = upload(rows, torch.int64, self.device)
        chunks = [i for i, count in enumerate(counts) for _ in range(count)]
        self.chunks = upload(chunks, torch.int32, self.device)
        # The variant of each tensor's code, if its gradient is aligned.
        self.codes = [
            2 * tables.KINDS.index(p.dtype) + (not any(value % 16 for value in (*row[:4], *row[13:15])))
            for p, row in zip(self.params, rows, strict=True)
        ]
        self.storage_flags |= tables.FLAG_SHARDED * self.sharded
        self.storage_flags |= tables.FLAG_CUT * any(member.place.columns for member in self.members)

    def __call__(
        self,
        grads: Sequence[Tensor | None],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_grad_norm: float | None,
        seen: Seen | None,
    ) -> None:
        uploads = len(self.staging.captured)
        ready = grads if seen is not None and seen == self.seen else self._take_gradients(grads, seen)
        self._upload_hyper()
        versions = sum(map(_version, self.watched))
        changed = versions != self.versions
        if changed:
            # The step then reads the first half of the sums.
            self.turns.zero_()
            follow_parameters(self.masters, self.low)
        if self.sharded:
            if found_inf is not None:
                found_inf = self.grad_sums.agree_(found_inf.clone())
            self._sum_over_processes(ready, max_grad_norm)
        # No operator of torch.library's: its lists of tensors cost the host more than anything else here, and who would trace it
        # (step() is left out of graphs) could not run it on copies, as the tables hold addresses.
        stable_adamw.stable_adamw(
            self.steps,
            self.turns,
            self.latched,
            self.squares,
            self.grad_squares,
            self.skipped,
            self.tensors,
            self.addresses,
            self.chunks,
            self.hyper,
            self.words,
            grad_scale,
            found_inf,
            max_grad_norm,
            changed,
            self.flags,
            self.variants,
            self.CHUNK,
        )
        # So that a backward pass through what has been overwritten is noticed.
        torch.autograd.graph.increment_version(self.written)
        self.versions = versions + self.watched_written
        if self.sharded:
            self.unlatched.look()
        if not staging.capturing():
            self.staging.refill()
            return
        # What a graph copies and measures is there when it has been replayed: the next step may not count on it.
        if len(self.staging.captured) > uploads:
            self.address_key = self.hyper_key = self.seen = None
        if changed:
            self.versions = None

    def _take_gradients(self, grads: Sequence[Tensor | None], seen: Seen | None) -> Sequence[Tensor | None]:
        """Put the address of every gradient into the table, 0 where there is none, and the variant of its tensor's code.

        Returns the gradients that are to be read, which are those given or copies in the parameters' dtypes and strides.
        """
        # An empty tensor's address is 0 as well, yet its step counts.
        if seen is not None and self.contiguous and seen[1] == self.dtypes:
            ready, at, direct = grads, [address or 16 for address in seen[0]], True
        else:
            ready, direct = readable(self.params, grads)
            at = [0 if g is None else g.data_ptr() or 16 for g in ready]
        codes = self.codes
        if any(map(_off_16, at)):
            codes = [code - (code & 1 and address & 15 != 0) for code, address in zip(codes, at, strict=True)]
        if (at, codes) != self.address_key:
            present = [i for i, address in enumerate(at) if address]
            table = torch.tensor(array("q", chain(at, codes)), dtype=torch.int64).view(2, -1).t().contiguous()
            self.addresses = self.staging.upload(table, torch.int64)
            if present != self.present_key or self.address_key is None:
                self.present_key = present
                if self.sharded:
                    self.present = self.staging.upload(present, torch.int64)
                self.written = [self.members[i].owner for i in present]
                # This process's part of a sharded parameter has a version of its own, which a step leaves alone.
                written = {i for i in present if self.members[i].owner is self.params[i]}
                self.watched_written = sum(i in written for i in self.watched_at)
            self.variants = sum(1 << code for code in set(codes))
            self.address_key = at, codes
        self.seen = seen if direct else None
        return ready

    def _sum_over_processes(self, grads: Sequence[Tensor | None], max_grad_norm: float | None) -> None:
        """The pairs' sums of squares over all processes while some pair may shrink, and that of the gradients for clipping."""
        if self.unlatched:
            norms = torch.stack(torch._foreach_norm(self.halves, 2, torch.float64))
            self.totals.copy_(self.pair_sums.add_up_(norms.square_()))
        if max_grad_norm is not None:
            norms = torch.stack(torch._foreach_norm([g for g in grads if g is not None], 2, torch.float64))
            squares = torch.zeros(len(grads), dtype=torch.float64, device=self.device)
            squares[self.present] = norms.square_()
            self.grad_squares.copy_(self.grad_sums.add_up_(squares).sum())

    def _upload_hyper(self) -> None:
        """The hyper-parameters of every group, when one of them has changed."""
        living = [
            [self._living(i, name) for name in ("lr", "weight_decay", "shrink_ratio")] for i in range(len(self.groups))
        ]
        key = [
            (
                *group["betas"],
                group["eps"],
                group.lr_ratio,
                group["maximize"],
                group["seed"],
                *(value.data_ptr() if isinstance(value, Tensor) else value for value in values),
                any(isinstance(value, Tensor) for value in values),
            )
            for group, values in zip(self.groups, living, strict=True)
        ]
        if key == self.hyper_key:
            return
        rows = []
        for group, values in zip(self.groups, living, strict=True):
            beta1, beta2 = group["betas"]
            logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
            sign = -1.0 if group["maximize"] else 1.0
            lr, decay, ratio = (0.0 if isinstance(value, Tensor) else value for value in values)
            row = [beta1, 1 - beta1, beta2, 1 - beta2, group["eps"], decay, ratio, sign]
            # The kernel multiplies by the ratio only where the learning rate is a tensor.
            rows.append(
                [*row, *logs, lr * group.lr_ratio, group.lr_ratio if isinstance(values[0], Tensor) else 1.0, 0.0]
            )
        self.hyper = self.staging.upload(rows, torch.float32)
        # The tensors whose addresses are in the table.
        self.living = living
        words = []
        for i, (group, values) in enumerate(zip(self.groups, living, strict=True)):
            own = [self.hyper[i, tables.HYPER_COLUMNS.index(name)] for name in ("lr", "decay", "ratio")]
            lr, decay, ratio = (
                (value if isinstance(value, Tensor) else mine).data_ptr()
                for value, mine in zip(values, own, strict=True)
            )
            words.append([lr, seed_word(group["seed"]), decay, ratio])
        self.words = self.staging.upload(words, torch.int64)
        self.flags = self.storage_flags | tables.FLAG_AMSGRAD * any(group["amsgrad"] for group in self.groups)
        self.flags |= tables.FLAG_NEVER * self.has_never
        self.flags |= tables.FLAG_DYNAMIC * any(
            isinstance(decay, Tensor) or isinstance(ratio, Tensor) or (isinstance(lr, Tensor) and group.lr_ratio != 1)
            for (lr, decay, ratio), group in zip(living, self.groups, strict=True)
        )
        self.hyper_key = key

    def _living(self, group: int, name: str) -> float | Tensor:
        """A hyper-parameter as a float, or as a float32 scalar on the device that keeps its address."""
        value = self.groups[group][name]
        if not isinstance(value, Tensor):
            return value
        if value.device.type == "cpu" != self.device.type:
            return value.item()
        if value.device == self.device and value.dtype is torch.float32:
            return value
        cell = self.cells.setdefault((group, name), torch.empty((), dtype=torch.float32, device=self.device))
        return cell.copy_(value, non_blocking=True)


def _starts(counts: list[int]) -> list[int]:
    """The sum of all counts before each."""
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return starts
