"""Sections of ``benchmarks.lab.gpu``: what they are made of, and the process that runs one.

A section is a list of units, each with the columns that name it and a function that yields rows. Sections run in processes of
their own, since an error on a GPU (an illegal address, say) leaves its process unable to go on: the command then starts
another one behind the unit that failed. Rows go to the command through a pipe, as lines of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.lab.gpu.device import CudaDevice, Device, DryDevice

Row = dict[str, Any]
OK, FAILED, SKIPPED, DRY = "ok", "failed", "skipped", "dry"
NEEDS_GPU = "dry: needs a GPU"
# Most important first: the order in which they run, and each one's share of the time.
SECTIONS = {"correctness": 0.26, "layer": 0.33, "regret": 0.14, "step": 0.09, "profile": 0.18}
# A unit that says nothing for this long beyond three times its guess is taken to hang.
SILENCE = 60.0
# Of a message or a traceback, the end of which says what happened.
NOTE_LENGTH = 1500


class Unit(NamedTuple):
    """A piece of a section that succeeds or fails by itself."""

    # The columns that name it; a failure's row has these.
    key: Row
    run: Callable[[], Iterator[Row]]
    # About how many seconds it takes: it is not begun with less left.
    seconds: float = 1.0

    @property
    def name(self) -> str:
        return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.key.values())


class Clock:
    """What is left of a section's time: ``until`` is on the monotonic clock, which all processes of a machine share."""

    def __init__(self, until: float) -> None:
        self._until = until

    def left(self) -> float:
        return self._until - time.monotonic()


def module(section: str) -> Any:
    """The module of a section: it has COLUMNS, and ``units(device, clock, part)``, where a part is (number, of how many)."""
    return importlib.import_module(f"benchmarks._gpu_{section}")


def note_of(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    return text[-NOTE_LENGTH:]


def run_units(
    units: list[Unit], send: Callable[[Row], None], clock: Clock, skip: int, alive: Callable[[], None]
) -> None:
    """Run units from the ``skip``-th on while there is time, and send what comes of them.

    ``alive`` raises if the device can't be used any more, which ends this: whoever reads starts another process.
    """
    send({"plan": len(units)})
    for number, unit in enumerate(units):
        if number < skip:
            continue
        if clock.left() < unit.seconds:
            send({"late": number, "name": unit.name})
            continue
        send({"start": number, "name": unit.name, "key": unit.key, "limit": SILENCE + 3 * unit.seconds})
        begun = time.perf_counter()
        try:
            for row in unit.run():
                send({"row": {**unit.key, "status": OK, **row}})
        except Exception as error:
            send({"row": {**unit.key, "status": FAILED, "note": note_of(error)}})
        send({"done": number, "seconds": time.perf_counter() - begun})
        alive()
    send({"end": True})


def run_child(section: str, part: tuple[int, int], skip: int, until: float, pipe: int, dry: bool) -> None:
    """One section, or a part of it, in this process. ``pipe`` is a file descriptor to write to."""
    import stablelora_kernels as slk

    clock = Clock(until)
    with os.fdopen(pipe, "w", buffering=1) as file:

        def send(message: Row) -> None:
            file.write(json.dumps(message, default=str) + "\n")

        if section == "machine":
            send({"row": machine(dry)})
            send({"end": True})
            return
        device: Device
        if dry:
            # The interpreter's arrays are too small to share, and waiting threads cost more than they do.
            torch.set_num_threads(1)
            device = DryDevice()
        else:
            device = CudaDevice()
        with slk.use_backend("triton"):
            run_units(module(section).units(device, clock, part), send, clock, skip, device.synchronize)


def machine(dry: bool) -> Row:
    """The device, the versions, and what the device reaches."""
    import platform
    import subprocess

    import triton

    from benchmarks.common.measure import environment

    found: Row = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    found |= {key: value for key, value in environment().items() if key not in found}
    if dry:
        return found | {"gpu": None}
    if not torch.cuda.is_available():
        return found | {"gpu": None}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found |= {
        "gpu": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        found["driver"] = done.stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        found["driver"] = f"unknown ({error})"
    return found | CudaDevice().ceilings()
