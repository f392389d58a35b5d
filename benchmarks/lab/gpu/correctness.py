"""Is it right on this device? Every kernel against float64, graphs, offsets beyond 2^31, repeatability, dropout's mask."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

import stablelora_kernels as slk
from benchmarks.lab.gpu import graphs, offsets
from benchmarks.lab.gpu.checks import (
    BF16,
    FP16,
    FP32,
    Case,
    call,
    compare,
    directions,
    equal_bits,
    keep_rows,
    leaves,
    poisoned,
    run,
    seed_of,
)
from benchmarks.lab.gpu.device import Device
from benchmarks.lab.gpu.section import Clock, Row, Unit
from stablelora_kernels.dispatch.rules import KERNELS
from stablelora_kernels.reference import dropout_keep_ref

COLUMNS = ("check", "kernel", "case", "status", "figure", "bound", "seconds", "note", "dry")
# Runs that must agree bit for bit: a race shows by chance.
REPEATS = 8
DTYPES = ((BF16, FP32), (FP16, FP16), (FP32, FP32))
# One of few rows, one that descriptors take (rows of 16 bytes' multiples), one that they don't.
CORE = ((9, 264, 200, 3), (257, 520, 1032, 16), (131, 71, 67, 20))
UGLY = (
    (1, 1, 1, 1), (1, 4096, 4096, 16), (64, 512, 256, 1), (65, 509, 251, 3), (1031, 264, 520, 128), (97, 89, 83, 64),
    (600, 1024, 1024, 64), (67, 40, 48, 200),
)  # fmt: skip
REAL_M, REAL_R, REAL_SIZE = (8192, 64, 2048, 16), (16, 64, 128, 8), 4096


def cases(dry: bool) -> list[Case]:
    """Those that are checked against float64 by every kernel that can do them."""
    dtypes = DTYPES[:1] if dry else DTYPES
    core = ((9, 40, 24, 3), (70, 48, 40, 16)) if dry else CORE
    return [Case(*shape, p, *kinds) for shape, kinds, p in product(core, dtypes, (0.0, 0.1))]


def ugly(dry: bool) -> list[Case]:
    shapes = ((1, 1, 1, 1), (67, 40, 33, 128)) if dry else UGLY
    return [Case(*shape, p) for shape, p in product(shapes, (0.0, 0.1))]


def real(dry: bool) -> list[Case]:
    """What is timed later, in its dtypes: checking it also fills Triton's cache on disk."""
    if dry:
        return [Case(16, 64, 32, 8, 0.1, BF16, BF16)]
    return [Case(m, REAL_SIZE, REAL_SIZE, r, p, BF16, BF16) for r, p, m in product(REAL_R, (0.1, 0.0), REAL_M)]


def check_oracle(device: Device, case: Case, kernel: str) -> Iterator[Row]:
    """Forward and backward by ``kernel``, where it can, with outputs poisoned; the other direction by the table's choice."""
    able = directions(case, kernel)
    with poisoned():
        inputs = case.inputs(device.device)
        x, a, b = leaves(inputs)
        with slk.use_kernel(kernel if "forward" in able else "auto"):
            y = call(inputs, x, a, b, case.p)
        seed = int(seed_of(y)) if case.p else None
        with slk.use_kernel(kernel if "backward" in able else "auto"):
            grads = torch.autograd.grad(y, (x, a, b), inputs["grad"])
        out = {"Y": y.detach(), **dict(zip(("dX", "dA", "dB"), grads, strict=True))}
    keep = None
    if seed is not None:
        keep = keep_rows(torch.arange(case.m, device=device.device), case.k, case.p, seed)
    worst, which = compare(inputs, out, keep, case.p)
    only = "" if len(able) == 2 else f", {able[0]} by this kernel only"
    yield {"figure": worst, "bound": 1.0, "note": f"largest error over its bound, of {which}{only}"}


def check_repeats(device: Device, case: Case, kernel: str) -> Iterator[Row]:
    """The same bits in every one of several runs from one seed."""
    inputs = case.inputs(device.device)
    runs = 2 if device.dry else REPEATS
    with slk.use_kernel(kernel if len(directions(case, kernel)) == 2 else "auto"):
        torch.manual_seed(5)
        first, _ = run(inputs, case.p)
        for _ in range(runs):
            torch.manual_seed(5)
            equal_bits(first, run(inputs, case.p)[0])
    yield {"figure": 0, "bound": 0, "note": f"places that differ between {runs + 1} runs"}


def check_mask(device: Device, rows: int, columns: int, kernel: str) -> Iterator[Row]:
    """The mask that the kernels draw, read off their results, against the reference's, bit for bit.

    With no weight, and with A and B the identity, Y is the mask of X = 1 times a constant; with A and B ones and dY = 1, dX is.
    """
    p, make = 0.3, {"device": device.device, "dtype": BF16}
    x = torch.ones(rows, columns, **make).requires_grad_()
    weight = torch.zeros(columns, columns, **make)
    grad = torch.ones(rows, columns, **make)
    wrong = 0
    with slk.use_kernel(kernel):
        identity = torch.eye(columns, **make).requires_grad_()
        y = slk.functional.lora_linear(x, weight, None, identity, identity, 1.0, p)
        forward, forward_keep = y.detach() != 0, dropout_keep_ref(rows, columns, p, int(seed_of(y)))
    ones = torch.ones(8, columns, **make).requires_grad_()
    with slk.use_kernel(kernel):
        y = slk.functional.lora_linear(x, weight, None, ones, ones.t(), 1.0, p)
        seed = int(seed_of(y))
        (dx,) = torch.autograd.grad(y, x, grad)
    backward, backward_keep = dx != 0, dropout_keep_ref(rows, columns, p, seed)
    for drawn, keep in ((forward, forward_keep), (backward, backward_keep)):
        wrong += int((drawn.cpu() != keep).sum())
    assert 0 < int(forward_keep.sum()) < rows * columns, "the reference's mask is trivial"
    assert wrong == 0, f"{wrong} of {2 * rows * columns} elements of the mask differ from reference.dropout_keep_ref"
    yield {"figure": wrong, "bound": 0, "note": f"elements that differ, of {2 * rows * columns}"}


def timed(run: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a check, with the seconds until each."""
    begun = time.perf_counter()
    for row in run():
        yield {**row, "seconds": round(time.perf_counter() - begun, 2)}


def units(device: Device, clock: Clock, part: tuple[int, int]) -> list[Unit]:
    """This process's share: every so many-th check; the ones that want much memory are all the first process's."""
    dry = device.dry
    found: list[Unit] = []

    def unit(check: str, kernel: str, case: object, run: Callable[[], Iterator[Row]], seconds: float = 3.0) -> Unit:
        return Unit({"check": check, "kernel": kernel, "case": str(case)}, partial(timed, run), seconds)

    def add(*arguments: Any) -> None:
        found.append(unit(*arguments))

    for case in cases(dry):
        for kernel in KERNELS:
            if directions(case, kernel):
                add("oracle", kernel, case, partial(check_oracle, device, case, kernel))
    for case in ugly(dry):
        add("oracle", "auto", case, partial(check_oracle, device, case, "auto"))
    mask = ((9, 32), (70, 16)) if dry else ((9, 64), (1031, 128), (200, 67))
    for (rows, columns), kernel in product(mask, ("split",) if dry else ("split", "vendor")):
        add("mask", kernel, f"{rows}x{columns}", partial(check_mask, device, rows, columns, kernel))
    sizes = ((9, 48, 40, 16),) if dry else ((16, 4096, 4096, 16), (257, 520, 1032, 40), (4096, 4096, 4096, 16))
    for shape, p in product(sizes, (0.0, 0.1)):
        case = Case(*shape, p)
        for kernel in ("auto",) if dry else KERNELS:
            if len(directions(case, kernel)) == 2:
                add("repeats", kernel, case, partial(check_repeats, device, case, kernel))
    for name, check in graphs.checks(dry):
        add("graph", "auto", name, partial(check, device), 6.0)
    large = [
        unit("oracle", kernel, case, partial(check_oracle, device, case, kernel))
        for case, kernel in product(real(dry), KERNELS)
        if directions(case, kernel)
    ]
    number, count = part
    mine = found[number::count]
    if count > 1:
        # The large ones are the other processes', since the first has the offsets to do.
        large = large[number - 1 :: count - 1] if number else []
    if number == 0:
        # Before the real shapes, which may have to stop where the time does.
        mine += [
            unit("offsets", kernel, name, partial(check, device), 6.0) for name, kernel, check in offsets.checks(dry)
        ]
    return mine + large
