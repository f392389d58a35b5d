"""The optimizer step as one Triton launch: the tables it reads, kept on the device, and the operator that it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..kernels import stable_adamw as kernels
from ..kernels import stable_adamw_tables as tables
from .stable_adamw import Pair, dense_like, init_moments, moment_names, take_counters
from .stable_adamw_rounding import seed_word, upload
from .stable_adamw_settings import Member, Setting
from .stable_adamw_storage import Storage, follow_parameters, make_masters

# Not custom_op, whose wrapper costs four times as much for hundreds of tensors. The tables hold the addresses of the
# tensors in the lists, which are there to declare what is read and written; so this op can't be traced on copies of them.
torch.library.define(
    "stablelora_kernels::stable_adamw_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] moments, Tensor(c!) steps, Tensor(d!) ticks, Tensor(e!) latched, "
    "Tensor(f!) squares, Tensor(g!) grad_squares, Tensor(h!) skipped, Tensor tensors, Tensor addresses, Tensor chunks, "
    "Tensor hyper, Tensor words, Tensor? grad_scale, Tensor? found_inf, float? max_grad_norm, bool measure, int flags, "
    "int variants, int chunk) -> ()",
)


@torch.library.impl("stablelora_kernels::stable_adamw_", ("cpu", "cuda"))
def _stable_adamw(params: list[Tensor], grads: list[Tensor], moments: list[Tensor], *arguments: Any) -> None:
    kernels.stable_adamw(*arguments)


@torch.library.register_fake("stablelora_kernels::stable_adamw_")
def _stable_adamw_fake(*args: Any, **kwargs: Any) -> None:
    return None


_MOMENTS = ("exp_avg", "exp_avg_sq")


class TritonStep:
    """The step on one device, with the interface of :class:`~stablelora_kernels.ops.stable_adamw.TorchStep`.

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
        self.moments = [[state[p][key] for key in moment_names(groups[group])] for p, group, _ in members]
        # An empty tensor has one chunk too, for its counters.
        counts = [max(1, -(-p.numel() // self.CHUNK)) for p in self.params]
        self.firsts = _starts(counts)
        self._make_counters(state, counts)
        self._make_tables(counts)
        self.watched = [self.params[place] for pair in pairs for place in pair]
        self.versions: list[int] | None = None
        self.address_key: list[tuple[int, int]] | None = None
        self.hyper_key: list[tuple[Any, ...]] | None = None
        self.cells: dict[tuple[int, str], Tensor] = {}

    def _make_counters(self, state: dict[Tensor, dict[str, Any]], counts: list[int]) -> None:
        """The counters of every chunk, from the state, whose entries become views of the first chunks' counters."""
        total, repeats = sum(counts), upload(counts, torch.int64, self.device)
        old_steps = take_counters([state[p].get("step") for p in self.params], torch.float32, self.device)
        old_latched = take_counters([state[p].get("latched_at") for p in self.params], torch.int32, self.device)
        self.steps = torch.repeat_interleave(old_steps, repeats, output_size=total)
        self.latched = torch.repeat_interleave(old_latched, repeats, output_size=total)
        self.ticks = torch.zeros(total, dtype=torch.int32, device=self.device)
        self.squares = torch.zeros(2, total, dtype=torch.float32, device=self.device)
        self.grad_squares = torch.zeros(min(total, tables.MAX_GRAD_SUMS), dtype=torch.float32, device=self.device)
        for p, first in zip(self.params, self.firsts, strict=True):
            state[p]["step"] = self.steps[first]
        for pair in self.pairs:
            state[self.params[pair.a]]["latched_at"] = self.latched[self.firsts[pair.a]]

    def _make_tables(self, counts: list[int]) -> None:
        never = {pair.a for pair in self.pairs if self.groups[self.members[pair.a].group]["stop_condition"] == "never"}
        self.has_never = bool(never)
        roles = {pair.a: tables.ROLE_A_NEVER if pair.a in never else tables.ROLE_A for pair in self.pairs}
        roles |= {pair.b: tables.ROLE_B for pair in self.pairs}
        partners = {place: pair for pair in self.pairs for place in pair}
        masters = {id(p): master.data_ptr() for p, master in zip(self.low, self.masters, strict=True)}
        rows = []
        for i, (p, group, base) in enumerate(self.members):
            addresses = [moment.data_ptr() for moment in self.moments[i]]
            row = [p.data_ptr(), *addresses[:2], p.numel(), group, roles.get(i, tables.ROLE_LONE), base]
            if i in partners:
                a, b = partners[i]
                widths = [max(self.params[a].shape[1], 1), max(self.params[b].shape[0], 1)]
                row += [self.firsts[a], counts[a], self.firsts[b], counts[b], *widths]
            else:
                row += [0] * 6
            rows.append([*row, *(addresses[2:] or [0]), masters.get(id(p), 0)])
            rows[-1] += [scale.data_ptr() for scale in self.scales[i]] or [0, 0]
        self.tensors = upload(rows, torch.int64, self.device)
        chunks = [(i, number) for i, count in enumerate(counts) for number in range(count)]
        self.chunks = upload(chunks, torch.int32, self.device)
        self.kinds = [tables.KINDS.index(p.dtype) for p in self.params]
        self.aligned = [not any(value % 16 for value in (*row[:4], *row[-4:-2])) for row in rows]

    def __call__(
        self,
        grads: Sequence[Tensor | None],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_grad_norm: float | None,
    ) -> None:
        ready = [
            g if g is None else dense_like(p, g if g.dtype is p.dtype else g.to(p.dtype))
            for p, g in zip(self.params, grads, strict=True)
        ]
        self._upload_addresses(ready)
        self._upload_hyper()
        measure = self.versions != [p._version for p in self.watched]
        if measure:
            # The step then reads the first half of the sums.
            self.ticks.zero_()
            follow_parameters(self.masters, self.low)
        present = [i for i, g in enumerate(ready) if g is not None]
        written = [self.params[i] for i in present]
        torch.ops.stablelora_kernels.stable_adamw_(
            written,
            [g for g in ready if g is not None],
            [*(moment for i in present for moment in self.moments[i]), *self.masters, *chain(*self.scales)],
            self.steps,
            self.ticks,
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
            measure,
            self.flags,
            self.variants,
            self.CHUNK,
        )
        # So that a backward pass through what has been overwritten is noticed.
        torch.autograd.graph.increment_version(written)
        self.versions = [p._version for p in self.watched]

    def _upload_addresses(self, grads: list[Tensor | None]) -> None:
        """The address of every gradient, 0 where there is none, and the variant of the kernel's code for its tensor."""
        key = []
        for g, kind, aligned in zip(grads, self.kinds, self.aligned, strict=True):
            # An empty tensor's address is 0 as well, yet its step counts.
            address = 0 if g is None else g.data_ptr() or 16
            key.append((address, 2 * kind + (aligned and address % 16 == 0)))
        if key != self.address_key:
            self.addresses = upload(key, torch.int64, self.device)
            self.variants = sum(1 << code for code in {code for _, code in key})
            self.address_key = key

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
        self.hyper = upload(rows, torch.float32, self.device)
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
        self.words = upload(words, torch.int64, self.device)
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
