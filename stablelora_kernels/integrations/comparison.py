"""``compare`` measures a PEFT model with and without ``accelerate_peft``. Importing this module needs
no peft.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import FLOAT_DTYPES
from stablelora_kernels.integrations.peft import (
    accelerate_peft,
    check_accelerate_options,
    restore_peft,
)
from stablelora_kernels.model.reports import LoRAReport
from stablelora_kernels.utils.memory import peak_over_start, saved_for_backward
from stablelora_kernels.utils.modules import check_module, innermost
from stablelora_kernels.utils.tensors import is_sharded
from stablelora_kernels.utils.timing import (
    MIN_SAMPLES_OF_INTERVAL,
    Interval,
    interleave,
    machine,
    median_interval,
)
from stablelora_kernels.utils.validation import check_int, counted

WARMUP = 3
MIB = 1 << 20
PEFT, ACCELERATED = "PEFT", "accelerated"


@dataclass(frozen=True)
class StepCost:
    """What a forward and backward of one arm cost.

    Attributes:
        ms: milliseconds, the median with its 95 % interval.
        saved: bytes of activations that forward keeps for backward; parameters, buffers and the
            batch do not count.
        peak: the most bytes that the step has allocated at a time, beyond what was allocated before
            it; None on a device whose allocator is not known.
    """

    ms: Interval
    saved: int
    peak: int | None


@dataclass(frozen=True)
class Comparison:
    """What :func:`~stablelora_kernels.compare` has measured. ``print(comparison)`` prints a table and a verdict.

    Attributes:
        peft: a step of the PEFT model on PEFT's own forwards.
        accelerated: a step after :func:`~stablelora_kernels.accelerate_peft`.
        speed: times PEFT's speed: the median over the rounds with its 95 % interval.
        rounds: how many timed rounds; each round runs both arms.
        report: the report of ``accelerate_peft``.
        conditions: the machine, the versions, the date and the load, by name.
    """

    peft: StepCost
    accelerated: StepCost
    speed: Interval
    rounds: int
    report: LoRAReport
    conditions: Mapping[str, Any]

    def __str__(self) -> str:
        on = self.conditions["gpu"] or f"{self.conditions['cpu']}, {self.conditions['cores']} cores"
        rounds = counted(self.rounds, "round")
        lines = [
            f"Forward and backward, {rounds} of both arms in turns; {on}, torch {self.conditions['torch']}",
            f"  {'':24}{PEFT:>26}{ACCELERATED:>26}",
            _line(
                "time, ms (95 % interval)",
                *(_shown(cost.ms, 1) for cost in (self.peft, self.accelerated)),
            ),
            _line(
                "kept for backward, MiB",
                *(f"{cost.saved / MIB:,.1f}" for cost in (self.peft, self.accelerated)),
            ),
        ]
        if self.peft.peak is not None and self.accelerated.peak is not None:
            peaks = (self.peft.peak, self.accelerated.peak)
            lines.append(_line("peak over start, MiB", *(f"{peak / MIB:,.1f}" for peak in peaks)))
        lines.append(self._verdict())
        if self.report.skipped:
            skipped = counted(len(self.report.skipped), "adapter")
            lines.append(
                f"PEFT's own forward computes {skipped} in both arms: print(comparison.report)"
            )
        return "\n".join(lines)

    def _verdict(self) -> str:
        speed = f"{_shown(self.speed, 2)} times PEFT's speed"
        if self.speed.low > 1:
            return f"accelerate_peft is FASTER here: {speed}."
        if self.speed.high < 1:
            return f"accelerate_peft is SLOWER here: {speed}."
        return f"The two can't be told apart in this run: {speed}."


def compare(
    model: nn.Module, batch: Mapping[str, Any], *, rounds: int = 20, **options: bool
) -> Comparison:
    """Measure a training step of a PEFT model with and without
    :func:`~stablelora_kernels.accelerate_peft`, and leave the model as it was.

    A step is ``model(**batch).loss.backward()`` in training mode, without the optimizer. Both arms
    take turns in shuffled order in this process, after three rounds of warm-up. They are copies of
    the modules that share the memory of the model's parameters and of packed weights in buffers, so
    no weight is held twice. Other buffers, which forward may write to, are copied once for both
    arms. Hooks of parameters, such as those by which an optimizer steps in backward, do not run. The
    state of the random generators comes back afterwards. To measure under autocast, call this
    inside ``torch.autocast(...)``.

    Args:
        model: a ``PeftModel``, or any module that contains PEFT's LoRA layers, accelerated or not.
        batch: the keywords of its forward, with ``labels``, on the model's device.
        rounds: timed rounds, at least 6.
        options: keywords of ``accelerate_peft``, such as ``fuse_mlp=True``; fusions that are not
            given are those of the model, if it is accelerated.

    Raises:
        ImportError: peft is not installed, or is older than 0.16.
        TypeError: ``model`` is no module, ``batch`` is no mapping, or ``accelerate_peft`` has no
            keyword of such a name.
        ValueError: the model has no PEFT LoRA layers or nothing that trains, is sharded, or returns
            no loss for ``batch``; ``rounds`` is below 6; or as ``accelerate_peft`` with ``strict``.
    """
    check_accelerate_options("compare", options, others=("rounds",))
    check_int("rounds", rounds, minimum=MIN_SAMPLES_OF_INTERVAL)
    check_module(model)
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch must map the keywords of the model's forward to tensors, got {type(batch).__name__}"
        )
    inner = innermost(model)
    if any(map(is_sharded, inner.parameters())):
        raise ValueError(
            "model must not be sharded, got parameters that are DTensors: compare copies its modules"
        )
    if not any(parameter.requires_grad for parameter in inner.parameters()):
        raise ValueError(
            "model must have parameters that require gradients, got none: a frozen adapter has no training step; load it "
            "with is_trainable=True, or call model.set_adapter(name)"
        )
    of_peft = _copy_sharing_weights(inner)
    # Of this copy, not of the model: so both arms share the copied buffers. Before restore_peft,
    # which would forget the fusions of an accelerated model.
    accelerated = _copy_sharing_weights(of_peft, shares_buffers=True)
    restore_peft(of_peft)
    report = accelerate_peft(accelerated, **options)
    arms = {PEFT: of_peft.train(), ACCELERATED: accelerated.train()}
    device = next(inner.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        steps = {name: _step(arm, batch) for name, arm in arms.items()}
        seconds = interleave(steps, warmup=WARMUP, iters=rounds)
        costs = {
            name: StepCost(
                median_interval([1e3 * s for s in seconds[name]]),
                saved_for_backward(partial(_loss, arm, batch), _not_activations(arm, batch)),
                _peak(steps[name], arm, device),
            )
            for name, arm in arms.items()
        }
    speeds = [
        before / after for before, after in zip(seconds[PEFT], seconds[ACCELERATED], strict=True)
    ]
    return Comparison(
        costs[PEFT], costs[ACCELERATED], median_interval(speeds), rounds, report, machine()
    )


def _copy_sharing_weights(model: nn.Module, shares_buffers: bool = False) -> nn.Module:
    """A copy of the modules around the same weights. ``shares_buffers``: around all buffers, too."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        # Of the same memory, but without hooks and gradient.
        memo[id(parameter)] = (
            nn.Parameter(parameter.detach()) if parameter.requires_grad else parameter
        )
    for buffer in model.buffers():
        if shares_buffers or _holds_packed_weights(buffer):
            memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


def _holds_packed_weights(buffer: Tensor) -> bool:
    """Whether a buffer is what GPTQ, AWQ and others pack weights into, which no forward writes to.
    Statistics and counters, which a forward does write to, are small or of PyTorch's floats.
    """
    return buffer.numel() * buffer.itemsize >= MIB and buffer.dtype not in FLOAT_DTYPES


def _step(arm: nn.Module, batch: Mapping[str, Any]) -> Callable[[], None]:
    """A function that runs forward and backward once. It first drops the last run's gradients."""

    def run() -> None:
        _drop_gradients(arm)
        _loss(arm, batch).backward()

    return run


def _drop_gradients(arm: nn.Module) -> None:
    for parameter in arm.parameters():
        # Those that are frozen are the model's own.
        if parameter.requires_grad:
            parameter.grad = None


def _peak(step: Callable[[], None], arm: nn.Module, device: torch.device) -> int | None:
    """The step's peak over a start without gradients."""
    _drop_gradients(arm)
    return peak_over_start(step, device)


def _loss(arm: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The arm's loss; raises ValueError if it returns none."""
    loss = getattr(arm(**batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"batch must make the model return a loss, got the keys {', '.join(batch)}: add 'labels'"
        )
    return loss


def _not_activations(arm: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    """Tensors that are there before forward: parameters, buffers and the batch's."""
    of_batch = [value for value in batch.values() if isinstance(value, Tensor)]
    return [*arm.parameters(), *arm.buffers(), *of_batch]


def _shown(interval: Interval, digits: int) -> str:
    """A median and its interval."""
    low, high = f"{interval.low:,.{digits}f}", f"{interval.high:,.{digits}f}"
    return f"{interval.median:,.{digits}f} ({low} to {high})"


def _line(title: str, peft: str, accelerated: str) -> str:
    """A line of the table."""
    return f"  {title:24}{peft:>26}{accelerated:>26}"
