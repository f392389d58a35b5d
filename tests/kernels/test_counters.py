"""Counters of shared sums on streams and in CUDA graphs' captures, with a pretended GPU and driver."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from stablelora_kernels.dispatch.tiles import MAX_SHARED_SUMS
from stablelora_kernels.launch import base, counters
from tests.helpers.inputs import BF16, DEVICE, FP32, make_inputs
from tests.helpers.launches import specialization
from tests.helpers.oracle import run

CPU = torch.device("cpu")


class Gpu:
    """A GPU's current stream and capture, as the tests set them; its memory is the CPU's."""

    def __init__(self) -> None:
        self.stream, self.capture = 7, 0
        # Threads that allocated buffers.
        self.makers: list[int] = []

    def zeros(self, count: int, device: torch.device) -> list[Tensor]:
        assert not self.capture, "a capture cannot allocate"
        self.makers.append(threading.get_ident())
        return list(torch.zeros(count, counters.LANES * MAX_SHARED_SUMS, dtype=torch.int32))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(
        counters, "_current_stream", lambda device: counters._Stream("cuda", 0, gpu.stream, gpu.capture)
    )
    monkeypatch.setattr(counters, "_zeros", gpu.zeros)
    monkeypatch.setattr(counters, "_in_use", {})
    monkeypatch.setattr(counters, "_ready", {})
    return gpu


def addresses(n: int = 5) -> list[int]:
    return [counters.counters(n, CPU, lane).data_ptr() for lane in range(counters.LANES)]


def test_lanes_lie_apart_at_multiples_of_16_bytes(gpu: Gpu) -> None:
    first = addresses(MAX_SHARED_SUMS)
    assert all(b - a == 4 * MAX_SHARED_SUMS for a, b in pairwise(first))
    for n in (0, 1, 3, 64):
        assert [address or 16 for address in addresses(n)] == (first if n else [16] * counters.LANES)
    assert all(address % 16 == 0 for address in first)


def test_launches_of_one_stream_share_and_others_do_not(gpu: Gpu) -> None:
    eager = addresses()
    found = {tuple(eager)}
    for stream, capture in ((8, 0), (7, 1), (7, 2), (8, 2)):
        gpu.stream, gpu.capture = stream, capture
        place = addresses()
        assert tuple(place) not in found
        found.add(tuple(place))
        assert addresses() == place
    gpu.stream, gpu.capture = 7, 0
    assert addresses() == eager


def test_a_long_capture_takes_one_buffer(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to take new counters for every launch, until none were left and each launch filled its own with zeros."""
    addresses()
    gpu.capture = 1
    monkeypatch.setattr(torch, "zeros", None)
    place = addresses()
    for _ in range(1000):
        assert addresses(MAX_SHARED_SUMS) == place


def test_buffers_never_run_dry_while_eager_launches_come_between(gpu: Gpu) -> None:
    for capture in range(1, 4 * counters.READY):
        gpu.capture = 0
        counters.counters(5, CPU)
        gpu.capture = capture
        assert counters.counters(5, CPU).untyped_storage().nbytes() > 4 * 5
    assert len(counters._in_use) == 4 * counters.READY


def test_captures_take_no_memory_without_bound(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "MOST", 5)
    addresses()
    for gpu.capture in range(1, 9):
        assert len(addresses()) == counters.LANES
    assert len(counters._in_use) == 5


def test_captures_without_a_buffer_zero_their_own(gpu: Gpu) -> None:
    gpu.capture = 1
    first, second = counters.counters(5, CPU), counters.counters(5, CPU)
    assert first.shape == (5,) and not first.any() and first.data_ptr() != second.data_ptr()
    gpu.capture = 0
    addresses()
    # The driver does not tell which capture it is: two captures could share what they count in.
    gpu.capture = counters._UNKNOWN
    first, second = counters.counters(5, CPU), counters.counters(5, CPU)
    assert first.data_ptr() != second.data_ptr()
    assert all(stream.capture != counters._UNKNOWN for stream in counters._in_use)


def test_another_thread_allocates(gpu: Gpu) -> None:
    """A graph's memory pool, which torch.compile fills by the calling thread, must not hold them."""
    addresses()
    assert gpu.makers and threading.get_ident() not in gpu.makers


def driver(result: int, number: int) -> Callable[..., int]:
    def answer(handle: int, status: Any, found: Any) -> int:
        assert handle == 7
        found._obj.value = number
        return result

    return answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (driver(0, 12), 12),
        (driver(1, 12), counters._UNKNOWN),
        (driver(0, 0), counters._UNKNOWN),
        (None, counters._UNKNOWN),
    ],
)
def test_the_number_of_a_capture(answer: Any, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_capture_info", lambda: answer)
    assert counters._capture_number(7) == expected


# Rows, K, N, r: programs share S, Y or dA; a single counter, odd numbers of counters.
SIZES = [(16, 1300, 40, 8), (3, 40, 1300, 3), (257, 520, 72, 8), (300, 64, 136, 40), (130, 1024, 64, 16)]


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has real graphs: tests/gpu/test_cuda_graphs.py")
def test_a_captured_step_compiles_nothing(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of several shapes one after another: each launch has what its warm-up had of all that Triton specializes on."""
    keys: list[Any] = []
    original = base.launch

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any) -> None:
        keys.append((kernel.__name__, *map(specialization, args), tuple(sorted(meta.items()))))
        original(kernel, grid, device, *args, **meta)

    monkeypatch.setattr(base, "launch", record)
    layers = [make_inputs((m, k), n, r, dtype=BF16, lora_dtype=FP32) for m, k, n, r in SIZES]
    for inputs in layers:
        run(inputs, "triton")
    assert [stream.capture for stream in counters._in_use] == [0]
    warm, keys[:] = list(keys), []
    gpu.capture = 1
    for inputs in layers:
        run(inputs, "triton")
    assert len(keys) == len(warm) >= 2 * len(SIZES)
    assert keys == warm
