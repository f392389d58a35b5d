"""The whole optimizer step as one Triton launch, and the tables on the device that it reads."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import reduce
from operator import is_, or_
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.optim import snapshot
from stablelora_kernels.optim.options import Storage
from stablelora_kernels.optim.sharding import LatchMonitor
from stablelora_kernels.optim.snapshot import LIVE, Change, Gradients, layout_of, upload
from stablelora_kernels.optim.state import Engine, Member, moment_names, seed_word
from stablelora_kernels.pairs import LoRAPair

# Nonzero for an address that is no multiple of 16.
_misaligned = (15).__and__


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
        storage: Storage,
        skipped: Tensor,
    ) -> None:
        # Triton is optional, so nothing imports a launcher before it is used.
        from stablelora_kernels.launch import stable_adamw as launcher

        self.launcher, tables = launcher, launcher.tables
        # Of each member the chunks, each with its own counters. An empty tensor has one too.
        self.counts = [max(1, -(-member.param.numel() // self.CHUNK)) for member in members]
        super().__init__(members, pairs, storage, self.counts)
        self.watched = sorted({*self.halves, *self.watched})
        self.totals = torch.zeros(len(self.halves), dtype=torch.float32, device=self.device)
        self.sharded = bool(self.grad_sums)
        self.settings = list({id(member.setting): member.setting for member in members}.values())
        self.never_latch = {
            a for a, _ in self.pairs if members[a].setting.group["stop_condition"] == "never"
        }
        self.memory = self._make_memory(skipped)
        self.latch_monitor = LatchMonitor(self.latched, [self.firsts[a] for a, _ in self.pairs])
        self.flags = tables.FLAG_AMSGRAD * any(
            setting.group["amsgrad"] for setting in self.settings
        )
        self.flags |= tables.FLAG_NEVER * bool(self.never_latch) | tables.FLAG_MASTER * bool(
            self.mastered
        )
        self.flags |= tables.FLAG_LOW_MOMENTS * (storage.moments_dtype is torch.bfloat16)
        self.flags |= tables.FLAG_8BIT_MOMENTS * (storage.moments_dtype is torch.uint8)
        self.flags |= tables.FLAG_SHARDED * self.sharded | tables.FLAG_CUT * any(
            m.shard.columns for m in members
        )
        self.seeds = [seed_word(setting.group["seed"]) for setting in self.settings]
        setting_bytes = max(4 * len(tables.HyperRow._fields), 8 * len(tables.WordRow._fields))
        size = max(16 * len(members), setting_bytes * len(self.settings))
        capturable = any(setting.group["capturable"] for setting in self.settings)
        self.staging = snapshot.Staging(self.device, size, capturable)
        # Of gradients that the step reads without a copy.
        self.dtypes = getattr(layout_of(self.params), "dtypes", None)
        # The indices of parameters with a gradient, on the device, for the sums over processes.
        self.present: Tensor | None = None
        # Hyperparameters in another dtype or on another GPU: by setting and name, a float32 copy;
        # and the copies to make.
        self.cells: dict[tuple[int, str], Tensor] = {}
        self.copied: list[tuple[Tensor, Tensor]] = []
        # The last step's.
        self.stream: int | None = None
        self.launch_key: tuple[Any, ...] = ()
        self.launches: tuple[Any, ...] = ()
        # What captured steps read.
        self.captured: list[tuple[Any, ...]] = []

    def _make_memory(self, skipped: Tensor) -> Any:
        """What the launches read and write, without the tables that a step uploads."""
        total = sum(self.counts)
        grad_sums = 1 if self.sharded else min(total, self.launcher.tables.MAX_GRAD_SUMS)
        return self.launcher.Memory(
            steps=self.steps,
            turns=torch.zeros(total, dtype=torch.int8, device=self.device),
            latched=self.latched,
            squares=torch.zeros(2, total, dtype=torch.float32, device=self.device),
            grad_squares=torch.zeros(grad_sums, dtype=torch.float32, device=self.device),
            skipped=skipped,
            tensors=upload(self._tensor_rows(), torch.int64, self.device),
            chunks=upload(
                [i for i, count in enumerate(self.counts) for _ in range(count)],
                torch.int32,
                self.device,
            ),
        )

    def _tensor_rows(self) -> list[Any]:
        """The table of tensors."""
        tables, members = self.launcher.tables, self.members
        setting_rows = {id(setting): i for i, setting in enumerate(self.settings)}
        pair_columns: dict[int, dict[str, int]] = {}
        for k, (a, b) in enumerate(self.pairs):
            columns = {
                "a_first": self.firsts[a],
                "a_count": self.counts[a],
                "b_first": self.firsts[b],
                "b_count": self.counts[b],
                "n": max(members[a].owner.shape[1], 1),
                "m": max(members[b].owner.shape[0], 1),
            }
            if self.sharded:
                # Of 4 bytes each.
                columns["a_first"] = self.totals.data_ptr() + 4 * k
                columns["b_first"] = self.totals.data_ptr() + 4 * (len(self.pairs) + k)
            pair_columns[a] = columns | {
                "role": tables.ROLE_A_NEVER if a in self.never_latch else tables.ROLE_A
            }
            pair_columns[b] = columns | {"role": tables.ROLE_B}
        # The table holds the addresses of these.
        self.held: list[list[Tensor]] = []
        # The variant of each tensor's code, if its gradient is aligned.
        self.variant_of: list[int] = []
        rows = []
        for i, member in enumerate(members):
            p, shard = member.param, member.shard
            names = (
                *moment_names(member.setting.group["amsgrad"]),
                "exp_avg_scale",
                "exp_avg_sq_scale",
                "master",
            )
            held = {name: member.entry[name] for name in names if name in member.entry}
            self.held.append([*held.values()])
            row = tables.TensorRow(
                param=p.data_ptr(),
                numel=p.numel(),
                setting=setting_rows[id(member.setting)],
                base=shard.base,
                shard_columns=shard.columns,
                shard_pitch=shard.pitch,
                first_chunk=self.firsts[i],
                **{name: tensor.data_ptr() for name, tensor in held.items()},
                **pair_columns.get(i, {}),
            )
            rows.append(row)
            values = (
                row.param,
                row.exp_avg,
                row.exp_avg_sq,
                row.numel,
                row.max_exp_avg_sq,
                row.master,
            )
            self.variant_of.append(
                2 * tables.KINDS.index(p.dtype) + (not any(map(_misaligned, values)))
            )
        return rows

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
        for cell, value in self.copied:
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
        if self.stream != (stream := snapshot.stream_of(self.device)):
            # Else the allocator would reuse a table, once a step on another stream replaces it,
            # while this launch reads it.
            snapshot.keep_for_stream(t for t in (*self.memory, self.present) if t is not None)
            self.stream = stream
        key = (self.memory, grad_scale, found_inf, change.written)
        if not self.launch_key or not all(map(is_, key, self.launch_key)):
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
        if snapshot.capturing():
            # The graph reads these at each replay, also when later steps of this engine have
            # others.
            self.captured.append((self.memory, self.present))
        else:
            self.staging.refill()

    def _upload_gradients(self, gradients: Gradients) -> list[Tensor | None]:
        """Upload each gradient's address, 0 for none, and the variant of its tensor's code.

        Returns the gradients to read: those given, or copies in the parameters' dtypes and strides.
        """
        ready, layout = gradients.tensors, gradients.layout
        # An empty tensor's address is 0 too, yet its step counts: hence 16.
        if layout is not None and layout.present is None and layout.dtypes == self.dtypes:
            self.direct, addresses = True, [address or 16 for address in layout.addresses]
        else:
            ready, self.direct = gradients.converted(self.params)
            addresses = [0 if g is None else g.data_ptr() or 16 for g in ready]
        variants = self.variant_of
        if _misaligned(reduce(or_, addresses)):
            variants = [
                variant - (variant & 1 and address & 15 != 0)
                for variant, address in zip(variants, addresses, strict=True)
            ]
        self.variants = sum(1 << variant for variant in set(variants))
        columns = [
            torch.frombuffer(array("q", each), dtype=torch.int64) for each in (addresses, variants)
        ]
        self.memory = self.memory._replace(
            addresses=self.staging.upload(torch.stack(columns, 1), torch.int64)
        )
        if self.sharded:
            self.present = self.staging.upload(
                [i for i, address in enumerate(addresses) if address], torch.int64
            )
        return ready

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
        tables, self.copied = self.launcher.tables, []
        # The words hold the addresses of these.
        self.hyper_values = [
            [
                self._value((i, name), value)
                for name, value in zip(LIVE, setting.live(), strict=True)
            ]
            for i, setting in enumerate(self.settings)
        ]
        rows, self.dynamic = [], 0
        for setting, values in zip(self.settings, self.hyper_values, strict=True):
            lr_is_tensor, *others_are = (isinstance(value, Tensor) for value in values)
            lr, weight_decay, shrink_ratio = (
                0.0 if isinstance(value, Tensor) else value for value in values
            )
            # The kernel multiplies by the ratio only a learning rate that is a tensor.
            lr_ratio = setting.lr_ratio if lr_is_tensor else 1.0
            if any(others_are) or lr_ratio != 1:
                self.dynamic = tables.FLAG_DYNAMIC
            beta1, beta2 = setting.group["betas"]
            row = tables.HyperRow(
                beta1=beta1,
                one_minus_beta1=1 - beta1,
                beta2=beta2,
                one_minus_beta2=1 - beta2,
                eps=setting.group["eps"],
                weight_decay=weight_decay,
                shrink_ratio=shrink_ratio,
                sign=-1.0 if setting.group["maximize"] else 1.0,
                log_beta1=math.log(beta1) if beta1 > 0 else -math.inf,
                log_beta2=math.log(beta2) if beta2 > 0 else -math.inf,
                lr=lr * setting.lr_ratio,
                lr_ratio=lr_ratio,
            )
            rows.append(row)
        hyper, fields = self.staging.upload(rows, torch.float32), tables.HyperRow._fields
        words = []
        for i, (seed, values) in enumerate(zip(self.seeds, self.hyper_values, strict=True)):
            own = hyper.data_ptr() + 4 * len(fields) * i
            address = {
                name: value.data_ptr()
                if isinstance(value, Tensor)
                else own + 4 * fields.index(name)
                for name, value in zip(LIVE, values, strict=True)
            }
            words.append(tables.WordRow(seed=seed, **address))
        self.memory = self.memory._replace(
            hyper=hyper, words=self.staging.upload(words, torch.int64)
        )

    def _value(self, key: tuple[int, str], value: float | Tensor) -> float | Tensor:
        """The hyperparameter of a setting as a float, or as a float32 scalar on the device that
        keeps its address.
        """
        if not isinstance(value, Tensor):
            return value
        if value.device.type == "cpu" != self.device.type:
            return value.item()
        if value.device == self.device and value.dtype is torch.float32:
            return value
        if key not in self.cells:
            self.cells[key] = torch.empty((), dtype=torch.float32, device=self.device)
        self.copied.append((self.cells[key], value))
        return self.cells[key]
