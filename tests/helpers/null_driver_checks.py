"""Compares what reaches the C launcher from a first call and from a prepared one; ``tests/kernels/test_null_driver.py`` runs it.

With the argument "mlp" it compares an MLP's launches, which take as long to compile as all others.
Exit status 77: the null driver can't run here, and the output says why.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import stablelora_kernels as slk
from benchmarks.common.null_driver import launches, null_driver, null_driver_problem
from stablelora_kernels.functional import LoRAWeights, lora_linear, lora_mlp
from stablelora_kernels.launch import base, compiled
from stablelora_kernels.ops import plans
from stablelora_kernels.testing import make_pairs

torch.set_num_threads(1)
# Rows, dropout's probability, and elements by which x lies off a multiple of 16 bytes.
CASES = {"descriptors": (130, 0.1, 0), "pointers": (130, 0.1, 1), "few rows": (3, 0.0, 0)}


def operands(rows: int, shift: int) -> list[Tensor]:
    x = torch.randn(rows * 64 + 8, dtype=torch.bfloat16)[shift : shift + rows * 64].view(rows, 64).requires_grad_()
    weight, bias = torch.randn(96, 64, dtype=torch.bfloat16), torch.randn(96, dtype=torch.bfloat16)
    return [x, weight, bias, torch.randn(8, 64, requires_grad=True), torch.randn(96, 8, requires_grad=True)]


class Recorder:
    """Stands between the launchers and Triton's C launcher, and keeps what passes."""

    def __init__(self) -> None:
        from triton.backends.nvidia import driver as nvidia
        from triton.runtime.driver import driver

        self.made, utils = threading.local(), driver.active.utils
        # One C launcher takes a list of arguments for any kernel; in older versions each kernel has its own.
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
            # The hooks, and the metadata for them, are None in a prepared launch and do nothing in another.
            head, kernel_args = (args[:8], args[-1]) if self.takes_lists else ((*args[:7], args[9]), args[13:])
            if self.takes_lists:
                _, types = self.types.get(id(args[-3]), (None, ["kernel"] * len(kernel_args)))
                kernel_args = taken(kernel_args, types)
            self.calls.append((*head, [described(argument) for argument in base.leaves(tuple(kernel_args))]))
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
    """Addresses as numbers, and a tensor map by its bytes, which in the null driver are its address, sizes and boxes."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return map_bytes(argument) if type(argument).__name__ == "PyCUtensorMap" else argument


def map_bytes(tensor_map: Any) -> bytes:
    # The map is the object's last field.
    return ctypes.string_at(id(tensor_map) + type(tensor_map).__basicsize__ - 128, 128)


def known(given: list[Tensor]) -> dict[int, str]:
    return {t.data_ptr(): name for t, name in zip(given, ("x", "weight", "bias", "lora_A", "lora_B"), strict=True)}


def renamed(calls: list[Any], names: dict[int, str]) -> list[Any]:
    """Calls with the operands' names for their addresses, and "own" for what a call has allocated."""

    def rename(argument: Any) -> Any:
        if isinstance(argument, bytes):
            address = int.from_bytes(argument[:8], sys.byteorder)
            return names.get(address, "own"), argument[8:]
        if isinstance(argument, int) and argument > 1 << 32:
            return names.get(argument, "own")
        return argument

    return [(*head, [rename(argument) for argument in arguments]) for *head, arguments in calls]


def one_call(given: list[Tensor], grad: Tensor, dropout_p: float) -> None:
    for t in given:
        t.grad = None
    lora_linear(*given, 1.5, dropout_p).backward(grad)


def check_case(recorder: Recorder, rows: int, dropout_p: float, shift: int) -> None:
    plans.clear()
    seen = []
    for _ in range(4):
        given, grad = operands(rows, shift), torch.randn(rows, 96, dtype=torch.bfloat16)
        recorder.calls.clear()
        one_call(given, grad, dropout_p)
        seen.append(renamed(recorder.calls, known(given) | {grad.data_ptr(): "grad"}))
    assert len(seen[0]) >= 2 and "own" in str(seen[0]) and "lora_A" in str(seen[0])
    for later in seen[1:]:
        assert later == seen[0], (later, seen[0])


def check_mlp(recorder: Recorder) -> None:
    """Gate and up in one kernel, and a backward whose launches have a gate. Gate and up share A."""
    plans.clear()
    seen = []
    for _ in range(4):
        x, grad = (torch.randn(130, width, dtype=torch.bfloat16) for width in (64, 32))
        weights = [torch.randn(*size, dtype=torch.bfloat16) for size in ((96, 64), (96, 64), (32, 96))]
        lora_as = [torch.randn(8, width, requires_grad=True) for width in (64, 96)]
        lora_bs = [torch.randn(width, 8, requires_grad=True) for width in (96, 96, 32)]
        pairs = zip(weights, [*lora_as[:1], *lora_as], lora_bs, strict=True)
        given = [LoRAWeights(w, None, a, b, 1.5) for w, a, b in pairs]
        recorder.calls.clear()
        with slk.use_kernel("split"):
            lora_mlp(x.requires_grad_(), *given, "silu", 0.1).backward(grad)
        lists = {"x": [x], "grad": [grad], "weight": weights, "lora_A": lora_as, "lora_B": lora_bs}
        named = {t.data_ptr(): f"{name}{i}" for name, tensors in lists.items() for i, t in enumerate(tensors)}
        seen.append(renamed(recorder.calls, named))
    assert len(seen[0]) == 11, len(seen[0])
    assert all(name in str(seen[0]) for name in named.values())
    for later in seen[1:]:
        assert later == seen[0], (later, seen[0])


def check_threads(recorder: Recorder) -> None:
    """Threads that share a plan launch on their own operands."""
    given = [operands(130, 0) for _ in range(4)]
    grad = torch.randn(130, 96, dtype=torch.bfloat16)
    failures: list[BaseException] = []

    def work(mine: list[Tensor]) -> None:
        try:
            for _ in range(50):
                recorder.calls.clear()
                one_call(mine, grad, 0.1)
                names = known(mine) | {grad.data_ptr(): "grad"}
                (*_, forward), *_ = renamed(recorder.calls, names)
                flat = [
                    part for argument in forward for part in (argument if isinstance(argument, tuple) else [argument])
                ]
                assert [part for part in flat if part in ("x", "weight", "bias", "lora_A", "lora_B")]
                foreign = {address for other in given if other is not mine for address in known(other)}
                assert not foreign & {a for *_, arguments in recorder.calls for a in arguments if isinstance(a, int)}
        except BaseException as error:
            failures.append(error)

    one_call(given[0], grad, 0.1)
    threads = [threading.Thread(target=work, args=(mine,)) for mine in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def check_steps(recorder: Recorder) -> None:
    """From the third step on the optimizer's launch is prepared."""
    pairs = make_pairs(2, 4, 64, torch.device("cpu"), False)
    optimizer = slk.StableLoRAAdamW(pairs, max_grad_norm=1.0)
    for pair in pairs:
        pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
    seen = []
    for _ in range(4):
        recorder.calls.clear()
        optimizer.step()
        seen.append([*recorder.calls])
    assert len(seen[1]) == 2 and seen[1] == seen[2] == seen[3], seen


def check_hooks() -> None:
    """A profiler's launch hooks are called in prepared launches too."""
    from triton import knobs

    given, grad = operands(130, 0), torch.randn(130, 96, dtype=torch.bfloat16)
    for _ in range(3):
        one_call(given, grad, 0.1)
    names: list[str] = []

    def hook(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    one_call(given, grad, 0.1)
    knobs.runtime.launch_enter_hook.remove(hook)
    assert len(names) == 2 and all("lora_linear" in name for name in names), names


def check_second_gpu() -> None:
    """The first GPU is the current one and the tensors are on the second: Triton works for the second alone."""
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
        mock.patch.object(compiled, "on_device", on_second),
        mock.patch.object(driver.active, "get_current_device", current_device),
    ):
        plans.clear()
        given, grad = operands(130, 0), torch.randn(130, 96, dtype=torch.bfloat16)
        pairs = make_pairs(2, 4, 64, torch.device("cpu"), False)
        optimizer = slk.StableLoRAAdamW(pairs)
        for pair in pairs:
            pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
        for _ in range(3):
            one_call(given, grad, 0.1)
            optimizer.step()
    assert asked and all(asked), asked


def main() -> int:
    if problem := null_driver_problem():
        print(f"the null driver can't run: {problem}")
        return 77
    with null_driver(), slk.use_backend("triton"):
        recorder = Recorder()
        if sys.argv[1:] == ["mlp"]:
            check_mlp(recorder)
            return 0
        for launcher in (compiled.Direct, compiled.ByTriton) if recorder.takes_lists else (compiled.ByTriton,):
            # Either way, and no other.
            with mock.patch.multiple(compiled, Direct=launcher, ByTriton=launcher):
                for case in CASES.values():
                    check_case(recorder, *case)
                check_threads(recorder)
                check_steps(recorder)
        check_second_gpu()
        plans.clear()
        check_hooks()
        before = launches()
        given, grad = operands(130, 0), torch.randn(130, 96, dtype=torch.bfloat16)
        one_call(given, grad, 0.1)
        assert launches() == before + 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
