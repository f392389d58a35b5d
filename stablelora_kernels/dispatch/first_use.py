"""What first use has found of each kind of call, in this process and on disk; and what it may do.

The user's GPU decides, once: the first call of a kind is proven and timed where it runs
(``ops/first_use.py``), and the answer is kept for that GPU, driver, torch, Triton and version of
this package.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch

from stablelora_kernels._version import __version__
from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.dispatch.tiles import Tile

logger = logging.getLogger("stablelora_kernels")

# Among the names of strategies: PyTorch's operators, and the only one of the loss and the optimizer.
OPERATORS = "torch"
ONE_LAUNCH = "one_launch"


@dataclass
class Finding:
    """What is known of a kind of call on one GPU, by the names of strategies: faults by the kind of
    its proof, all else by the kind of its times (``ops/first_use.py``).
    """

    # "", or what a proof has found wrong. A strategy that was not proven is not here.
    faults: dict[str, str] = field(default_factory=dict)
    microseconds: dict[str, float] = field(default_factory=dict)
    # The fastest one, and why. None: nothing was timed.
    fastest: str | None = None
    reason: str = ""
    # Measured tiles, of those that are not the tables'.
    tiles: dict[str, list[int]] = field(default_factory=dict)
    # Whether the disk had it before this process looked.
    is_old: bool = field(default=False, compare=False)

    def tile(self, name: str) -> Tile | None:
        """The tile of a strategy by this name; None is the table's."""
        return Tile(*self.tiles[name]) if name in self.tiles else None


@dataclass(frozen=True)
class Kind:
    """A kind of call: the op, and in words what its launches and their time depend on."""

    op: str
    words: str


def is_on(device: torch.device) -> bool:
    """Whether first use looks at calls on ``device``."""
    value = settings.first_use
    if value == "auto":
        return device.type == "cuda" and not backend.INTERPRETING
    return value != "off"


def tries_tiles() -> bool:
    """Whether it also times other tiles than the tables'."""
    return settings.first_use == "tiles"


@cache
def made_for(device: torch.device) -> str:
    """The GPU and the versions that a finding holds for, in words."""
    import triton

    versions = (
        f"torch {torch.__version__}, triton {triton.__version__}, stablelora_kernels {__version__}"
    )
    if device.type != "cuda" or backend.INTERPRETING:
        return f"Triton's interpreter, {versions}"
    properties = torch.cuda.get_device_properties(device)
    arch = f"{properties.multi_processor_count} processors, {_driver()}"
    return (
        f"{properties.name}, {arch}, cuda {torch.version.cuda}, hip {torch.version.hip}, {versions}"
    )


@cache
def _driver() -> str:
    with suppress(OSError):
        version = re.search(r"\d+\.\d+[.\d]*", Path("/proc/driver/nvidia/version").read_text())
        if version:
            return f"driver {version[0]}"
    return "driver of unknown version"


# By GPU and kind.
_findings: dict[tuple[str, Kind], Finding] = {}
# Faults by GPU, op and strategy; "" of a strategy that is not retired.
_retired: dict[tuple[str, str, str], str] = {}
# Those of them that this process has retired.
_newly_retired: set[tuple[str, str, str]] = set()


def cache_dir() -> Path:
    """The directory of findings: ``first_use`` in the environment's ``STABLELORA_CACHE``, or in
    ``~/.cache/stablelora-kernels``.
    """
    # Unlike Path's, this expanduser never raises.
    folder = os.path.expanduser(os.environ.get("STABLELORA_CACHE") or "~/.cache/stablelora-kernels")
    return Path(folder).absolute() / "first_use"


def _path_of(key: str) -> Path:
    return cache_dir() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def finding_of(kind: Kind, device: torch.device) -> Finding | None:
    """What this process or the disk knows of ``kind``, or None."""
    gpu = made_for(device)
    finding = _findings.get((gpu, kind))
    if finding is None:
        finding = _read_finding(f"{kind.op}: {kind.words}, on {gpu}")
        if finding is not None:
            _findings[(gpu, kind)] = finding
    return finding


def keep(kind: Kind, device: torch.device, finding: Finding) -> None:
    """Keep a finding in this process and on disk."""
    gpu = made_for(device)
    _findings[(gpu, kind)] = finding
    _write(f"{kind.op}: {kind.words}, on {gpu}", asdict(finding))


class Retired(NamedTuple):
    """A strategy of an op that a proof has found wrong on this machine.

    Attributes:
        op: as in :class:`~stablelora_kernels.dispatch.tallies.Tally`.
        strategy: likewise.
        fault: what is wrong, in words.
    """

    op: str
    strategy: str
    fault: str


def retire(op: str, strategy: str, device: torch.device, fault: str) -> None:
    """Take ``strategy`` of ``op`` from all calls on this machine, and warn once."""
    if fault_of(op, strategy, device):
        return
    gpu = made_for(device)
    retired = Retired(op, strategy, fault)
    _retired[(gpu, op, strategy)] = fault
    _newly_retired.add((gpu, op, strategy))
    _write(_retired_key(op, strategy, gpu), retired._asdict())
    warnings.warn(
        f"stablelora_kernels: {op} by {strategy!r} is wrong on this machine ({gpu}): {fault}. PyTorch's operators compute "
        "this call, and no later one takes that strategy; please report it with the output of 'stablelora-kernels doctor "
        "--report'",
        RuntimeWarning,
        stacklevel=2,
    )


def _retired_key(op: str, strategy: str, gpu: str) -> str:
    return f"retired: {op} by {strategy}, on {gpu}"


def fault_of(op: str, strategy: str, device: torch.device) -> str:
    """Why no call of ``op`` may take ``strategy`` on this machine, or ""."""
    gpu = made_for(device)
    place = (gpu, op, strategy)
    fault = _retired.get(place)
    if fault is None:
        answer = _read(_retired_key(op, strategy, gpu)) or {}
        fault = _retired[place] = str(answer.get("fault", ""))
    return fault


def was_retired_before(op: str, strategy: str, device: torch.device) -> bool:
    """Whether the disk had a fault of this strategy before this process looked."""
    place = (made_for(device), op, strategy)
    return bool(fault_of(op, strategy, device)) and place not in _newly_retired


def retired_on(device: torch.device) -> list[Retired]:
    """The strategies that this process knows to be retired on this machine."""
    gpu = made_for(device)
    return [
        Retired(op, strategy, fault)
        for (of_gpu, op, strategy), fault in [*_retired.items()]
        if of_gpu == gpu and fault
    ]


def retired_on_disk(device: torch.device) -> list[Retired]:
    """The strategies that any process has found wrong on this machine."""
    end = f", on {made_for(device)}"
    known = []
    for path in sorted(cache_dir().glob("*.json")):
        # A damaged file may raise anything. Whoever needs its answer looks again.
        with suppress(Exception):
            answer = json.loads(path.read_text())
            if answer["key"].startswith("retired: ") and answer["key"].endswith(end):
                fields = (str(answer[name]) for name in Retired._fields)
                known.append(Retired(*fields))
    return known


class Unprovable(Exception):
    """The call's frozen operands can't show what a kernel does, such as a weight with NaN in it."""


def may_run(device: torch.device) -> bool:
    """Whether launches may run that are not the call's. A capture would record them."""
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def prove(
    kind: Kind,
    device: torch.device,
    finding: Finding,
    strategy: str,
    find_fault: Callable[[], str],
) -> None:
    """Note in ``finding`` what ``find_fault`` finds wrong with a strategy, and retire it then.

    The name of a strategy that is tried with another tile has the tile behind a comma; it is not
    retired.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            fault = find_fault()
        except Unprovable as error:
            logger.info("%s by %s is not proven: %s", kind.op, strategy, error)
            return
        except torch.OutOfMemoryError:
            logger.warning("%s by %s is not proven: the GPU's memory is full", kind.op, strategy)
            return
        # The compiler and the driver raise many kinds.
        except Exception as error:
            fault = " ".join(f"{type(error).__name__}: {error}".split())
    finding.faults[strategy] = fault
    if fault and "," not in strategy:
        retire(kind.op, strategy, device, fault)


def fault_at_first_use(kind: Kind, device: torch.device, find_fault: Callable[[], str]) -> str:
    """Why a call that has one strategy alone must not take its kernels, or "". The first call of a
    kind finds out.
    """
    if not is_on(device):
        return ""
    fault = fault_of(kind.op, ONE_LAUNCH, device)
    finding = finding_of(kind, device) or Finding()
    if not fault and ONE_LAUNCH not in finding.faults and may_run(device):
        prove(kind, device, finding, ONE_LAUNCH, find_fault)
        keep(kind, device, finding)
    return fault or finding.faults.get(ONE_LAUNCH, "")


def findings_on(device: torch.device) -> dict[Kind, Finding]:
    """What this process has found, or read, of the kinds of calls on this GPU."""
    gpu = made_for(device)
    return {kind: finding for (of_gpu, kind), finding in [*_findings.items()] if of_gpu == gpu}


def forget() -> None:
    """Forget what this process knows; the disk keeps it."""
    _findings.clear()
    _retired.clear()
    _newly_retired.clear()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _read(key: str) -> dict[str, Any] | None:
    """The answer in the file of ``key``; None if the file is missing or unusable."""
    path = _path_of(key)
    try:
        answer = json.loads(path.read_text())
        if answer["key"] != key:
            raise ValueError(f"key must be {key!r}, got {answer['key']!r}")
        return dict(answer)
    except (FileNotFoundError, NotADirectoryError):
        return None
    # A damaged file may raise anything.
    except Exception as error:
        _warn_once(
            f"first use looks again, because {path} can't be used: {type(error).__name__}: {error}"
        )
        return None


def _read_finding(key: str) -> Finding | None:
    answer = _read(key)
    if answer is None:
        return None
    try:
        finding = Finding(
            faults={str(name): str(fault) for name, fault in answer["faults"].items()},
            microseconds={str(name): float(us) for name, us in answer["microseconds"].items()},
            fastest=answer["fastest"],
            reason=str(answer["reason"]),
            tiles={
                str(name): [int(size) for size in tile] for name, tile in answer["tiles"].items()
            },
            is_old=True,
        )
        if finding.fastest is not None and finding.fastest not in finding.microseconds:
            raise ValueError(
                f"fastest must be one of {[*finding.microseconds]}, got {finding.fastest!r}"
            )
        for tile in finding.tiles.values():
            Tile(*tile)
        return finding
    except Exception as error:
        _warn_once(
            f"first use looks again, because {_path_of(key)} can't be used: {type(error).__name__}: {error}"
        )
        return None


def _write(key: str, answer: dict[str, Any]) -> None:
    """Keep an answer in a file, or warn once."""
    path = _path_of(key)
    scratch = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_text(json.dumps({"key": key, **answer}, indent=2) + "\n")
            # Atomic: other processes may read or write it now.
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        _warn_once(f"what first use finds can't be kept in {path.parent}: {error.strerror}")
