"""The whole optimizer step as one Triton launch, and the tables on the device that it reads."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import reduce
from operator import is_, or_
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from stablelora_kernels.optim import staging
from stablelora_kernels.optim.engine import (
    Change,
    Engine,
    Gradients,
    Member,
    Setting,
    layout_of,
)
from stablelora_kernels.optim.options import LIVE, OPTIONS, LiveValues, Number
from stablelora_kernels.optim.rounding import seed_word
from stablelora_kernels.optim.sharding import LatchMonitor
from stablelora_kernels.optim.staging import upload
from stablelora_kernels.optim.state import MOMENTS
from stablelora_kernels.pairs import LoRAPair

if TYPE_CHECKING:
    from stablelora_kernels.launch.stable_adamw import Memory, Repeated, tables

# An address of zero stands for no gradient. An empty tensor's address is 0 too, yet its step
# counts: it gets this one.
_EMPTY = 16
# Nonzero for an address that is no multiple of 16.
_misaligned = (15).__and__


class _LaunchKey(NamedTuple):
    """What a step's launches are made of. If all of it is the last step's very objects, its launches
    repeat.
    """

    memory: Memory
    grad_scale: Tensor | None
    found_inf: Tensor | None
    measure: bool


class TritonStep(Engine):
    """The step of all parameters on one device, with the interface of
    :class:`~stablelora_kernels.optim.torch_step.TorchStep`.

    The tables hold all members, with a gradient or without, so a step with other missing gradients
    only uploads other addresses. The sums of squares that decide the latch are measured when the
    tables are built, and again when a parameter's version shows that someone else wrote to it.
    """

    # Elements that one program updates. Twice as many would take twice the registers, and halve the
    # warps of a processor.
    CHUNK = 2048

    def __init__(
        self,
        members: Sequence[Member],
        pairs: Sequence[LoRAPair],
        skipped: Tensor,
    ) -> None:
        # Triton is optional, so nothing imports a launcher before it is used.
        from stablelora_kernels.launch import stable_adamw as launcher

        self.launcher = launcher
        # How many chunks each member has, each with its own counters. An empty tensor has one too.
        self.counts = [max(1, -(-member.param.numel() // self.CHUNK)) for member in members]
        super().__init__(members, pairs, self.counts)
        self.watched = sorted({*self.halves, *self.watched})
        self.totals = torch.zeros(len(self.halves), dtype=torch.float32, device=self.device)
        self.sharded = bool(self.grad_sums)
        self.settings = list({id(member.setting): member.setting for member in members}.values())
        self.never_latch = {
            pair.a
            for pair in self.pairs
            if members[pair.a].setting.group["stop_condition"] == "never"
        }
        # The table of tensors holds the addresses of these.
        self.held: list[list[Tensor]] = []
        # The variant of each tensor's code, if its gradient is aligned.
        self.variant_of: list[int] = []
        self.memory = self._make_memory(skipped)
        self.latch_monitor = LatchMonitor(
            self.latched, [self.firsts[pair.a] for pair in self.pairs]
        )
        self.flags = self._static_flags()
        self.seeds = [seed_word(setting.group["seed"]) for setting in self.settings]
        # The options that have a column of their name in the table of hyperparameters; live ones
        # may be tensors.
        columns = launcher.tables.HyperRow._fields
        self.columns = [name for name in OPTIONS if name in columns and name not in LIVE]
        self.staging = self._make_staging()
        # Of gradients that the step reads without a copy; None if parameters have no plain layout.
        layout = layout_of(self.params)
        self.dtypes = None if layout is None else layout.dtypes
        # The indices of parameters with a gradient, on the device, for the sums over processes.
        self.present: Tensor | None = None
        # Hyperparameters in another dtype or on another GPU: by setting and name, a float32 scalar;
        # and by scalar the tensor that each step copies to it.
        self.cells: dict[tuple[int, str], Tensor] = {}
        self.copied: dict[Tensor, Tensor] = {}
        # The last step's.
        self.stream: int | None = None
        self.launch_key: _LaunchKey | None = None
        self.launches: tuple[Repeated, ...] = ()
        # What captured launches read, also when later steps have other tensors.
        self.captured: list[list[Tensor]] = []

    def _static_flags(self) -> int:
        """The flags that do not change from step to step."""
        tables = self.launcher.tables
        flags = 0
        for name, flag in tables.FLAG_OF_OPTION.items():
            if any(setting.option(name) != OPTIONS[name].default for setting in self.settings):
                flags |= flag
        if self.mastered:
            flags |= tables.FLAG_MASTER
        moments_dtype = self.settings[0].group["moments_dtype"]
        if moments_dtype is torch.bfloat16:
            flags |= tables.FLAG_LOW_MOMENTS
        if moments_dtype is torch.uint8:
            flags |= tables.FLAG_8BIT_MOMENTS
        if self.sharded:
            flags |= tables.FLAG_SHARDED
        if any(member.shard.columns for member in self.members):
            flags |= tables.FLAG_CUT
        return flags

    def _make_staging(self) -> staging.Staging:
        """Room for the largest table that a step uploads."""
        rows = self.launcher.tables
        setting_bytes = max(4 * len(rows.HyperRow._fields), 8 * len(rows.WordRow._fields))
        address_bytes = 8 * len(rows.AddressRow._fields)
        size = max(address_bytes * len(self.members), setting_bytes * len(self.settings))
        capturable = any(setting.group["capturable"] for setting in self.settings)
        return staging.Staging(self.device, size, capturable)

    def _make_memory(self, skipped: Tensor) -> Memory:
        """What the launches read and write, without the tables that a step uploads."""
        total = sum(self.counts)
        grad_sums = 1 if self.sharded else min(total, self.launcher.tables.MAX_GRAD_SUMS)
        member_of_chunk = [i for i, count in enumerate(self.counts) for _ in range(count)]
        memory: Memory = self.launcher.Memory(
            steps=self.steps,
            turns=torch.zeros(total, dtype=torch.int8, device=self.device),
            latched=self.latched,
            squares=torch.zeros(2, total, dtype=torch.float32, device=self.device),
            grad_squares=torch.zeros(grad_sums, dtype=torch.float32, device=self.device),
            skipped=skipped,
            tensors=upload(self._tensor_rows(), torch.int64, self.device),
            chunks=upload(member_of_chunk, torch.int32, self.device),
        )
        return memory

    def _tensor_rows(self) -> list[tables.TensorRow]:
        """The table of tensors. It fills ``held`` and ``variant_of``."""
        tables = self.launcher.tables
        setting_rows = {id(setting): i for i, setting in enumerate(self.settings)}
        pair_columns = self._pair_columns()
        rows = []
        for i, member in enumerate(self.members):
            p = member.param
            names = (*MOMENTS, "exp_avg_scale", "exp_avg_sq_scale", "master")
            held = {name: member.entry[name] for name in names if name in member.entry}
            self.held.append([*held.values()])
            row = tables.TensorRow(
                param=p.data_ptr(),
                numel=p.numel(),
                setting=setting_rows[id(member.setting)],
                base=member.shard.base,
                shard_columns=member.shard.columns,
                shard_pitch=member.shard.pitch,
                first_chunk=self.firsts[i],
                **{name: tensor.data_ptr() for name, tensor in held.items()},
                **pair_columns.get(i, {}),
            )
            rows.append(row)
            addresses = row.param | row.exp_avg | row.exp_avg_sq | row.master
            is_aligned = not _misaligned(addresses | row.numel)
            self.variant_of.append(2 * tables.KINDS.index(p.dtype) + is_aligned)
        return rows

    def _pair_columns(self) -> dict[int, dict[str, int]]:
        """By a member's index, the columns of TensorRow that describe its pair."""
        tables = self.launcher.tables
        columns_of: dict[int, dict[str, int]] = {}
        for k, (a, b) in enumerate(self.pairs):
            columns = {
                "a_first": self.firsts[a],
                "a_count": self.counts[a],
                "b_first": self.firsts[b],
                "b_count": self.counts[b],
                "n": max(self.members[a].owner.shape[1], 1),
                "m": max(self.members[b].owner.shape[0], 1),
            }
            if self.sharded:
                # Of 4 bytes each.
                columns["a_first"] = self.totals.data_ptr() + 4 * k
                columns["b_first"] = self.totals.data_ptr() + 4 * (len(self.pairs) + k)
            role_of_a = tables.ROLE_A_NEVER if a in self.never_latch else tables.ROLE_A
            columns_of[a] = columns | {"role": role_of_a}
            columns_of[b] = columns | {"role": tables.ROLE_B}
        return columns_of

    def step(
        self,
        gradients: Gradients,
        change: Change,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Take one step; arguments as :meth:`~stablelora_kernels.optim.torch_step.TorchStep.step`."""
        grads = gradients.tensors
        if change.gradients or not self.direct:
            grads = self._upload_gradients(gradients)
        if change.hyper:
            self._upload_hyper()
        for cell, value in self.copied.items():
            cell.copy_(value.reshape(()), non_blocking=True)
        if change.written:
            # The step then reads the first half of the sums, which the launcher measures.
            self.memory.turns.zero_()
            self.refresh_masters()
        if self.sharded:
            if found_inf is not None:
                found_inf = self.grad_sums.all_reduce_max_(found_inf.clone())
            self._sum_over_processes(grads)
        # Not a torch.library operator: its lists of tensors would cost more host time than all else
        # here. Nor could a tracer run it on copies, since the tables hold addresses.
        stream = staging.stream_of(self.device)
        if self.stream != stream:
            # Else the allocator would reuse a table, once a step on another stream replaces it,
            # while this launch reads it.
            staging.keep_for_stream(self._tables())
            self.stream = stream
        key = _LaunchKey(self.memory, grad_scale, found_inf, change.written)
        if self.launch_key is None or not all(map(is_, key, self.launch_key)):
            self.launches = self.launcher.plan_stable_adamw(
                self.memory,
                grad_scale,
                found_inf,
                self.max_grad_norm,
                measure=change.written,
                flags=self.flags | self.dynamic,
                variants=self.variants,
                chunk=self.CHUNK,
            )
            self.launch_key = key
        for launch in self.launches:
            launch.run(self.device)
        if self.sharded:
            self.latch_monitor.record()
        if staging.capturing():
            self.captured.append(self._tables())
        else:
            self.staging.refill()

    def _tables(self) -> list[Tensor]:
        """The tensors on the device that a step's launches, and its sums over processes, read."""
        return [t for t in (*self.memory, self.present) if t is not None]

    def _upload_gradients(self, gradients: Gradients) -> list[Tensor | None]:
        """Upload each gradient's address, 0 for none, and the variant of its tensor's code.

        Returns the gradients to read: those given, or copies in the parameters' dtypes and strides.
        """
        grads = gradients.tensors
        layout = gradients.layout
        if layout is not None and layout.present is None and layout.dtypes == self.dtypes:
            self.direct = True
            addresses = [address or _EMPTY for address in layout.addresses]
        else:
            grads = gradients.converted(self.params)
            self.direct = grads is gradients.tensors
            addresses = [0 if g is None else g.data_ptr() or _EMPTY for g in grads]
        variants = self.variant_of
        if _misaligned(reduce(or_, addresses)):
            variants = [
                variant - (variant & 1 and address & 15 != 0)
                for variant, address in zip(variants, addresses, strict=True)
            ]
        self.variants = sum(1 << variant for variant in set(variants))
        # The columns of AddressRow. torch.tensor would take ten times as long for lists.
        columns = [
            torch.frombuffer(array("q", column), dtype=torch.int64)
            for column in (addresses, variants)
        ]
        table = self.staging.upload(torch.stack(columns, 1), torch.int64)
        self.memory = self.memory._replace(addresses=table)
        if self.sharded:
            present = [i for i, address in enumerate(addresses) if address]
            self.present = self.staging.upload(present, torch.int64)
        return grads

    def _sum_over_processes(self, grads: Sequence[Tensor | None]) -> None:
        """All-reduce the pairs' sums of squares while some pair may shrink, and the gradients' sum
        of squares for clipping.
        """
        if self.latch_monitor.any_unlatched():
            halves = [self.work[i] for i in self.halves]
            norms = torch.stack(torch._foreach_norm(halves, 2, torch.float64))
            self.totals.copy_(self.pair_sums.all_reduce_sum_(norms.square_()))
        if self.max_grad_norm is not None:
            norms = torch.stack(
                torch._foreach_norm([g for g in grads if g is not None], 2, torch.float64)
            )
            squares = torch.zeros(len(grads), dtype=torch.float64, device=self.device)
            squares[self.present] = norms.square_()
            self.memory.grad_squares.copy_(self.grad_sums.all_reduce_sum_(squares).sum())

    def _upload_hyper(self) -> None:
        """Upload the hyperparameters of every setting, and work out whether the launch reads some
        through addresses.
        """
        self.copied = {}
        # The words hold the addresses of these.
        self.live_values = [
            LiveValues(
                *[
                    self._as_read((i, name), value)
                    for name, value in zip(LIVE, setting.live(), strict=True)
                ]
            )
            for i, setting in enumerate(self.settings)
        ]
        self.dynamic = 0
        if any(map(_is_dynamic, self.settings, self.live_values)):
            self.dynamic = self.launcher.tables.FLAG_DYNAMIC
        rows = list(map(self._hyper_row, self.settings, self.live_values))
        hyper = self.staging.upload(rows, torch.float32)
        words = [self._word_row(i, hyper) for i in range(len(self.settings))]
        self.memory = self.memory._replace(
            hyper=hyper, words=self.staging.upload(words, torch.int64)
        )

    def _hyper_row(self, setting: Setting, live: LiveValues) -> tables.HyperRow:
        """The numbers of a setting; 0 for a live one that is a tensor."""
        group = setting.group
        beta1, beta2 = group["betas"]
        row: tables.HyperRow = self.launcher.tables.HyperRow(
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            weight_decay=_number_or_zero(live.weight_decay),
            shrink_ratio=_number_or_zero(live.shrink_ratio),
            sign=-1.0 if group["maximize"] else 1.0,
            log_beta1=math.log(beta1) if beta1 > 0 else -math.inf,
            log_beta2=math.log(beta2) if beta2 > 0 else -math.inf,
            lr=_number_or_zero(live.lr) * setting.lr_ratio,
            # The kernel multiplies by the ratio only a learning rate that is a tensor.
            lr_ratio=setting.lr_ratio if isinstance(live.lr, Tensor) else 1.0,
            **{name: float(cast("float", setting.option(name))) for name in self.columns},
        )
        return row

    def _word_row(self, i: int, hyper: Tensor) -> tables.WordRow:
        """The seed of setting ``i``, and where the kernel finds its live values: in a tensor, or in
        the table ``hyper``.
        """
        fields = self.launcher.tables.HyperRow._fields
        row_address = hyper.data_ptr() + 4 * len(fields) * i
        addresses: dict[str, int] = {}
        for name, value in zip(LIVE, self.live_values[i], strict=True):
            in_table = row_address + 4 * fields.index(name)
            addresses[name] = value.data_ptr() if isinstance(value, Tensor) else in_table
        row: tables.WordRow = self.launcher.tables.WordRow(seed=self.seeds[i], **addresses)
        return row

    def _as_read(self, key: tuple[int, str], value: Number) -> Number:
        """A hyperparameter as the launch reads it: a float, or a float32 scalar on the device that
        keeps its address. Such a scalar is a cell if the owner's tensor has another dtype or GPU;
        each step then copies to it.
        """
        if not isinstance(value, Tensor):
            return value
        if value.device.type == "cpu" != self.device.type:
            return value.item()
        if value.device == self.device and value.dtype is torch.float32:
            return value
        if key not in self.cells:
            self.cells[key] = torch.empty((), dtype=torch.float32, device=self.device)
        self.copied[self.cells[key]] = value
        return self.cells[key]


def _is_dynamic(setting: Setting, live: LiveValues) -> bool:
    """Whether the launch reads some live value of a setting through an address, beyond a plain
    learning rate.
    """
    is_scaled_lr = isinstance(live.lr, Tensor) and setting.lr_ratio != 1
    others_are_tensors = isinstance(live.weight_decay, Tensor) or isinstance(
        live.shrink_ratio, Tensor
    )
    return is_scaled_lr or others_are_tensors


def _number_or_zero(value: Number) -> float:
    return 0.0 if isinstance(value, Tensor) else value
