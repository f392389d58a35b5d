"""The whole optimizer step as one Triton launch, and the tables on the device that it reads."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from operator import is_, or_
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.optim import snapshot
from stablelora_kernels.optim.options import Parts
from stablelora_kernels.optim.sharding import LatchMonitor, ShardSums
from stablelora_kernels.optim.snapshot import LIVE, Change, Gradients, layout_of, upload
from stablelora_kernels.optim.state import moment_names, refresh_masters, seed_word, stack_counters

# Nonzero for an address that is no multiple of 16.
_misaligned = (15).__and__


class TritonStep:
    """The step of all parameters on one device, with the interface of :class:`~stablelora_kernels.optim.torch_step.TorchStep`.

    The tables hold all members, with a gradient or without, so a step with other missing gradients only uploads other
    addresses. The sums of squares that decide the latch are measured when the tables are built, and again when a
    parameter's version shows that someone else wrote to it.
    """

    # Elements that one program updates. Twice as many would take twice the registers, and halve the warps of a processor.
    CHUNK = 2048

    def __init__(self, parts: Parts) -> None:
        # Triton is optional, so nothing imports a launcher before it is used.
        from stablelora_kernels.launch import stable_adamw as launcher

        self.launcher, tables = launcher, launcher.tables
        self.members, self.pairs, self.settings, state, skipped, storage = parts
        members, pairs, settings = parts[:3]
        self.max_grad_norm = settings[0]["max_grad_norm"]
        self.params = [member.param for member in members]
        self.device = self.params[0].device
        self.mastered = [p for p in self.params if storage.has_master(p)]
        self.masters = [state[p]["master"] for p in self.mastered]
        # An empty tensor has one chunk too, for its counters.
        self.counts = [max(1, -(-p.numel() // self.CHUNK)) for p in self.params]
        self.first_chunks = list(accumulate(self.counts, initial=0))[:-1]
        # All A's, then all B's.
        halves = [i for half in zip(*pairs, strict=True) for i in half]
        self.halves = [state[self.params[i]].get("master", self.params[i]) for i in halves]
        self.totals = torch.zeros(len(halves), dtype=torch.float32, device=self.device)
        self.pair_sums = ShardSums([members[i].owner for i in halves])
        self.grad_sums = ShardSums([member.owner for member in members])
        self.sharded = bool(self.grad_sums)
        never = {index for index, setting in enumerate(settings) if setting["stop_condition"] == "never"}
        self.never_latch = {pair.a for pair in pairs if members[pair.a].setting_index in never}
        self.memory = self._make_memory(state, skipped)
        self.latch_monitor = LatchMonitor(self.memory.latched, [self.first_chunks[pair.a] for pair in pairs])
        self.flags = tables.FLAG_AMSGRAD * any(setting["amsgrad"] for setting in settings)
        self.flags |= tables.FLAG_NEVER * bool(self.never_latch) | tables.FLAG_MASTER * bool(self.mastered)
        self.flags |= tables.FLAG_LOW_MOMENTS * (storage.moments_dtype is torch.bfloat16)
        self.flags |= tables.FLAG_8BIT_MOMENTS * (storage.moments_dtype is torch.uint8)
        self.flags |= tables.FLAG_SHARDED * self.sharded | tables.FLAG_CUT * any(m.shard.columns for m in members)
        self.seeds = [seed_word(setting["seed"]) for setting in settings]
        setting_bytes = max(4 * len(tables.HyperRow._fields), 8 * len(tables.WordRow._fields))
        size = max(16 * len(members), setting_bytes * len(settings))
        self.staging = snapshot.Staging(self.device, size, any(setting["capturable"] for setting in settings))
        # Members whose versions tell that someone else wrote to them.
        self.watched = [i for i, m in enumerate(members) if i in set(halves) or storage.has_master(m.param)]
        # Of gradients that the step reads without a copy.
        self.dtypes = getattr(layout_of(self.params), "dtypes", None)
        # Whether all gradients in the table are those.
        self.direct = False
        # The indices of parameters with a gradient, on the device, for the sums over processes.
        self.present: Tensor | None = None
        # Hyperparameters in another dtype or on another GPU: by setting and name, a float32 copy; and the copies to make.
        self.cells: dict[tuple[int, str], Tensor] = {}
        self.copied: list[tuple[Tensor, Tensor]] = []
        # The last step's.
        self.stream: int | None = None
        self.launch_key: tuple[Any, ...] = ()
        self.launches: tuple[Any, ...] = ()
        # What captured steps read.
        self.captured: list[tuple[Any, ...]] = []

    def _make_memory(self, state: dict[Tensor, dict[str, Any]], skipped: Tensor) -> Any:
        """What the launches read and write, without the tables that a step uploads.

        One of each counter a chunk; entries of ``state`` become views of the counters of first chunks.
        """
        total, repeats = sum(self.counts), upload(self.counts, torch.int64, self.device)
        old_steps = stack_counters([state[p].get("step") for p in self.params], torch.float32, self.device)
        old_latched = stack_counters([state[p].get("latched_at") for p in self.params], torch.int32, self.device)
        steps = torch.repeat_interleave(old_steps, repeats, output_size=total)
        latched = torch.repeat_interleave(old_latched, repeats, output_size=total)
        grad_sums = 1 if self.sharded else min(total, self.launcher.tables.MAX_GRAD_SUMS)
        memory = self.launcher.Memory(
            steps=steps,
            turns=torch.zeros(total, dtype=torch.int8, device=self.device),
            latched=latched,
            squares=torch.zeros(2, total, dtype=torch.float32, device=self.device),
            grad_squares=torch.zeros(grad_sums, dtype=torch.float32, device=self.device),
            skipped=skipped,
            tensors=upload(self._tensor_rows(state), torch.int64, self.device),
            chunks=upload([i for i, count in enumerate(self.counts) for _ in range(count)], torch.int32, self.device),
        )
        for p, first in zip(self.params, self.first_chunks, strict=True):
            state[p]["step"] = steps[first]
        for pair in self.pairs:
            state[self.params[pair.a]]["latched_at"] = latched[self.first_chunks[pair.a]]
        return memory

    def _tensor_rows(self, state: dict[Tensor, dict[str, Any]]) -> list[Any]:
        """The table of tensors."""
        tables = self.launcher.tables
        pair_columns: dict[int, dict[str, int]] = {}
        for k, (a, b) in enumerate(self.pairs):
            columns = {
                "a_first": self.first_chunks[a],
                "a_count": self.counts[a],
                "b_first": self.first_chunks[b],
                "b_count": self.counts[b],
                "n": max(self.members[a].owner.shape[1], 1),
                "m": max(self.members[b].owner.shape[0], 1),
            }
            if self.sharded:
                # Of 4 bytes each.
                columns["a_first"] = self.totals.data_ptr() + 4 * k
                columns["b_first"] = self.totals.data_ptr() + 4 * (len(self.pairs) + k)
            pair_columns[a] = columns | {"role": tables.ROLE_A_NEVER if a in self.never_latch else tables.ROLE_A}
            pair_columns[b] = columns | {"role": tables.ROLE_B}
        # The table holds the addresses of these.
        self.held: list[list[Tensor]] = []
        # The variant of each tensor's code, if its gradient is aligned.
        self.variant_of: list[int] = []
        rows = []
        for i, (p, setting_index, shard, _) in enumerate(self.members):
            names = (
                *moment_names(self.settings[setting_index]["amsgrad"]),
                "exp_avg_scale",
                "exp_avg_sq_scale",
                "master",
            )
            held = {name: state[p][name] for name in names if name in state[p]}
            self.held.append([*held.values()])
            row = tables.TensorRow(
                param=p.data_ptr(),
                numel=p.numel(),
                setting=setting_index,
                base=shard.base,
                shard_columns=shard.columns,
                shard_pitch=shard.pitch,
                first_chunk=self.first_chunks[i],
                **{name: tensor.data_ptr() for name, tensor in held.items()},
                **pair_columns.get(i, {}),
            )
            rows.append(row)
            values = (row.param, row.exp_avg, row.exp_avg_sq, row.numel, row.max_exp_avg_sq, row.master)
            self.variant_of.append(2 * tables.KINDS.index(p.dtype) + (not any(map(_misaligned, values))))
        return rows

    def step(self, gradients: Gradients, change: Change, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
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
            refresh_masters(self.masters, self.mastered)
        if self.sharded:
            if found_inf is not None:
                found_inf = self.grad_sums.all_reduce_max_(found_inf.clone())
            self._sum_over_processes(grads)
        # Not a torch.library operator: its lists of tensors would cost more host time than all else here. Nor could a tracer
        # run it on copies, since the tables hold addresses.
        if self.stream != (stream := snapshot.stream_of(self.device)):
            # Else the allocator would reuse a table, once a step on another stream replaces it, while this launch reads it.
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
            # The graph reads these at each replay, also when later steps of this engine have others.
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
        columns = [torch.frombuffer(array("q", each), dtype=torch.int64) for each in (addresses, variants)]
        self.memory = self.memory._replace(addresses=self.staging.upload(torch.stack(columns, 1), torch.int64))
        if self.sharded:
            self.present = self.staging.upload([i for i, address in enumerate(addresses) if address], torch.int64)
        return ready

    def _sum_over_processes(self, grads: Sequence[Tensor | None]) -> None:
        """All-reduce the pairs' sums of squares while some pair may shrink, and the gradients' sum of squares for clipping."""
        if self.latch_monitor.any_unlatched():
            norms = torch.stack(torch._foreach_norm(self.halves, 2, torch.float64))
            self.totals.copy_(self.pair_sums.all_reduce_sum_(norms.square_()))
        if self.max_grad_norm is not None:
            norms = torch.stack(torch._foreach_norm([g for g in grads if g is not None], 2, torch.float64))
            squares = torch.zeros(len(grads), dtype=torch.float64, device=self.device)
            squares[self.present] = norms.square_()
            self.memory.grad_squares.copy_(self.grad_sums.all_reduce_sum_(squares).sum())

    def _upload_hyper(self) -> None:
        """Upload the hyperparameters of every setting, and work out whether the launch reads some through addresses."""
        tables, self.copied, rows = self.launcher.tables, [], []
        values = [[self._value(i, name) for name in LIVE] for i in range(len(self.settings))]
        numbers = [[0.0 if isinstance(value, Tensor) else value for value in each] for each in values]
        for setting, (lr, weight_decay, shrink_ratio), (given, *_) in zip(self.settings, numbers, values, strict=True):
            beta1, beta2 = setting["betas"]
            row = tables.HyperRow(
                beta1=beta1,
                one_minus_beta1=1 - beta1,
                beta2=beta2,
                one_minus_beta2=1 - beta2,
                eps=setting["eps"],
                weight_decay=weight_decay,
                shrink_ratio=shrink_ratio,
                sign=-1.0 if setting["maximize"] else 1.0,
                log_beta1=math.log(beta1) if beta1 > 0 else -math.inf,
                log_beta2=math.log(beta2) if beta2 > 0 else -math.inf,
                lr=lr * setting["lr_ratio"],
                # The kernel multiplies by the ratio only a learning rate that is a tensor.
                lr_ratio=setting["lr_ratio"] if isinstance(given, Tensor) else 1.0,
            )
            rows.append(row)
        hyper, fields = self.staging.upload(rows, torch.float32), tables.HyperRow._fields
        words = []
        for i, (seed, each) in enumerate(zip(self.seeds, values, strict=True)):
            own = hyper.data_ptr() + 4 * len(fields) * i
            address = {
                name: value.data_ptr() if isinstance(value, Tensor) else own + 4 * fields.index(name)
                for name, value in zip(LIVE, each, strict=True)
            }
            words.append(tables.WordRow(seed=seed, **address))
        self.memory = self.memory._replace(hyper=hyper, words=self.staging.upload(words, torch.int64))
        # The words hold the addresses of these.
        self.hyper_values = values
        self.dynamic = tables.FLAG_DYNAMIC * any(
            isinstance(decay, Tensor)
            or isinstance(ratio, Tensor)
            or (isinstance(lr, Tensor) and setting["lr_ratio"] != 1)
            for (lr, decay, ratio), setting in zip(values, self.settings, strict=True)
        )

    def _value(self, setting_index: int, name: str) -> float | Tensor:
        """A hyperparameter as a float, or as a float32 scalar on the device that keeps its address."""
        value = self.settings[setting_index][name]
        if not isinstance(value, Tensor):
            return value
        if value.device.type == "cpu" != self.device.type:
            return value.item()
        if value.device == self.device and value.dtype is torch.float32:
            return value
        key = setting_index, name
        if key not in self.cells:
            self.cells[key] = torch.empty((), dtype=torch.float32, device=self.device)
        self.copied.append((self.cells[key], value))
        return self.cells[key]
