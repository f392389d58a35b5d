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
from stablelora_kernels.optim.engine import Change, GradientLayout, Gradients, Member
from stablelora_kernels.optim.groups import ParamGroup
from stablelora_kernels.optim.options import BUILT, LIVE, UPLOADED, Number
from stablelora_kernels.optim.proof import step_fault
from stablelora_kernels.optim.state import Entry
from stablelora_kernels.optim.torch_step import TorchStep
from stablelora_kernels.optim.triton_step import TritonStep
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.utils.tensors import local

_live_values = itemgetter(*LIVE)
_built_values = itemgetter(*BUILT)
_uploaded_values = itemgetter(*UPLOADED)
# Of a snapshot: what engines stand for, and what they have uploaded.
_engine_inputs = attrgetter("memory", "backend", "built", "state")
_hyperparameters = attrgetter("uploaded", "tensors")
_version = attrgetter("_version")


class _NoTensorsAreEqual(TorchFunctionMode):
    """Answers ``==`` between tensors with False. Containers do not ask it about an element that
    both hold.
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


def same_objects(now: object, before: object) -> bool:
    """Whether two lists or nested dicts hold the very same tensors in the same places.

    Every step asks this, so all of the work is Python's own comparison of containers: a tenth of a
    microsecond a tensor.
    """
    with _NO_TENSORS_ARE_EQUAL:
        return now == before


@dataclass(slots=True, eq=False)
class Snapshot:
    """What a step finds in Python. The fields of one that stands for no step are None."""

    # The parameters of each group, and the addresses of all.
    params: list[list[Tensor]]
    memory: list[int] | None = None
    backend: str = ""
    # Of each group, the values of BUILT and those of UPLOADED.
    built: list[tuple[object, ...]] | None = None
    uploaded: list[tuple[object, ...]] | None = None
    # Of tensors among the live hyperparameters their address, or their number if an engine
    # elsewhere reads it on the host.
    tensors: list[float] | None = None
    # The optimizer's own; a snapshot that is kept has a copy.
    state: Mapping[Tensor, Entry] | None = None
    gradients: GradientLayout | None = None
    # Of the parameters that engines watch.
    versions: int | None = None

    @classmethod
    def take(
        cls,
        groups: Sequence[ParamGroup],
        params: Sequence[Tensor],
        state: Mapping[Tensor, Entry],
        engines: DeviceEngines,
        gradients: GradientLayout | None,
    ) -> Snapshot:
        """What there is now; ``params`` are all parameters, or this process's shards."""
        return cls(
            params=[list(group["params"]) for group in groups],
            memory=list(map(Tensor.data_ptr, params)),
            backend=settings.backend,
            built=list(map(_built_values, groups)),
            uploaded=list(map(_uploaded_values, groups)),
            tensors=_live_tensors(groups, engines.on_cpu),
            state=state,
            gradients=gradients,
            versions=versions_of(engines.watched),
        )

    def kept(self) -> Snapshot:
        """This one with a copy of the state."""
        assert self.state is not None
        self.state = {p: dict(entry) for p, entry in self.state.items()}
        return self

    def since(self, last: Snapshot) -> Change:
        """What has changed since ``last``, of which the parameters are the same."""
        # Twice what same_objects does, in one block: every step comes here.
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


class DeviceEngines:
    """The engines, one a device."""

    def __init__(
        self,
        by_device: Mapping[torch.device, Sequence[Member]],
        pairs: Sequence[LoRAPair],
        skipped_on_device: MutableMapping[torch.device, Tensor],
    ) -> None:
        """Make them. ``skipped_on_device`` gets a counter of skipped steps where a device has none."""
        # Before an engine is made: a device may be refused.
        classes = [_engine_class(device, members) for device, members in by_device.items()]
        self.engines: list[TorchStep | TritonStep] = []
        # Of the steps of each engine.
        self._tallies: list[Tally] = []
        for (device, members), engine_class in zip(by_device.items(), classes, strict=True):
            zero = torch.zeros((), dtype=torch.int32, device=device)
            skipped = skipped_on_device.setdefault(device, zero)
            fault = step_fault(members, pairs) if engine_class is TritonStep else ""
            engine = (TorchStep if fault else engine_class)(members, pairs, skipped)
            self.engines.append(engine)
            strategy = ONE_LAUNCH if isinstance(engine, TritonStep) else OPERATORS
            self._tallies.append(tally_of("stable_adamw", strategy, fault))
        self.on_cpu = all(engine.device.type == "cpu" for engine in self.engines)
        self.any_triton = any(isinstance(engine, TritonStep) for engine in self.engines)
        # The parameters, and their shards, whose versions tell that someone else wrote to them. An
        # operation on a DTensor raises its own version, and one on its shard that of the shard.
        watched = [engine.members[i] for engine in self.engines for i in engine.watched]
        shards = [member.param for member in watched if member.param is not member.owner]
        self.watched = [member.owner for member in watched] + shards
        # The tensors that a step writes to, and by how much that raises the sum of the versions
        # watched; None as long as that is not known.
        self._written: list[Tensor] = []
        self._versions_a_step: int | None = None

    def step(
        self,
        gradients: Gradients,
        change: Change,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Take one step on every device; arguments as
        :meth:`~stablelora_kernels.optim.torch_step.TorchStep.step`, on any device.
        """
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
                _moved_to(engine.device, grad_scale),
                _moved_to(engine.device, found_inf),
            )

    def count_write(self, written: list[Tensor] | None, last: Snapshot) -> None:
        """Raise the version counters of what a step has written, by which autograd notices a
        backward pass through overwritten values. Count that in ``last``, so that the next step does
        not take it for someone else's write.

        ``written``: the tensors, or None for those of the step before.
        """
        if written is not None and written is not self._written:
            self._written = written
            self._versions_a_step = None
        torch.autograd.graph.increment_version(self._written)
        assert last.versions is not None
        if self._versions_a_step is None:
            self._versions_a_step = versions_of(self.watched) - last.versions
        last.versions += self._versions_a_step


def _engine_class(device: torch.device, members: Sequence[Member]) -> type[TorchStep | TritonStep]:
    """The class of the engine that takes the step of the ``members`` on ``device``."""
    has_float64 = any(member.param.dtype is torch.float64 for member in members)
    if has_float64 and settings.backend == "triton":
        raise TypeError("backend 'triton' has no float64 optimizer step; use 'auto' or 'torch'")
    return TorchStep if has_float64 or resolve_backend(device) == "torch" else TritonStep


def _moved_to(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    """``scalar`` as float32 on ``device``; of a DTensor, this process's."""
    if scalar is None:
        return None
    return local(scalar).to(device, torch.float32, non_blocking=True)
