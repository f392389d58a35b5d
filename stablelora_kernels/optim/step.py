"""One step on all devices: what it finds in Python, what of that has changed since the last step, and
the engines that it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.dispatch.first_use import ONE_LAUNCH, OPERATORS
from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.dispatch.tallies import Tally, tally_of
from stablelora_kernels.optim import staging
from stablelora_kernels.optim.engine import (
    Change,
    GradientLayout,
    Gradients,
    Member,
    members_of,
)
from stablelora_kernels.optim.groups import ParamGroup
from stablelora_kernels.optim.options import BUILT, LIVE, UPLOADED, Number
from stablelora_kernels.optim.proof import step_fault
from stablelora_kernels.optim.state import Entry, as_owned
from stablelora_kernels.optim.torch_step import TorchStep
from stablelora_kernels.optim.triton_step import TritonStep
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.utils.tensors import is_sharded, local, local_grad

_live_values = itemgetter(*LIVE)
_built_values = itemgetter(*BUILT)
_uploaded_values = itemgetter(*UPLOADED)
# Of a snapshot: what engines stand for, and what they have uploaded.
_engine_inputs = attrgetter("memory", "backend", "built", "state")
_hyperparameters = attrgetter("uploaded", "tensors")
_version = attrgetter("_version")


class _NoTensorsAreEqual(TorchFunctionMode):
    """Answers ``==`` between tensors with False. Containers do not ask it about an element that
    both hold, so lists and nested dicts are equal if they hold the very same tensors in the same
    places.

    Every step compares some, so all of the work is Python's own comparison of containers: a tenth
    of a microsecond a tensor.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: object = (),
        kwargs: object = None,
    ) -> bool:
        return False


_NO_TENSORS_ARE_EQUAL = _NoTensorsAreEqual()


@dataclass(slots=True, eq=False)
class Snapshot:
    """What a step finds in Python, of the same parameters. The fields of one that stands for no step
    are None.
    """

    # The addresses of all parameters.
    memory: list[int] | None = None
    backend: str = ""
    # Of each group, the values of BUILT and those of UPLOADED.
    built: list[tuple[object, ...]] | None = None
    uploaded: list[tuple[object, ...]] | None = None
    # Of tensors among the live hyperparameters their address, or their number if an engine
    # elsewhere reads it on the host.
    tensors: list[float] | None = None
    # The optimizer's own; the last step's snapshot has a copy.
    state: Mapping[Tensor, Entry] | None = None
    gradients: GradientLayout | None = None
    # Of the parameters that engines watch.
    versions: int | None = None

    def since(self, last: Snapshot) -> Change:
        """What has changed since ``last``."""
        with _NO_TENSORS_ARE_EQUAL:
            other_engines = _engine_inputs(self) != _engine_inputs(last)
            other_hyper = _hyperparameters(self) != _hyperparameters(last)
        if other_engines:
            # New engines know nothing of the last step: all has changed.
            return Change()
        return Change(
            build=False,
            hyper=other_hyper,
            gradients=self.gradients is None or self.gradients != last.gradients,
            written=self.versions != last.versions,
        )


def _live_tensors(groups: Sequence[ParamGroup], on_cpu: bool) -> list[float]:
    """Of every tensor among the live hyperparameters its address, or its number if an engine on a
    GPU reads it on the host.
    """
    values: list[Number] = []
    for group in groups:
        values += _live_values(group)
    return [
        value.item() if value.device.type == "cpu" and not on_cpu else value.data_ptr()
        for value in values
        if isinstance(value, Tensor)
    ]


def versions_of(params: Iterable[Tensor]) -> int:
    """The sum of the versions of ``params``, each of which only rises."""
    return sum(map(_version, params))


class Steps:
    """The steps of an optimizer as long as its groups hold the same parameters: what has changed since
    the last one, and an engine for each device.

    Args:
        groups: the parameter groups.
        pairs: the pairs across them.
        skipped: by device, how many steps were skipped there; an engine counts on.
    """

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        pairs: Sequence[LoRAPair],
        skipped: MutableMapping[torch.device, Tensor],
    ) -> None:
        self.pairs = pairs
        self.skipped = skipped
        self.params_of_groups = [list(group["params"]) for group in groups]
        self.params = [p for params in self.params_of_groups for p in params]
        self.any_sharded = any(map(is_sharded, self.params))
        self._last = Snapshot()
        self._set_engines([])

    def _set_engines(self, engines: list[TorchStep | TritonStep]) -> None:
        self.engines = engines
        self.on_cpu = all(engine.device.type == "cpu" for engine in engines)
        self.any_triton = any(isinstance(engine, TritonStep) for engine in engines)
        # The parameters, and their shards, whose versions tell that someone else wrote to them. An
        # operation on a DTensor raises its own version, and one on its shard that of the shard.
        watched = [engine.members[i] for engine in engines for i in engine.watched]
        shards = [member.param for member in watched if member.param is not member.owner]
        self.watched = [member.owner for member in watched] + shards
        # The tensors that a step writes to, and by how much that raises the sum of the versions
        # watched; None as long as that is not known.
        self._written: list[Tensor] = []
        self._versions_a_step: int | None = None

    def are_of(self, groups: Sequence[ParamGroup]) -> bool:
        """Whether ``groups`` still hold these parameters."""
        with _NO_TENSORS_ARE_EQUAL:
            return [list(group["params"]) for group in groups] == self.params_of_groups

    def gradients(self) -> Gradients:
        """The gradients of all parameters."""
        read = local_grad if self.any_sharded else attrgetter("grad")
        return Gradients.of(list(map(read, self.params)))

    def refresh(self) -> None:
        """Let the next step take all parameters for written to by someone else."""
        self._last.versions = None

    def snapshot(
        self,
        groups: Sequence[ParamGroup],
        state: Mapping[Tensor, Entry],
        gradients: GradientLayout | None,
    ) -> Snapshot:
        """What there is in Python now."""
        params = [local(p) for p in self.params] if self.any_sharded else self.params
        return Snapshot(
            memory=list(map(Tensor.data_ptr, params)),
            backend=settings.backend,
            built=list(map(_built_values, groups)),
            uploaded=list(map(_uploaded_values, groups)),
            tensors=_live_tensors(groups, self.on_cpu),
            state=state,
            gradients=gradients,
            versions=versions_of(self.watched),
        )

    def build(self, groups: Sequence[ParamGroup], state: MutableMapping[Tensor, Entry]) -> None:
        """Check and complete the state, then make one engine for each device that holds parameters."""
        self._last = Snapshot()
        by_device = members_of(groups, self.pairs, state)
        # Before an engine is made: a device may be refused.
        classes = [_engine_class(device, members) for device, members in by_device.items()]
        # Frees the memory of those before.
        self._set_engines([])
        engines: list[TorchStep | TritonStep] = []
        # Of the steps of each engine.
        self._tallies: list[Tally] = []
        for (device, members), engine_class in zip(by_device.items(), classes, strict=True):
            zero = torch.zeros((), dtype=torch.int32, device=device)
            skipped = self.skipped.setdefault(device, zero)
            fault = step_fault(members, self.pairs) if engine_class is TritonStep else ""
            engine = (TorchStep if fault else engine_class)(members, self.pairs, skipped)
            engines.append(engine)
            strategy = ONE_LAUNCH if isinstance(engine, TritonStep) else OPERATORS
            self._tallies.append(tally_of("stable_adamw", strategy, fault))
        self._set_engines(engines)
        for engine in engines:
            for member in engine.members:
                state[member.owner] = as_owned(member.entry, member.owner)

    def take(
        self,
        groups: Sequence[ParamGroup],
        state: MutableMapping[Tensor, Entry],
        gradients: Gradients,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Tell each engine what has changed since the last step, let it take its step, and keep
        what this one found for the next. Arguments as of
        :meth:`~stablelora_kernels.optim.torch_step.TorchStep.step`, on any device.
        """
        now = self.snapshot(groups, state, gradients.layout)
        capturing = staging.capturing()
        change = now.since(self._last)
        state_then = self._last.state
        if change.build:
            if capturing:
                raise RuntimeError(
                    "run step() once before capturing it in a CUDA graph, so that its tables exist"
                )
            self.build(groups, state)
            now = self.snapshot(groups, state, gradients.layout)
            state_then = {p: dict(entry) for p, entry in state.items()}
        # If an engine raises, the next step keeps the engines and tells them everything again.
        self._last = Snapshot(now.memory, now.backend, now.built, state=state_then)
        for engine, tally in zip(self.engines, self._tallies, strict=True):
            tally.calls += 1
            its_gradients = gradients
            if len(self.engines) > 1:
                its_gradients = Gradients.of(
                    [gradients.tensors[member.position] for member in engine.members]
                )
            engine.step(
                its_gradients,
                change,
                moved_to(engine.device, grad_scale),
                moved_to(engine.device, found_inf),
            )
        now.state = state_then
        self._last = now
        self._count_write(gradients.owners(self.params) if change.gradients else self._written)
        # Copies and measurements of a graph exist only once it is replayed.
        if capturing and (change.hyper or change.gradients):
            now.tensors = None
            now.gradients = None
        if capturing and change.written:
            now.versions = None

    def _count_write(self, written: list[Tensor]) -> None:
        """Raise the version counters of what a step has written, by which autograd notices a
        backward pass through overwritten values. Count that in the last snapshot, so that the next
        step does not take it for someone else's write.
        """
        if written is not self._written:
            self._written = written
            self._versions_a_step = None
        torch.autograd.graph.increment_version(written)
        assert self._last.versions is not None
        if self._versions_a_step is None:
            self._versions_a_step = versions_of(self.watched) - self._last.versions
        self._last.versions += self._versions_a_step


def _engine_class(device: torch.device, members: Sequence[Member]) -> type[TorchStep | TritonStep]:
    """The class of the engine that takes the step of the ``members`` on ``device``."""
    has_float64 = any(member.param.dtype is torch.float64 for member in members)
    if has_float64 and settings.backend == "triton":
        raise TypeError("backend 'triton' has no float64 optimizer step; use 'auto' or 'torch'")
    return TorchStep if has_float64 or resolve_backend(device) == "torch" else TritonStep


def moved_to(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    """``scalar`` as float32 on ``device``; of a DTensor, this process's."""
    if scalar is None:
        return None
    return local(scalar).to(device, torch.float32, non_blocking=True)
