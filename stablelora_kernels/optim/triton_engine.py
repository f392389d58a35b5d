"""The whole optimizer step as one Triton launch, and the tables on the device that it reads."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from operator import attrgetter, is_, or_
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.optim import graph_capture
from stablelora_kernels.optim.gradients import Gradients, Layout, convert_gradients, layout_of
from stablelora_kernels.optim.graph_capture import upload
from stablelora_kernels.optim.hyperparameters import Member, Setting
from stablelora_kernels.optim.sharding import LatchMonitor, ShardSums
from stablelora_kernels.optim.state import (
    Pair,
    Storage,
    init_masters,
    init_moments,
    moment_names,
    refresh_masters,
    stack_counters,
)
from stablelora_kernels.optim.stochastic_rounding import seed_word

_version = attrgetter("_version")
# Nonzero for an address that is no multiple of 16.
_misaligned = (15).__and__
_TENSOR_HYPERPARAMETERS = ("lr", "weight_decay", "shrink_ratio")


class TritonStep:
    """The step of all parameters on one device, with the interface of :class:`~stablelora_kernels.optim.torch_engine.TorchStep`.

    The tables hold all members, with a gradient or without, so a step with other missing gradients only uploads other
    addresses. The sums of squares that decide the latch are measured when the tables are built, and again when a
    parameter's version shows that someone else wrote to it.
    """

    # Elements that one program updates.
    CHUNK = 4096
    # Norms come from sums of squares in float32 alone.
    float32_squares = True

    def __init__(
        self,
        members: Sequence[Member],
        pairs: Sequence[Pair],
        settings: Sequence[Setting],
        state: dict[Tensor, dict[str, Any]],
        skipped: Tensor,
        storage: Storage,
    ) -> None:
        """As :class:`~stablelora_kernels.optim.torch_engine.TorchStep`."""
        # Triton is optional, so nothing imports a launcher before it is used.
        from stablelora_kernels.launch import stable_adamw as launcher

        self.launcher, tables = launcher, launcher.tables
        self.members, self.pairs, self.settings, self.skipped = members, pairs, settings, skipped
        self.params = [member.param for member in members]
        self.device = self.params[0].device
        init_moments(state, members, settings, storage)
        init_masters(state, self.params, storage)
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
        self._make_counters(state)
        self.latch_monitor = LatchMonitor(self.latched, [self.first_chunks[pair.a] for pair in pairs])
        never = {index for index, setting in enumerate(settings) if setting["stop_condition"] == "never"}
        self.never_latch = {pair.a for pair in pairs if members[pair.a].setting_index in never}
        self._make_tables(state)
        self.fixed_flags = tables.FLAG_NEVER * bool(self.never_latch) | tables.FLAG_MASTER * bool(self.mastered)
        self.fixed_flags |= tables.FLAG_LOW_MOMENTS * (storage.moments_dtype is torch.bfloat16)
        self.fixed_flags |= tables.FLAG_8BIT_MOMENTS * (storage.moments_dtype is torch.uint8)
        self.fixed_flags |= tables.FLAG_SHARDED * self.sharded
        self.fixed_flags |= tables.FLAG_CUT * any(member.shard.columns for member in members)
        capturable = any(setting["capturable"] for setting in settings)
        setting_bytes = max(4 * len(tables.HyperRow._fields), 8 * len(tables.WordRow._fields))
        size = max(16 * len(members), setting_bytes * len(settings))
        self.staging = graph_capture.Staging(self.device, size, capturable)
        # Members whose versions tell that someone else wrote to them. Versions only rise, so their sum tells it too.
        self.watched_indices = [i for i, m in enumerate(members) if i in set(halves) or storage.has_master(m.param)]
        self.watched = [self.params[i] for i in self.watched_indices]
        self.versions: int | None = None
        layout = layout_of(self.params)
        # That of gradients which the step reads without a copy.
        self.dtypes = None if layout is None else layout.dtypes
        # The layout of the gradients in the table, if the step reads all of them without a copy.
        self.layout: Layout | None = None
        self.address_key: tuple[list[int], list[int]] | None = None
        self.everyone = list(range(len(members)))
        self.present_key: list[int] | None = None
        self.hyper_key: list[tuple[Any, ...]] | None = None
        self.cells: dict[tuple[int, str], Tensor] = {}
        # The last step's.
        self.stream: int | None = None
        self.launch_key: tuple[Any, ...] = ()
        self.launches: tuple[Any, ...] = ()
        # Tables of captured steps.
        self.captured: list[tuple[Tensor, ...]] = []

    def _make_counters(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """One of each counter a chunk; entries of ``state`` become views of the counters of first chunks."""
        total, repeats = sum(self.counts), upload(self.counts, torch.int64, self.device)
        old_steps = stack_counters([state[p].get("step") for p in self.params], torch.float32, self.device)
        old_latched = stack_counters([state[p].get("latched_at") for p in self.params], torch.int32, self.device)
        self.steps = torch.repeat_interleave(old_steps, repeats, output_size=total)
        self.latched = torch.repeat_interleave(old_latched, repeats, output_size=total)
        self.turns = torch.zeros(total, dtype=torch.int8, device=self.device)
        self.squares = torch.zeros(2, total, dtype=torch.float32, device=self.device)
        sums = 1 if self.sharded else min(total, self.launcher.tables.MAX_GRAD_SUMS)
        self.grad_squares = torch.zeros(sums, dtype=torch.float32, device=self.device)
        for p, first in zip(self.params, self.first_chunks, strict=True):
            state[p]["step"] = self.steps[first]
        for pair in self.pairs:
            state[self.params[pair.a]]["latched_at"] = self.latched[self.first_chunks[pair.a]]

    def _make_tables(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Upload the table of tensors and the map from chunks to tensors."""
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
        self.moments: list[list[Tensor]] = []
        rows = []
        for i, (p, setting_index, shard, _) in enumerate(self.members):
            names = moment_names(self.settings[setting_index])
            held = {name: state[p][name] for name in (*names, "exp_avg_scale", "exp_avg_sq_scale") if name in state[p]}
            self.moments.append(list(held.values()))
            columns = {"param": p.data_ptr(), "numel": p.numel(), "setting": setting_index, "base": shard.base}
            columns |= {name: tensor.data_ptr() for name, tensor in held.items()}
            if "master" in state[p]:
                columns["master"] = state[p]["master"].data_ptr()
            columns |= {"shard_columns": shard.columns, "shard_pitch": shard.pitch}
            columns["first_chunk"] = self.first_chunks[i]
            rows.append(tables.TensorRow(**columns, **pair_columns.get(i, {})))
        self.tensors = upload(rows, torch.int64, self.device)
        chunks = [i for i, count in enumerate(self.counts) for _ in range(count)]
        self.chunks = upload(chunks, torch.int32, self.device)
        # The variant of each tensor's code, if its gradient is aligned.
        self.variant_of = []
        for p, row in zip(self.params, rows, strict=True):
            values = (row.param, row.exp_avg, row.exp_avg_sq, row.numel, row.max_exp_avg_sq, row.master)
            self.variant_of.append(2 * tables.KINDS.index(p.dtype) + (not any(map(_misaligned, values))))

    def step(
        self,
        gradients: Gradients,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_grad_norm: float | None,
    ) -> None:
        """Take one step; arguments as :meth:`~stablelora_kernels.optim.torch_engine.TorchStep.step`."""
        uploads = len(self.staging.captured)
        if self.layout is None or gradients.layout != self.layout:
            gradients = self._take_gradients(gradients)
        self._upload_hyper()
        versions = sum(map(_version, self.watched))
        changed = versions != self.versions
        if changed:
            # The step then reads the first half of the sums, which the launcher measures.
            self.turns.zero_()
            refresh_masters(self.masters, self.mastered)
        if self.sharded:
            if found_inf is not None:
                found_inf = self.grad_sums.all_reduce_max_(found_inf.clone())
            self._sum_over_processes(gradients.tensors, max_grad_norm)
        # Not a torch.library operator: its lists of tensors would cost more host time than all else here. Nor could a tracer
        # run it on copies, since the tables hold addresses.
        counters = (self.steps, self.turns, self.latched, self.squares, self.grad_squares, self.skipped)
        tables = (self.tensors, self.addresses, self.chunks, self.hyper, self.words)
        read = (*tables, self.present) if self.sharded else tables
        if self.stream != (stream := graph_capture.stream_of(self.device)):
            # Else the allocator would reuse a table, once a step on another stream replaces it, while this launch reads it.
            graph_capture.keep_for_stream((*counters, *read))
            self.stream = stream
        # The other arguments never change.
        key = (*tables, grad_scale, found_inf, max_grad_norm, changed, self.flags, self.variants)
        if len(key) != len(self.launch_key) or not all(map(is_, key, self.launch_key)):
            self.launches = self.launcher.plan_stable_adamw(
                *counters,
                *tables,
                grad_scale,
                found_inf,
                max_grad_norm,
                measure=changed,
                flags=self.flags,
                variants=self.variants,
                chunk=self.CHUNK,
            )
            self.launch_key = key
        for launch in self.launches:
            launch.run(self.device)
        # With new versions a backward pass through overwritten values is noticed.
        torch.autograd.graph.increment_version(self.written)
        self.versions = versions + self.watched_written
        if self.sharded:
            self.latch_monitor.record()
        if not graph_capture.capturing():
            self.staging.refill()
            return
        # The graph reads these at each replay, also when later steps of this engine have others.
        self.captured.append(read)
        # A graph's copies and measurements exist only once it is replayed: the next step may not count on them.
        if len(self.staging.captured) > uploads:
            self.address_key = self.hyper_key = self.layout = None
        if changed:
            self.versions = None

    def _take_gradients(self, gradients: Gradients) -> Gradients:
        """Upload each gradient's address, 0 for none, and the variant of its tensor's code.

        Returns the gradients to read: those given, or copies in the parameters' dtypes and strides.
        """
        # An empty tensor's address is 0 too, yet its step counts: hence 16.
        layout = gradients.layout
        direct = layout is not None and layout.dtypes == self.dtypes
        if layout is not None and direct:
            ready, addresses = gradients, [address or 16 for address in layout.addresses]
        else:
            converted, direct = convert_gradients(self.params, gradients.tensors)
            ready, addresses = Gradients(tensors=converted), [0 if g is None else g.data_ptr() or 16 for g in converted]
        variants = self.variant_of
        if _misaligned(reduce(or_, addresses)):
            variants = [
                variant - (variant & 1 and address & 15 != 0)
                for variant, address in zip(variants, addresses, strict=True)
            ]
        if (addresses, variants) != self.address_key:
            present = self.everyone if all(addresses) else [i for i, address in enumerate(addresses) if address]
            columns = [torch.frombuffer(array("q", each), dtype=torch.int64) for each in (addresses, variants)]
            uploaded = self.staging.upload(torch.stack(columns, 1), torch.int64)
            if present != self.present_key or self.address_key is None:
                if self.sharded:
                    self.present = self.staging.upload(present, torch.int64)
                self.present_key = present
                self.written = [self.members[i].owner for i in present]
                # A shard has a version of its own, which a step leaves alone.
                written = {i for i in present if self.members[i].owner is self.params[i]}
                self.watched_written = sum(i in written for i in self.watched_indices)
            if self.address_key is None or variants != self.address_key[1]:
                self.variants = sum(1 << variant for variant in set(variants))
            # After the last allocation: the table of another key would be another step's.
            self.addresses, self.address_key = uploaded, (addresses, variants)
        self.layout = layout if direct else None
        return ready

    def _sum_over_processes(self, grads: Sequence[Tensor | None], max_grad_norm: float | None) -> None:
        """All-reduce the pairs' sums of squares while some pair may shrink, and the gradients' sum of squares for clipping."""
        if self.latch_monitor.any_unlatched():
            norms = torch.stack(torch._foreach_norm(self.halves, 2, torch.float64))
            self.totals.copy_(self.pair_sums.all_reduce_sum_(norms.square_()))
        if max_grad_norm is not None:
            norms = torch.stack(torch._foreach_norm([g for g in grads if g is not None], 2, torch.float64))
            squares = torch.zeros(len(grads), dtype=torch.float64, device=self.device)
            squares[self.present] = norms.square_()
            self.grad_squares.copy_(self.grad_sums.all_reduce_sum_(squares).sum())

    def _upload_hyper(self) -> None:
        """Upload the hyperparameters of every setting if one has changed, and work out the launch's flags."""
        # Of each setting: lr, weight decay and shrink ratio.
        values = [[self._hyper_value(i, name) for name in _TENSOR_HYPERPARAMETERS] for i in range(len(self.settings))]
        key = [
            (
                *setting["betas"],
                setting["eps"],
                setting.lr_ratio,
                setting["maximize"],
                setting["seed"],
                *(value.data_ptr() if isinstance(value, Tensor) else value for value in row),
                any(isinstance(value, Tensor) for value in row),
            )
            for setting, row in zip(self.settings, values, strict=True)
        ]
        if key == self.hyper_key:
            return
        tables = self.launcher.tables
        rows = [self._hyper_row(setting, *row) for setting, row in zip(self.settings, values, strict=True)]
        hyper = self.staging.upload(rows, torch.float32)
        words, hyper_columns = [], tables.HyperRow._fields
        for i, (setting, row) in enumerate(zip(self.settings, values, strict=True)):
            own = hyper[i].data_ptr()
            address = {
                name: value.data_ptr() if isinstance(value, Tensor) else own + 4 * hyper_columns.index(name)
                for name, value in zip(_TENSOR_HYPERPARAMETERS, row, strict=True)
            }
            words.append(tables.WordRow(seed=seed_word(setting["seed"]), **address))
        # After the last allocation: tables of two different steps would not fit together. The words hold these addresses.
        self.words, self.hyper, self.hyper_values = self.staging.upload(words, torch.int64), hyper, values
        self.flags = self.fixed_flags | tables.FLAG_AMSGRAD * any(setting["amsgrad"] for setting in self.settings)
        self.flags |= tables.FLAG_DYNAMIC * any(
            isinstance(decay, Tensor) or isinstance(ratio, Tensor) or (isinstance(lr, Tensor) and setting.lr_ratio != 1)
            for (lr, decay, ratio), setting in zip(values, self.settings, strict=True)
        )
        self.hyper_key = key

    def _hyper_row(
        self, setting: Setting, lr: float | Tensor, weight_decay: float | Tensor, shrink_ratio: float | Tensor
    ) -> Any:
        """The setting's row of the table of hyperparameters, with 0 for a value that is a tensor."""
        beta1, beta2 = setting["betas"]
        return self.launcher.tables.HyperRow(
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            eps=setting["eps"],
            weight_decay=0.0 if isinstance(weight_decay, Tensor) else weight_decay,
            shrink_ratio=0.0 if isinstance(shrink_ratio, Tensor) else shrink_ratio,
            sign=-1.0 if setting["maximize"] else 1.0,
            log_beta1=math.log(beta1) if beta1 > 0 else -math.inf,
            log_beta2=math.log(beta2) if beta2 > 0 else -math.inf,
            lr=0.0 if isinstance(lr, Tensor) else lr * setting.lr_ratio,
            # The kernel multiplies by the ratio only a learning rate that is a tensor.
            lr_ratio=setting.lr_ratio if isinstance(lr, Tensor) else 1.0,
        )

    def _hyper_value(self, setting_index: int, name: str) -> float | Tensor:
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
        return self.cells[key].copy_(value.reshape(()), non_blocking=True)
