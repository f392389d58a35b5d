"""The library's own ops on tensors of the CPU, with every launch of theirs on the emulator."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from stablelora_kernels import functional, settings
from stablelora_kernels.dispatch import backend, problem
from stablelora_kernels.kernels import common
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.launch.stable_adamw import Repeated
from stablelora_kernels.ops import plans
from tests.ptx_emulator.machine import Schedule
from tests.ptx_emulator.memory import Faults
from tests.ptx_emulator.runner import run


class Log:
    """The launches that ran, and what was found."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.launches, self.faults = schedule, list[str](), Faults()

    def run(self, launches: Sequence[Any], tables: bool = False) -> None:
        """Run launches in order. ``tables``: kernels reach tensors by tables of addresses, which
        may name any of the process.
        """
        for launch in launches:
            if isinstance(launch, Launch):
                self.faults.merge(run(launch, self.schedule, _tensors() if tables else ()))
                self.launches.append(
                    f"{launch.kernel.__name__.strip('_')} {launch.variant} grid {launch.grid}"
                )
            else:
                launch.run(torch.device("cpu"))
                self.launches.append(launch.variant)


def _tensors() -> list[tuple[torch.Tensor, str]]:
    # Not subclasses, of which some have no memory.
    found = (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))
    return [
        (t.detach(), f"tensor{list(t.shape)}")
        for t in found
        if t.device.type == "cpu" and t.numel()
    ]


@contextmanager
def emulated(schedule: Schedule, processors: int | None = None) -> Iterator[Log]:
    """In the block, the library runs its kernels on the emulator; memory that nobody has written
    holds NaN.

    ``processors``: how many the GPU seems to have; None: as many as such a GPU has.
    """
    # Kernels read the flag when they are imported, which is before it is changed below.
    assert not common.INTERPRETING.value
    log = Log(schedule)
    device = problem.DEVICES[schedule.arch]
    device = device._replace(processors=processors or device.processors)

    def run_op(op: Any, entry: Any, tensors: Any, settings: plans.OpSettings) -> Any:
        results, launches = op.plan(device, op._types.call_of(tensors, settings))
        log.run(launches)
        return results

    with ExitStack() as stack:
        for target, name, value in (
            (backend, "INTERPRETING", True),
            (problem, "device_of", lambda given: device),
            (functional, "key_of", lambda kind, args: None),
            (plans.PlannedOp, "__call__", run_op),
            (Repeated, "run", lambda repeated, device: log.run([repeated._launch], tables=True)),
            (Launch, "run", lambda launch, device: log.run([launch])),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.callback(
            torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        stack.enter_context(settings(backend="triton"))
        yield log
