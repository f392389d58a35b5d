"""Offsets beyond 2^31 elements, in real tensors: rows spread over one large allocation, and results that are that large.

What lies between the spread rows is NaN, so that an offset that wraps is seen. A dry run does the same with a small span.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import stablelora_kernels as slk
from benchmarks.lab.gpu.checks import (
    BF16,
    Case,
    Inputs,
    call,
    compare,
    directions,
    equal_bits,
    keep_rows,
    leaves,
    run,
    seed_of,
)
from benchmarks.lab.gpu.device import Device
from benchmarks.lab.gpu.section import SKIPPED, Row
from stablelora_kernels.dispatch.rules import KERNELS

Check = Callable[[Device], Iterator[Row]]
SPREAD = ("x", "weight", "lora_A", "lora_B", "grad")


def beyond(device: Device) -> int:
    """The offset that the last row has to pass."""
    return 2**14 if device.dry else 2**31


def short_of_memory(device: Device, elements: int) -> Row | None:
    """A row that says so if bfloat16 ``elements`` and as much again would not fit."""
    needed, free = 4 * elements, device.free_bytes()
    if needed <= free:
        return None
    return {"status": SKIPPED, "note": f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"}


def spread(inputs: Inputs, span: int) -> tuple[Inputs, Tensor]:
    """``inputs`` with the rows of every matrix more than ``span`` elements apart from first to last, and their memory."""
    # Multiples of what alignments are told apart by, so that the same kernels are taken.
    stride = max(((span + span // 16) // (inputs[name].shape[0] - 1) // 64 + 1) * 64 for name in SPREAD)
    room = -(-max(inputs[name].shape[1] for name in SPREAD) // 64) * 64
    assert room * len(SPREAD) <= stride, f"rows of {room} elements do not fit into a stride of {stride}"
    elements = stride * max(inputs[name].shape[0] for name in SPREAD)
    memory = torch.full((elements,), float("nan"), dtype=BF16, device=inputs["x"].device)
    wide = dict(inputs)
    for number, name in enumerate(SPREAD):
        rows, columns = inputs[name].shape
        wide[name] = memory.as_strided((rows, columns), (stride, 1), number * room)
        wide[name].copy_(inputs[name])
        assert (rows - 1) * stride > span, f"{rows} rows of stride {stride} stay within {span}"
    return wide, memory


def check_spread(rows: int, kernel: str, device: Device) -> Iterator[Row]:
    """x, the weight, A, B and dY with their last rows far behind their first: the same bits as close together, and right."""
    span = beyond(device)
    case = Case(rows, 40, 48, 24, 0.0, BF16, BF16)
    # A has the fewest rows, and sets the stride.
    lacking = short_of_memory(device, (span + span // 8) * rows // (case.r - 1))
    if lacking:
        yield lacking
        return
    inputs = case.inputs(device.device)
    with slk.use_kernel(kernel):
        close, _ = run(inputs, 0.0)
        wide, _memory = spread(inputs, span)
        far, _ = run(wide, 0.0)
    compare(inputs, close, None, 0.0)
    equal_bits(close, far)
    yield {
        "figure": 0,
        "bound": 0,
        "note": f"places that differ from the same call on close rows; offsets beyond {span}",
    }


def check_large(kernel: str, p: float, wide: str, device: Device) -> Iterator[Row]:
    """Contiguous matrices of more than 2^31 elements: Y and dY where ``wide`` is "n", X and dX where it is "k".

    The incoming gradient is zero but for some rows, first, last and around the 2^31st element, so that dA and dB are sums
    over those rows alone, and the oracle needs no others.
    """
    span, width = beyond(device), 64 if device.dry else 16384
    m = span // width + 24
    n, k = (width, 64) if wide == "n" else (64, width)
    case = Case(m, n, k, 16, p, BF16, BF16)
    lacking = short_of_memory(device, 2 * m * width)
    if lacking:
        yield lacking
        return
    at, middle = device.device, span // width
    some = torch.tensor(sorted({*range(8), *range(middle - 8, middle + 8), *range(m - 8, m)}), device=at)
    small = Case(len(some), n, k, 16, p, BF16, BF16).inputs(at)
    large = dict(small)
    torch.manual_seed(9)
    large["x"] = torch.empty(m, k, dtype=BF16, device=at).normal_()
    large["x"][some] = small["x"]
    large["grad"] = torch.zeros(m, n, dtype=BF16, device=at)
    large["grad"][some] = small["grad"]
    x, a, b = leaves(large)
    able = directions(case, kernel)
    with slk.use_kernel(kernel if "forward" in able else "auto"):
        y = call(large, x, a, b, p)
    keep = keep_rows(some, k, p, int(seed_of(y))) if p else None
    with slk.use_kernel(kernel if "backward" in able else "auto"):
        dx, da, db = torch.autograd.grad(y, (x, a, b), large["grad"])
    out = {"Y": y.detach()[some], "dX": dx[some], "dA": da, "dB": db}
    worst, which = compare(small, out, keep, p)
    yield {"figure": worst, "bound": 1.0, "note": f"largest error over its bound in {len(some)} rows, of {which}"}


def checks(dry: bool) -> list[tuple[str, str, Check]]:
    """Name, kernel and function of every check."""
    kernels = ("auto",) if dry else KERNELS[1:]
    found: list[tuple[str, str, Check]] = [
        (f"rows spread, {rows} rows", kernel, partial(check_spread, rows, kernel))
        for rows in ((40,) if dry else (40, 72))
        for kernel in kernels
    ]
    for wide, names in (("n", "Y and dY"), ("k", "X and dX")):
        for p in (0.1,) if dry else (0.0, 0.1):
            found += [(f"large {names}, p{p:g}", kernel, partial(check_large, kernel, p, wide)) for kernel in kernels]
    return found
