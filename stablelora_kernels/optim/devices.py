"""The engines of all devices that hold parameters: which class each is of, which tensors they watch
and write to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.dispatch.first_use import ONE_LAUNCH, OPERATORS
from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.dispatch.tallies import Tally, tally_of
from stablelora_kernels.optim.engine import Member
from stablelora_kernels.optim.options import Storage
from stablelora_kernels.optim.proof import step_fault
from stablelora_kernels.optim.snapshot import Change, Gradients, Snapshot, versions_of
from stablelora_kernels.optim.torch_step import TorchStep
from stablelora_kernels.optim.triton_step import TritonStep
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.utils.tensors import local


class DeviceEngines:
    """The engines, one a device."""

    def __init__(
        self, engines: Sequence[TorchStep | TritonStep], tallies: Sequence[Tally] = ()
    ) -> None:
        self.engines = engines
        # Of the steps of each engine.
        self._tallies = tallies
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

    def members(self) -> Iterator[Member]:
        """The members of all engines."""
        for engine in self.engines:
            yield from engine.members

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

    def note_written(self, written: list[Tensor]) -> None:
        """Note which tensors the steps from now on write to. What others add to the versions has to
        be counted anew.
        """
        if written is not self._written:
            self._written = written
            self._versions_a_step = None

    def count_write(self, last: Snapshot) -> None:
        """Raise the version counters of what a step has written, by which autograd notices a
        backward pass through overwritten values. Count that in ``last``, so that the next step does
        not take it for someone else's write.
        """
        torch.autograd.graph.increment_version(self._written)
        assert last.versions is not None
        if self._versions_a_step is None:
            self._versions_a_step = versions_of(self.watched) - last.versions
        last.versions += self._versions_a_step


def make_engines(
    by_device: Mapping[torch.device, Sequence[Member]],
    pairs: Sequence[LoRAPair],
    storage: Storage,
    skipped_on_device: dict[torch.device, Tensor],
) -> DeviceEngines:
    """An engine for each device. ``skipped_on_device`` gets a counter of skipped steps where a
    device has none.
    """
    # Before an engine is made: a device may be refused.
    classes = {device: _engine_class(device, members) for device, members in by_device.items()}
    engines = []
    tallies = []
    for device, members in by_device.items():
        zero = torch.zeros((), dtype=torch.int32, device=device)
        skipped = skipped_on_device.setdefault(device, zero)
        engine_class = classes[device]
        fault = ""
        if engine_class is TritonStep:
            fault = step_fault(members, pairs, storage)
            engine_class = TorchStep if fault else TritonStep
        engines.append(engine_class(members, pairs, storage, skipped))
        strategy = ONE_LAUNCH if engine_class is TritonStep else OPERATORS
        tallies.append(tally_of("stable_adamw", strategy, fault))
    return DeviceEngines(engines, tallies)


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
