"""Helpers of tests/gpu: cases, runs by a forced kernel, rows of dropout masks, CUDA graphs. The oracle is in ``oracle``.

Without a CUDA GPU everything here works at small sizes on a CPU, where the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.dispatch.rules import check_possible
from stablelora_kernels.reference import philox_ref
from stablelora_kernels.testing import make_inputs, seed_of
from tests.helpers.inputs import BF16, FP16, FP32
from tests.helpers.oracle import DIFFERENTIATED, call, leaves

SMALL = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if SMALL else "cuda")
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
RESULTS = ("Y", "dX", "dA", "dB")
Inputs = dict[str, Tensor]
# make_inputs draws in float64 on the host. Inputs with more elements are drawn on the device.
HOST_ELEMENTS = 2**21


class Case(NamedTuple):
    """The sizes of a call, its dropout probability, and the dtypes of the base layer and of A and B."""

    m: int
    n: int
    k: int
    r: int
    p: float = 0.0
    dtype: torch.dtype = BF16
    lora_dtype: torch.dtype = FP32

    def __str__(self) -> str:
        dtypes = "/".join(dict.fromkeys((SHORT[self.dtype], SHORT[self.lora_dtype])))
        return f"{self.m}x{self.n}x{self.k} r{self.r} p{self.p:g} {dtypes}"

    def inputs(self, seed: int = 0) -> Inputs:
        """Return the arguments and an incoming gradient, scaled as :func:`make_inputs` scales them."""
        m, n, k, r = self.m, self.n, self.k, self.r
        if m * k + n * k + m * n <= HOST_ELEMENTS:
            made = make_inputs(
                (m, k), n, r, dtype=self.dtype, lora_dtype=self.lora_dtype, device=DEVICE, seed=seed, bias=r % 3 != 0
            )
            return {name: value for name, value in made.items() if value is not None}
        generator = torch.Generator(device=DEVICE).manual_seed(seed)

        def normal(rows: int, columns: int, std: float, dtype: torch.dtype) -> Tensor:
            return (torch.randn(rows, columns, generator=generator, device=DEVICE) * std).to(dtype)

        return {
            "x": normal(m, k, 1.0, self.dtype),
            "weight": normal(n, k, k**-0.5, self.dtype),
            "bias": normal(1, n, 1.0, self.dtype)[0],
            "lora_A": normal(r, k, k**-0.5, self.lora_dtype),
            "lora_B": normal(n, r, r**-0.5, self.lora_dtype),
            "grad": normal(m, n, 1.0, self.dtype),
        }


def directions(case: Case, kernel: str) -> list[str]:
    """Return the directions, "forward" and "backward", that ``kernel`` can compute for ``case``."""
    found = []
    for direction, sizes in (("forward", (case.n, case.k)), ("backward", (case.k, case.n))):
        try:
            check_possible(Call(direction, case.m, *sizes, case.r, case.dtype, case.lora_dtype, case.p > 0), kernel)
            found.append(direction)
        except ValueError:
            pass
    return found


def run(case: Case, inputs: Inputs, kernel: str = "auto") -> tuple[dict[str, Tensor], int | None]:
    """Return Y, dX, dA and dB, and the dropout seed. A direction that ``kernel`` cannot compute takes "auto"."""
    able = directions(case, kernel)
    given = leaves(inputs)
    with slk.use_kernel(kernel if "forward" in able else "auto"):
        y = call(given, case.p)
    seed = int(seed_of(y)) if case.p else None
    with slk.use_kernel(kernel if "backward" in able else "auto"):
        grads = torch.autograd.grad(y, [given[name] for name in DIFFERENTIATED], inputs["grad"])
    return dict(zip(RESULTS, (y.detach(), *grads), strict=True)), seed


def keep_rows(rows: Tensor, columns: int, p: float, seed: int) -> Tensor:
    """Return some rows of ``reference.dropout_keep_ref``: bool [n, columns] for row numbers ``rows``, int64 [n]."""
    groups = -(-columns // 4)
    counters = rows[:, None] * groups + torch.arange(groups, device=rows.device)
    words = philox_ref(seed, counters).reshape(len(rows), groups * 4)[:, :columns]
    return (words >> 1) >= round(p * 2**31)


def assert_equal_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Raise AssertionError if a result differs in any bit. NaN never equals NaN."""
    for name, value in one.items():
        if not torch.equal(value, other[name]):
            off = (value.double() - other[name].double()).abs().max()
            differing = int((value != other[name]).sum())
            raise AssertionError(f"{name} differs in {differing} elements, by {off:.3e} at most")


class Captured:
    """A captured function: ``replay`` runs it on its inputs' current values and waits; ``outputs`` stay the same tensors."""

    def __init__(self, replay: Callable[[], None], outputs: Any = None) -> None:
        self._replay, self.outputs = replay, outputs

    def replay(self) -> None:
        self._replay()
        if not SMALL:
            torch.cuda.synchronize()


def capture(function: Callable[[], Any], warmup: int = 2) -> Captured:
    """Capture ``function`` in a CUDA graph, after ``warmup`` calls outside the graph.

    Tensors of the function must have been made on the current stream, which must not be the default one. On a CPU a stand-in
    calls the function at each replay, and copies what it returns into the tensors that the first replay returned.
    """
    for _ in range(warmup):
        function()
    if not SMALL:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            outputs = function()
        return Captured(graph.replay, outputs)

    def replay() -> None:
        new = function()
        if captured.outputs is None:
            captured.outputs = new
            return
        with torch.no_grad():
            for old, value in zip(captured.outputs, new, strict=True):
                old.copy_(value)

    captured = Captured(replay)
    return captured
