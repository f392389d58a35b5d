"""The cost of one arm's step besides time: bytes saved for backward, peak memory, operators or launches.

Run as ``python -m benchmarks.finetuning.footprint`` it measures one arm in a process of its own, since peak memory is a property
of a process. It reads a job from standard input and prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.data import Batch
from benchmarks.common.measure import synchronize
from benchmarks.common.memory import MIB, CountOperators, saved_for_backward, status_mib
from benchmarks.common.models import load_model
from benchmarks.finetuning.arms import Arm, Recipe, build_arm
from benchmarks.finetuning.tasks import Head
from benchmarks.finetuning.train import forward, phases


def count_operators(arm: Arm, batch: Batch, dtype: torch.dtype) -> dict[str, int]:
    """Operators a phase calls, on a CPU."""
    counts = {}
    for phase, run in phases(arm, batch, dtype):
        with CountOperators() as counter:
            run()
        counts[phase] = counter.counts.total()
    return counts


def count_launches(arm: Arm, batch: Batch, dtype: torch.dtype) -> dict[str, int]:
    """Kernels a phase launches, on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    counts = {}
    for phase, run in phases(arm, batch, dtype):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            synchronize()
        events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        counts[phase] = sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)
    return counts


def _return_freed_memory() -> None:
    """Have the C library give back what was freed, or the process would seem to hold it."""
    # glibc's alone; elsewhere the figure above the idle process is a little low.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(arm: Arm, batch: Batch, dtype: torch.dtype, device: torch.device, steps: int = 2) -> dict[str, Any]:
    """The peak over whole steps, and how far it is above the memory held between steps, in MiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MIB
    else:
        try:
            # Linux: reset the high-water mark, which loading the model has raised.
            _return_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return {"peak_mib": None, "step_mib": None}
        before = status_mib("VmRSS") or 0.0
    for _ in range(steps):
        for _, run in phases(arm, batch, dtype):
            run()
    peak = torch.cuda.max_memory_allocated() / MIB if device.type == "cuda" else status_mib("VmHWM")
    if peak is None:
        return {"peak_mib": None, "step_mib": None}
    return {"peak_mib": round(peak, 1), "step_mib": round(peak - before, 1)}


def footprint(arm: Arm, batch: Batch, dtype: torch.dtype) -> dict[str, Any]:
    """Memory and counts of an arm that is alone in this process."""
    device = batch["input_ids"].device
    arm.model.train()
    for _, run in phases(arm, batch, dtype):
        run()
    result: dict[str, Any] = peak_memory(arm, batch, dtype, device)
    owned = [*arm.model.parameters(), *arm.model.buffers(), *batch.values()]
    result["saved_mib"] = round(saved_for_backward(lambda: forward(arm, batch, dtype), owned) / MIB, 2)
    count = count_launches if device.type == "cuda" else count_operators
    result["launches" if device.type == "cuda" else "operators"] = count(arm, batch, dtype)
    result["tokens"] = batch["input_ids"].numel()
    return result


def measure_in_subprocess(
    arm: str, model: str, head: Head, recipe: Recipe, batch: Batch, **where: str
) -> dict[str, Any]:
    """:func:`footprint` of one arm on one batch, by a new process; ``where`` is its device and dtype."""
    job = {"arm": arm, "model": model, "classes": head.classes, "recipe": asdict(recipe), **where}
    job["batch"] = {name: tensor.tolist() for name, tensor in batch.items()}
    command = [sys.executable, "-m", "benchmarks.finetuning.footprint"]
    root = Path(__file__).resolve().parents[2]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, cwd=root, env=os.environ | threads
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure the job read from standard input."""
    # Every arm's process holds the same packages, so that peaks differ by the arms alone.
    import peft  # noqa: F401

    job = json.load(sys.stdin)
    job["recipe"]["target_modules"] = tuple(job["recipe"]["target_modules"])
    device, head = torch.device(job["device"]), Head(job["classes"])
    backbone, _ = load_model(job["model"], causal=head.classes is None)
    dtype = getattr(torch, job["dtype"])
    arm = build_arm(job["arm"], backbone.to(device, dtype), head, Recipe(**job["recipe"]), 0, device)
    batch = {name: torch.tensor(values, device=device) for name, values in job["batch"].items()}
    print(json.dumps(footprint(arm, batch, dtype)))


if __name__ == "__main__":
    main()
