"""Helpers of tests/gpu: cases of ``lora_linear`` at any size by a forced strategy, their error, and
CUDA graphs.

Without a CUDA GPU everything here works at small sizes on a CPU, where the kernels run in Triton's
interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.dispatch.rules import possible_strategies
from stablelora_kernels.ops.dropout import draw_seeds
from stablelora_kernels.reference import philox_ref
from stablelora_kernels.testing import cases
from stablelora_kernels.testing.cases import BF16, FP32, Case, Operands, Results
from stablelora_kernels.utils.tensors import drop_share
from tests.helpers import case_checks

SMALL = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if SMALL else "cuda")
# cases.make draws in float64 on the host. Operands with more elements are drawn on the device.
HOST_ELEMENTS = 2**21


def linear(
    m: int,
    n: int,
    k: int,
    r: int,
    p: float = 0.0,
    dtype: torch.dtype = BF16,
    lora_dtype: torch.dtype = FP32,
) -> Case:
    return Case("linear", (m, k), (n,), (r,), dtype, lora_dtype, p=p)


def sizes_of(case: Case) -> tuple[int, int, int, int]:
    """m, n, k and r of a case that :func:`linear` made."""
    return case.shape[0], case.sizes[0], case.shape[1], case.ranks[0] or 0


def make(case: Case) -> Operands:
    m, n, k, r = sizes_of(case)
    if m * k + n * k + m * n <= HOST_ELEMENTS:
        return cases.make(case)
    generator = torch.Generator(device=DEVICE).manual_seed(case.seed)

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(*size, generator=generator, device=DEVICE) * std).to(dtype)

    return {
        "x": normal(m, k),
        "weight0": normal(n, k, std=k**-0.5),
        "bias0": normal(n),
        "lora_A0": normal(r, k, std=k**-0.5, dtype=case.lora_dtype),
        "lora_B0": normal(n, r, std=r**-0.5, dtype=case.lora_dtype),
        "grad0": normal(m, n),
    }


def by_strategy(case: Case, strategy: str) -> Case | None:
    """``case`` with ``strategy`` in each direction that it can do, and "auto" in the other; None if
    it can do neither.
    """
    m, n, k, r = sizes_of(case)
    calls = [
        Call(direction, m, *sizes, r, case.dtype, case.lora_dtype, case.p > 0)
        for direction, sizes in (("forward", (n, k)), ("backward", (k, n)))
    ]
    forward, backward = (
        strategy if strategy in ("auto", *possible_strategies(call)) else "auto" for call in calls
    )
    if strategy not in (forward, backward):
        return None
    return case.but(strategy=forward, backward_strategy=backward)


def keep_rows(case: Case, rows: Tensor, seed: int | None = None) -> Tensor:
    """Some rows of ``reference.dropout_keep_ref``, by the seed that a run of ``case`` draws unless
    another is given.
    """
    if seed is None:
        torch.manual_seed(case.seed)
        (drawn,) = draw_seeds(torch.device(DEVICE), [case.p])
        assert drawn is not None
        seed = int(drawn[0])
    groups = -(-case.shape[1] // 8)
    words = philox_ref(seed, rows[:, None] * groups + torch.arange(groups, device=rows.device))
    halves = torch.stack((words, words >> 16), dim=-1).reshape(len(rows), groups * 8)
    return (halves[:, : case.shape[1]] & 0x7FFF) >= drop_share(case.p) * 32768


def check(
    case: Case, given: Operands, found: Results, keep: Tensor | None = None
) -> tuple[float, str]:
    """As :func:`tests.helpers.case_checks.check`, with a mask that the device draws."""
    if keep is None and case.p:
        keep = keep_rows(case, torch.arange(case.shape[0], device=DEVICE))
    return case_checks.check(case, found, given, keep=keep)


def record(record_property: Callable[[str, object], None], worst: tuple[float, str]) -> None:
    record_property("figure", worst[0])
    record_property("bound", 1.0)
    record_property("note", f"largest error over its bound, of {worst[1]}")


class Captured:
    """A captured function: ``replay`` runs it on its inputs' current values and waits; ``outputs``
    stay the same tensors.
    """

    def __init__(self, replay: Callable[[], None], outputs: Any = None) -> None:
        self._replay, self.outputs = replay, outputs

    def replay(self) -> None:
        self._replay()
        if not SMALL:
            torch.cuda.synchronize()


def capture(function: Callable[[], Any], warmup: int = 2) -> Captured:
    """Capture ``function``, which returns a dict of tensors or nothing, in a CUDA graph after
    ``warmup`` calls outside of it.

    Tensors of the function must have been made on the current stream, which must not be the default
    one. On a CPU a stand-in calls the function at each replay, and copies what it returns into the
    tensors that the first replay returned.
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
        for name, old in captured.outputs.items():
            old.copy_(new[name])

    captured = Captured(replay)
    return captured
