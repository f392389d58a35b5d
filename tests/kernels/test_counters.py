"""Counters of shared sums on streams and in CUDA graphs' captures, with a pretended GPU and driver."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from stablelora_kernels.dispatch.tiles import MAX_SHARED_SUMS
from stablelora_kernels.launch import base, prepared, stable_adamw, workspace
from stablelora_kernels.testing.cases import BF16, DEVICE, FP32, Case, make, run
from tests.helpers.launches import specialization

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
        return list(torch.zeros(count, workspace.LANES * MAX_SHARED_SUMS, dtype=torch.int32))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Another thread allocates: a graph's memory pool, which torch.compile fills by the calling
    thread, must not hold buffers.
    """
    gpu = Gpu()
    monkeypatch.setattr(
        workspace,
        "_current_stream",
        lambda device: workspace._Stream("cuda", 0, gpu.stream, gpu.capture),
    )
    monkeypatch.setattr(workspace, "_zeros", gpu.zeros)
    monkeypatch.setattr(workspace, "_in_use", {})
    monkeypatch.setattr(workspace, "_ready", {})
    yield gpu
    assert gpu.makers and threading.get_ident() not in gpu.makers


def addresses(n: int = 5) -> list[int]:
    return [workspace.counters(n, CPU, lane).data_ptr() for lane in range(workspace.LANES)]


def test_lanes_lie_apart_at_multiples_of_16_bytes(gpu: Gpu) -> None:
    first = addresses(MAX_SHARED_SUMS)
    assert all(b - a == 4 * MAX_SHARED_SUMS for a, b in pairwise(first))
    for n in (0, 1, 3, 64):
        assert [address or 16 for address in addresses(n)] == (
            first if n else [16] * workspace.LANES
        )
    assert all(address % 16 == 0 for address in first)


def test_launches_of_one_stream_share_and_others_do_not(gpu: Gpu) -> None:
    """A capture's too, however long it is and whatever its launches count."""
    eager = addresses()
    found = {tuple(eager)}
    for stream, capture in ((8, 0), (7, 1), (7, 2), (8, 2)):
        gpu.stream, gpu.capture = stream, capture
        place = addresses()
        assert tuple(place) not in found
        found.add(tuple(place))
        assert all(addresses(n) == place for n in [5, MAX_SHARED_SUMS] * 50)
    gpu.stream, gpu.capture = 7, 0
    assert addresses() == eager


def test_buffers_never_run_dry_while_eager_launches_come_between(gpu: Gpu) -> None:
    for capture in range(1, 4 * workspace.READY):
        gpu.capture = 0
        workspace.counters(5, CPU)
        gpu.capture = capture
        assert workspace.counters(5, CPU).untyped_storage().nbytes() > 4 * 5
    assert len(workspace._in_use) == 4 * workspace.READY


def test_captures_take_no_memory_without_bound(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MAX_BUFFERS", 5)
    addresses()
    for gpu.capture in range(1, 9):
        assert len(addresses()) == workspace.LANES
    assert len(workspace._in_use) == 5


def test_a_stream_is_the_drivers_and_so_is_its_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pretended ones above: of the current stream of the tensors' GPU."""
    captured = False

    def stream(index: int, of: int = 70) -> Any:
        return SimpleNamespace(cuda_stream=of + index)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "default_stream", partial(stream, of=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    monkeypatch.setattr(workspace, "_capture_number", lambda handle: 1000 + handle)
    for captured in (False, True):
        for device, index in ((torch.device("cuda", 0), 0), (torch.device("cuda"), 1)):
            capture = 1070 + index if captured else 0
            expected = workspace._Stream("cuda", index, 70 + index, capture)
            assert workspace._current_stream(device) == expected
    assert workspace._current_stream(CPU) == workspace._Stream("cpu", -1, 0, 0)


def test_other_streams_find_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that has written them is waited for."""
    events: list[str] = []
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *sizes, dtype, device: events.append("zeros") or zeros(sizes)
    )
    stream = SimpleNamespace(synchronize=lambda: events.append("waits"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    assert len(workspace._zeros(3, torch.device("cuda", 1))) == 3 and events == ["zeros", "waits"]


def test_launches_of_a_gpu_that_is_not_the_current_one_make_it_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prepared ones of an op, and those that the optimizer repeats."""
    current, launched = 0, []

    @contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        nonlocal current
        current, before = device.index, current
        yield
        current = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(prepared, "on_device", on_device)
    call: Any = object.__new__(prepared.Prepared)
    call._tally = SimpleNamespace(calls=0)
    call._device, call._on_gpu, call._counts = torch.device("cuda", 1), True, False
    call._allocations, call._places = [], []
    call._launch = lambda tensors: launched.append(current)
    call.run([])
    assert launched == [1]

    class Kernel:
        """One that Triton has compiled."""

    def run(device: torch.device) -> None:
        with on_device(device):
            launched.append(current)

    monkeypatch.setattr(stable_adamw, "JITFunction", Kernel)
    monkeypatch.setattr(stable_adamw, "needs_triton", lambda: False)
    repeated = stable_adamw.Repeated(SimpleNamespace(kernel=Kernel(), run=run))  # type: ignore[arg-type]
    for _ in range(2):
        repeated.run(torch.device("cuda", 1))
    assert launched == [1, 1, 1]


class Driver:
    """A driver's library with functions of C: by symbol, the number of results behind status and
    number.
    """

    def __init__(self, error: int, status: int, number: int, **symbols: int) -> None:
        for name, left_out in symbols.items():

            def answer(stream: int, found_status: Any, found_number: Any, *rest: int | None) -> int:
                assert stream == 7 and not any(rest)
                found_status[0], found_number[0] = status, number
                return error

            results = [
                ctypes.POINTER(ctypes.c_int),
                ctypes.POINTER(ctypes.c_ulonglong),
                *[ctypes.c_void_p] * left_out,
            ]
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *results)(answer))


@pytest.fixture
def number_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Driver], int]]:
    """The number of the capture of stream 7, by a driver."""

    def ask(driver: Driver) -> int:
        workspace._capture_info.cache_clear()
        monkeypatch.setattr(ctypes, "CDLL", lambda library: driver)
        return workspace._capture_number(7)

    yield ask
    workspace._capture_info.cache_clear()


# The first has no more than three arguments in CUDA 10 and 11, six in CUDA 12's header and seven in
# CUDA 13's.
DRIVERS: list[dict[str, int]] = [
    {"cuStreamGetCaptureInfo": 0, "cuStreamGetCaptureInfo_v2": 3},
    {"cuStreamGetCaptureInfo": 3, "cuStreamGetCaptureInfo_v2": 3, "cuStreamGetCaptureInfo_v3": 4},
    {"cuStreamGetCaptureInfo": 4, "cuStreamGetCaptureInfo_v3": 4},
]


@pytest.mark.parametrize("symbols", DRIVERS, ids=["CUDA 11", "CUDA 12", "CUDA 13"])
def test_captures_have_numbers_in_every_driver(
    symbols: dict[str, int], number_by: Callable[[Driver], int]
) -> None:
    found = [number_by(Driver(0, 1, number, **symbols)) for number in (0, 1, 12, 2**64 - 1)]
    assert len(set(found)) == 4 and all(found)
    # Nobody records the stream, so there is no number.
    assert number_by(Driver(0, 0, 12, **symbols)) == 0


def test_a_driver_that_cannot_tell_is_named(number_by: Callable[[Driver], int]) -> None:
    with pytest.raises(
        RuntimeError, match=r"libcuda\.so\.1 has none of cuStreamGetCaptureInfo_v3, cuStream"
    ):
        number_by(Driver(0, 1, 12, cuStreamGetCaptureInfo=0))
    with pytest.raises(RuntimeError, match="stream 0x7: error 709"):
        number_by(Driver(709, 1, 12, cuStreamGetCaptureInfo_v3=4))


# Programs share S, Y or dA; a single counter, odd numbers of counters.
LAYERS = [
    Case("linear", (m, k), (n,), (r,), BF16, FP32)
    for m, k, n, r in (
        (16, 1300, 40, 8),
        (3, 40, 1300, 3),
        (257, 520, 72, 8),
        (300, 64, 136, 40),
        (130, 1024, 64, 16),
    )
]


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has real graphs: tests/gpu/test_cuda_graphs.py")
def test_a_captured_step_compiles_nothing(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of several shapes one after another: each launch has what its warm-up had of all that
    Triton specializes on.
    """
    keys: list[Any] = []
    original = base.Launch.run

    def record(launch: base.Launch, device: torch.device) -> None:
        constants = tuple(sorted({**launch.constants, **launch.options}.items()))
        keys.append(
            (launch.kernel.__name__, *map(specialization, base.leaves(launch.args)), constants)
        )
        original(launch, device)

    monkeypatch.setattr(base.Launch, "run", record)
    layers = [(case, make(case)) for case in LAYERS]
    for layer in layers:
        run(*layer)
    assert [stream.capture for stream in workspace._in_use] == [0]
    warm, keys[:] = list(keys), []
    gpu.capture = 1
    for layer in layers:
        run(*layer)
    assert len(warm) >= 2 * len(layers) and keys == warm
