"""The smallest launches of every kernel with a shared sum, a counter or a programmatic launch, and what they must compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from stablelora_kernels import testing
from stablelora_kernels.dispatch import problem, rules, tiles
from stablelora_kernels.dispatch.problem import Device, cdiv
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.tiles import Tile, TileRule
from stablelora_kernels.launch import lora_common, lora_linear, lora_linear_group, lora_linear_quantized
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.testing import assert_no_worse
from tests.helpers.inputs import BF16, FP32, SCALING, Inputs, make_inputs

# A GPU with descriptors and one without; both let launches overlap.
SM_90, SM_120 = Device("sm_90", 2, 232_448), Device("sm_120", 2, 101_376)
SPLIT, FUSED = Choice("split", "a test"), Choice("fused", "a test")
M, N, K, R = 16, 16, 16, 4


class Case(NamedTuple):
    """Launches of one stream; ``check`` asserts that their results, once there, are right."""

    launches: Sequence[Launch]
    check: Callable[[], None]
    # What kernels reach by addresses in tables.
    others: Sequence[Tensor] = ()


def tiny(patch: pytest.MonkeyPatch) -> None:
    """Tiles of two steps, shared by two programs, launches that may overlap, and fresh memory that holds NaN."""
    for name in dir(tiles):
        if name.endswith("_TILES"):
            patch.setattr(tiles, name, (TileRule(lambda d, c: True, Tile(8, 16, 8, 1, 2), "a test"),))
    patch.setattr(tiles, "plan_split_k", lambda device, tiles, steps, **_: tiles_of(steps))
    patch.setattr(tiles, "SMALL_M", 0, raising=False)
    patch.setattr(rules, "overlaps", lambda device: device.overlaps)
    patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


def tiles_of(steps: int) -> int:
    return min(2, max(1, steps))


def _check(inputs: Inputs, found: dict[str, Tensor]) -> Callable[[], None]:
    def check() -> None:
        right, eager = testing.oracle(inputs, SCALING), testing.eager(inputs, SCALING)
        for name, value in found.items():
            assert_no_worse(value, right[name], eager[name], dtype=inputs["x"].dtype, name=name)

    return check


def _operands(inputs: Inputs) -> tuple[Any, ...]:
    return tuple(inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B", "grad"))


def forward(device: Device, m: int, choice: Choice, dtype: torch.dtype = FP32, times: int = 1) -> Case:
    """S and Y of ``times`` layers one after another, whose launches share counters."""
    launches: list[Launch] = []
    checks = []
    for seed in range(times):
        inputs = make_inputs((m, K), N, R, dtype=dtype, seed=seed)
        x, w, bias, a, b, _ = _operands(inputs)
        s, y = x.new_empty(m, R), x.new_empty(m, N)
        launches += lora_linear.forward_launches(device, x, w, bias, a, b, s, y, None, SCALING, 0.0, choice)
        checks.append(_check(inputs, {"Y": y}))
    return Case(launches, lambda: [check() for check in checks] and None)


def backward(device: Device, choice: Choice = SPLIT, dtype: torch.dtype = FP32) -> Case:
    """dS with dB, dX with dA."""
    inputs = make_inputs((M, K), N, R, dtype=dtype)
    x, w, _, a, b, dy = _operands(inputs)
    s = (SCALING * (x.double() @ a.double().t())).to(dtype)
    dx, da, db = torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)
    launches = lora_linear.backward_launches(
        device, x, dy, w, a, b, s, None, dx, da, db, scaling=SCALING, dropout_p=0.0, choice=choice
    )
    return Case(launches, _check(inputs, {"dX": dx, "dA": da, "dB": db}))


def weight_grads(device: Device) -> Case:
    """dA and dB in a launch of their own."""
    inputs = make_inputs((M, K), N, R)
    x, w, _, a, b, dy = _operands(inputs)
    s, ds = (SCALING * (p.double() @ q.double()) for p, q in ((x, a.t()), (dy, b)))
    da, db = torch.empty_like(a), torch.empty_like(b)
    _, g = lora_common.backward_product(x, dy, w, a, b, s.float(), ds.float(), None, None, da, db, SCALING, 0.0)
    return Case(lora_common.gradient_launches(device, g), _check(inputs, {"dA": da, "dB": db}))


def group(device: Device, direction: str) -> Case:
    """S, or dA, of three projections of one X."""
    every = [make_inputs((M, K), 8, R, seed=seed) for seed in range(3)]
    for inputs in every[1:]:
        inputs["x"] = every[0]["x"]
    x = every[0]["x"]
    ws, biases, As, Bs, dys = ([inputs[n] for inputs in every] for n in ("weight", "bias", "lora_A", "lora_B", "grad"))
    scalings = [SCALING] * 3
    s = x.new_empty(M, 3 * R)
    if direction == "forward":
        ys = [torch.empty_like(dy) for dy in dys]
        launches = lora_linear_group.forward_launches(device, x, ws, biases, As, Bs, s, ys, [], scalings, 0.0)
        checks = [_check(inputs, {"Y": y}) for inputs, y in zip(every, ys, strict=True)]
    else:
        s = SCALING * torch.cat([x @ a.t() for a in As], 1)
        parts = lora_linear_group.columns(s, [R] * 3)
        dx, das, dbs = torch.empty_like(x), [torch.empty_like(a) for a in As], [torch.empty_like(b) for b in Bs]
        launches = lora_linear_group.backward_launches(
            device, x, dys, ws, As, Bs, parts, [], scalings, 0.0, dx, das, dbs
        )
        checks = [_check(i, {"dA": da, "dB": db}) for i, da, db in zip(every, das, dbs, strict=True)]

        def check_dx() -> None:
            rights = [testing.oracle(inputs, SCALING)["dX"] for inputs in every]
            torch.testing.assert_close(dx.double(), sum(rights), rtol=1e-5, atol=1e-5)

        checks.append(check_dx)
    return Case(launches, lambda: [check() for check in checks] and None)


def quantized(device: Device, kind: str, direction: str) -> Case:
    """Y from a W of 4 bits, or dX from one of 8 bits."""
    inputs = make_inputs((8, K), N, R)
    weight = testing.nf4_weight(N, K, 16, nested=False) if kind == "nf4" else testing.fp8_weight(N, K)
    inputs["weight"] = weight
    x, _, bias, a, b, dy = _operands(inputs)
    s, y, dx, da, db = x.new_empty(8, R), x.new_empty(8, N), torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)
    in_loop = Choice("in_loop", "a test")
    if direction == "forward":
        launches = lora_linear_quantized.forward_launches(
            device, x, weight.stored, bias, a, b, s, y, None, SCALING, 0.0, in_loop
        )
        return Case(launches, _check(inputs, {"Y": y}))
    s = SCALING * x @ a.t()
    launches = lora_linear_quantized.backward_launches(
        device, x, dy, weight.stored, a, b, s, None, dx, da, db, SCALING, 0.0, in_loop
    )
    return Case(launches, _check(inputs, {"dX": dx, "dA": da, "dB": db}))


CASES: dict[str, Callable[[], Case]] = {
    "split-K, S before Y, two layers": lambda: forward(SM_90, 5, SPLIT, times=2),
    "split-K, S beside Y": lambda: forward(SM_90, 5, FUSED),
    "split-K, dS and dB, dX and dA": lambda: backward(SM_90),
}
