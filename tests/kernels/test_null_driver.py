"""Prepared launches through Triton's own compiler and launcher, over a CUDA library that does
nothing: what reaches the C launcher from a first call and from a prepared one.

In a process of its own, ``main``: this one has Triton's interpreter. An MLP's launches are compared
alone, since they take as long to compile as all others.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

import torch
from torch import Tensor

import stablelora_kernels as slk
from benchmarks.common.null_driver import launches, null_driver, null_driver_problem
from stablelora_kernels.launch import base, prepared
from stablelora_kernels.ops import plans
from stablelora_kernels.testing import make_pairs
from stablelora_kernels.testing.cases import BF16, DEVICE, FP32, Case, Operands, leaves, make, ours
from tests.helpers.processes import python

LINEAR = Case("linear", (130, 64), (96,), (8,), BF16, FP32, p=0.1)
# With descriptors, with pointers, and of few rows.
LINEARS = (LINEAR, LINEAR.but(layouts={"x": "shifted"}), LINEAR.but(shape=(3, 64), p=0.0))
# Gate and up in one kernel, and a backward whose launches have a gate.
MLP = Case(
    "mlp",
    (130, 64),
    (96, 96, 32),
    (8, 8, 8),
    BF16,
    FP32,
    p=0.1,
    strategy="one_launch",
    bias=(False,),
    shared=True,
)


class Recorder:
    """Stands between the launchers and Triton's C launcher, and keeps what passes."""

    def __init__(self) -> None:
        from triton.backends.nvidia import driver as nvidia
        from triton.runtime.driver import driver

        self.made, utils = threading.local(), driver.active.utils
        # One C launcher takes a list of arguments for any kernel; in older versions each kernel has
        # its own.
        self.takes_lists = hasattr(utils, "launch")
        if self.takes_lists:
            utils.launch = self.around(utils.launch)
            # The types of the arguments that the launcher gets marks of.
            self.types: dict[int, Any] = {}
            annotate = nvidia.annotate_arguments
            nvidia.annotate_arguments = lambda types: self.types.setdefault(
                id(marks := annotate(types)), (marks, types)
            )[0]
        else:
            wrap = nvidia.wrap_handle_tensordesc
            nvidia.wrap_handle_tensordesc = lambda launch, *rest: wrap(self.around(launch), *rest)

    def around(self, launch: Any) -> Any:
        def record(*args: Any) -> None:
            # The hooks, and the metadata for them, are None in a prepared launch and do nothing in
            # another.
            head, kernel_args = (
                (args[:8], args[-1]) if self.takes_lists else ((*args[:7], args[9]), args[13:])
            )
            if self.takes_lists:
                _, types = self.types.get(id(args[-3]), (None, ["kernel"] * len(kernel_args)))
                kernel_args = taken(kernel_args, types)
            self.calls.append(
                (*head, [described(argument) for argument in base.leaves(tuple(kernel_args))])
            )
            launch(*args)

        return record

    @property
    def calls(self) -> list[Any]:
        if not hasattr(self.made, "calls"):
            self.made.calls = []
        return self.made.calls


def taken(values: Any, types: Any) -> list[Any]:
    """The leaves of arguments, without constants, as the launcher takes them."""
    return [
        leaf
        for value, kind in zip(values, types, strict=True)
        if kind != "constexpr"
        for leaf in (taken(value, kind) if isinstance(value, tuple) else [value])
    ]


def described(argument: Any) -> Any:
    """Addresses as numbers, and a tensor map by its bytes, which in the null driver are its
    address, sizes and boxes.
    """
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if type(argument).__name__ == "PyCUtensorMap":
        # The map is the object's last field.
        return ctypes.string_at(id(argument) + type(argument).__basicsize__ - 128, 128)
    return argument


def names_of(given: Operands) -> dict[int, str]:
    return {t.data_ptr(): name for name, t in given.items() if t is not None}


# Where Linux puts a program that cannot be moved, as Debian's Python is: its heap lies behind it, and
# so below 4 GiB. No size in a case is as large.
LOWEST_ADDRESS = 0x400000


def renamed(calls: list[Any], names: dict[int, str]) -> list[Any]:
    """Calls with the operands' names for their addresses. What a call has allocated gets numbers in
    the order in which a launch takes it: a view stays another place than its tensor's.
    """

    def of_launch(arguments: list[Any]) -> list[Any]:
        own: dict[int, str] = {}

        def named(address: int) -> str:
            return names.get(address) or own.setdefault(address, f"own {len(own)}")

        def rename(argument: Any) -> Any:
            if isinstance(argument, bytes):
                return named(int.from_bytes(argument[:8], sys.byteorder)), argument[8:]
            if isinstance(argument, int) and argument >= LOWEST_ADDRESS:
                return named(argument)
            return argument

        return [rename(argument) for argument in arguments]

    return [(*head, of_launch(arguments)) for *head, arguments in calls]


def operands(case: Case = LINEAR) -> Operands:
    return leaves(case, make(case))


def one_call(given: Operands, case: Case = LINEAR) -> None:
    """Forward and backward."""
    with slk.settings(strategy=case.strategy):
        torch.autograd.backward(ours(case, given), [given[f"grad{i}"] for i in case.outputs()])


def check_case(recorder: Recorder, case: Case) -> None:
    """Four calls on operands elsewhere each time, of which the later ones are prepared."""
    plans.clear()
    every = [operands(case) for _ in range(4)]
    seen = []
    for given in every:
        recorder.calls.clear()
        one_call(given, case)
        seen.append(renamed(recorder.calls, names_of(given)))
    # An MLP's: S, gate and up, down; H's gradient, X's by gate and by up, and those of A and B.
    assert len(seen[0]) == (3 + 4 if case.op == "mlp" else 2), len(seen[0])
    assert all(name in str(seen[0]) for name in ("own", *names_of(every[0]).values()))
    for later in seen[1:]:
        assert later == seen[0], (later, seen[0])


def check_threads(recorder: Recorder) -> None:
    """Threads that share a plan launch on their own operands."""
    every = [operands() for _ in range(4)]

    def work(mine: Operands) -> None:
        foreign = {address for other in every if other is not mine for address in names_of(other)}
        for _ in range(50):
            recorder.calls.clear()
            one_call(mine)
            (*_, forward), *_ = renamed(recorder.calls, names_of(mine))
            assert {*names_of(mine).values()} & {*base.leaves(tuple(forward))}
            assert not foreign & {
                a for *_, arguments in recorder.calls for a in arguments if isinstance(a, int)
            }

    one_call(every[0])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, every))


def check_steps(recorder: Recorder) -> None:
    """From the third step on the optimizer's launch is prepared."""
    optimizer = slk.StableLoRAAdamW(make_pairs(2, 4, 64, "cpu", False), max_grad_norm=1.0)
    seen = []
    for _ in range(4):
        recorder.calls.clear()
        optimizer.step()
        seen.append([*recorder.calls])
    assert len(seen[1]) == 2 and seen[1] == seen[2] == seen[3], seen


def check_hooks() -> None:
    """A profiler's launch hooks are called in prepared launches too, which reach the driver."""
    from triton import knobs

    plans.clear()
    given = operands()
    for _ in range(3):
        one_call(given)
    names: list[str] = []

    def hook(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    before = launches()
    knobs.runtime.launch_enter_hook.add(hook)
    one_call(given)
    knobs.runtime.launch_enter_hook.remove(hook)
    assert len(names) == launches() - before == 2 and all(
        "lora_linear" in name for name in names
    ), names


def check_second_gpu() -> None:
    """The first GPU is the current one and the tensors are on the second: Triton works for the
    second alone.
    """
    from triton.runtime.driver import driver

    current, asked = 0, []

    @contextmanager
    def on_second(device: torch.device) -> Iterator[None]:
        nonlocal current
        current, before = 1, current
        yield
        current = before

    def current_device() -> int:
        asked.append(current)
        return current

    with (
        mock.patch.object(base, "on_device", on_second),
        mock.patch.object(prepared, "on_device", on_second),
        mock.patch.object(driver.active, "get_current_device", current_device),
    ):
        plans.clear()
        given = operands()
        optimizer = slk.StableLoRAAdamW(make_pairs(2, 4, 64, "cpu", False))
        for _ in range(3):
            one_call(given)
            optimizer.step()
    assert asked and all(asked), asked


def main(only_mlp: bool = False) -> int:
    """The exit status; 77: the null driver can't run here, and the output says why."""
    torch.set_num_threads(1)
    if problem := null_driver_problem():
        print(f"the null driver can't run: {problem}")
        return 77
    with null_driver(), slk.settings(backend="triton"):
        recorder = Recorder()
        if only_mlp:
            check_case(recorder, MLP)
            return 0
        for launcher in (
            (prepared.Direct, prepared.ByTriton) if recorder.takes_lists else (prepared.ByTriton,)
        ):
            # Either way, and no other.
            with mock.patch.multiple(prepared, Direct=launcher, ByTriton=launcher):
                for case in LINEARS:
                    check_case(recorder, case)
                check_threads(recorder)
                check_steps(recorder)
        check_second_gpu()
        check_hooks()
    return 0


@pytest.mark.skipif(
    DEVICE == "cuda", reason="runs on machines without a GPU; tests/gpu has launches that run"
)
@pytest.mark.skipif(
    sys.platform != "linux", reason="runs on Linux, whose shared library the null driver is"
)
@pytest.mark.parametrize(
    "only_mlp", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["", "mlp"]
)
def test_prepared_launches_pass_what_triton_passes(only_mlp: bool) -> None:
    done = python(
        f"from tests.kernels.test_null_driver import main; raise SystemExit(main({only_mlp}))"
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
