"""What has run in this process, and how: see :func:`status`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from stablelora_kernels.dispatch import first_use
from stablelora_kernels.dispatch.backend import INTERPRETING, TRITON_PROBLEM
from stablelora_kernels.dispatch.first_use import OPERATORS, Finding, Retired
from stablelora_kernels.dispatch.tallies import Tally, fallbacks_of, tallies
from stablelora_kernels.utils.modules import check_module
from stablelora_kernels.utils.validation import counted

_WORDS = {
    "few_rows": "in one launch for few rows",
    "one_launch": "in one launch",
    "branch_first": "branch first",
    "two_launches": "in two launches",
    "in_loop": "in one product that dequantizes",
    "gradients": "the gradients of A and B alone",
    OPERATORS: "on PyTorch's operators",
}


@dataclass(frozen=True)
class Fallback:
    """Calls of one layer of the model that PEFT's own forward computed.

    Attributes:
        name: the layer's dotted name.
        reason: why.
        calls: how many.
    """

    name: str
    reason: str
    calls: int


@dataclass(frozen=True)
class Status:
    """The answer of :func:`~stablelora_kernels.status`. ``print(...)`` of it is for reading.

    Attributes:
        calls: the ops' calls in this process, of all its models.
        fallbacks: the model's layers that ran PEFT's own forward.
        proven: how many kinds of calls were proven on this machine, as far as this process asked.
        timed: how many of them were timed.
        faults: what first use found wrong: the op, the strategy and the fault of each.
    """

    calls: tuple[Tally, ...]
    fallbacks: tuple[Fallback, ...]
    proven: int
    timed: int
    faults: tuple[Retired, ...]

    def __str__(self) -> str:
        lines = [_line_of(tally) for tally in self.calls] or ["no call has run yet"]
        grouped: dict[tuple[str, str], list[Fallback]] = {}
        for fallback in self.fallbacks:
            kind = (fallback.name.rpartition(".")[2], fallback.reason)
            grouped.setdefault(kind, []).append(fallback)
        for (name, reason), layers in grouped.items():
            calls = sum(layer.calls for layer in layers)
            lines.append(f"{calls:,} x PEFT's own forward of {len(layers)} x {name}: {reason}")
        if self.proven:
            kinds = counted(self.proven, "kind")
            lines.append(f"first use: {kinds} of calls proven here, {self.timed} timed")
        for fault in self.faults:
            lines.append(
                f"first use: {fault.op} by {fault.strategy!r} is wrong here: {fault.fault}"
            )
        return "\n".join(lines)


def _line_of(tally: Tally) -> str:
    how = _WORDS.get(tally.strategy, tally.strategy)
    reason = f" ({tally.reason})" if tally.reason else ""
    return f"{tally.calls:,} x {tally.op} {how}{reason}"


def status(model: nn.Module) -> Status:
    """What has run since the process began: how many calls of this library's ops, by which
    strategy, and why; which layers of ``model`` fell back to PEFT's own forward; and what first use
    found on this machine. A report tells what will run, this what ran.

    It reads the host's counts alone, and waits for no GPU. Calls inside a compiled graph count, those
    inside a replayed CUDA graph do not. Calls are those of the process, whichever model made them.

    Args:
        model: the model whose layers are asked for fallbacks.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_module(model)
    # Copies: the process goes on counting.
    counted_now = [replace(tally) for tally in tallies()]
    fallbacks = [
        Fallback(name, reason, count)
        for name, module in model.named_modules()
        for reason, count in fallbacks_of(module).items()
    ]
    findings: list[Finding] = []
    faults: list[Retired] = []
    for device in _devices(model):
        findings += first_use.findings_on(device).values()
        faults += first_use.retired_on(device)
    return Status(
        calls=tuple(sorted(counted_now, key=lambda t: (t.op, -t.calls))),
        fallbacks=tuple(fallbacks),
        proven=sum(1 for finding in findings if "" in finding.faults.values()),
        timed=sum(1 for finding in findings if finding.microseconds),
        faults=tuple(dict.fromkeys(faults)),
    )


def _devices(model: nn.Module) -> Sequence[torch.device]:
    """The devices of the model on which first use may have looked."""
    if TRITON_PROBLEM is not None:
        return ()
    devices = Counter(p.device for p in model.parameters())
    return [device for device in devices if device.type == "cuda" or INTERPRETING]
