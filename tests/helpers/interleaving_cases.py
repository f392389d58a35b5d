"""Cases for the interleaving tests: tiny launches of every kernel with a shared sum, with a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from stablelora_kernels import testing
from stablelora_kernels.dispatch import mlp as mlp_tiles
from stablelora_kernels.dispatch import problem, rules, tiles
from stablelora_kernels.dispatch.problem import Device, Rule
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.settings import use_backend, use_kernel
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.kernels.lora.jobs import Gate
from stablelora_kernels.launch import jobs, lora_linear, lora_mlp, products
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.triton_step import TritonStep
from stablelora_kernels.projection import Projection
from stablelora_kernels.reference import StableAdamWRef
from stablelora_kernels.reference.mlp import activation_ref
from stablelora_kernels.testing import assert_no_worse
from tests.helpers import case_checks, cases
from tests.helpers.inputs import BF16, FP32, SCALING, Inputs, make_branch_inputs, make_inputs
from tests.helpers.optimizers import in_float64, make_pairs, params_of, set_grads
from tests.helpers.steps import assert_close_to

# GPUs with and without tensor descriptors.
SM_90, SM_120 = Device("sm_90", 2, 232_448), Device("sm_120", 2, 101_376)
CHAINED, SPLIT, FUSED, IN_LOOP = (Choice(kernel, "a test") for kernel in ("chained", "split", "fused", "in_loop"))
N, K, R = 16, 16, 4
# Of an MLP: G's and U's columns.
F = 32
# Dispatch takes the split-K kernel up to FEW rows.
FEW, MANY = 12, 24


class Case(NamedTuple):
    """Launches of one stream. ``check`` asserts that the tensors hold the right results."""

    launches: Sequence[Launch]
    check: Callable[[], None]
    # Tensors that kernels reach through addresses in tables.
    others: Sequence[Tensor] = ()


def shrink_sizes(patch: pytest.MonkeyPatch) -> None:
    """Tiny tiles, and two programs for each sum."""
    for name in dir(tiles):
        if name.endswith("_TILES"):
            patch.setattr(tiles, name, (Rule(lambda d, c: True, Tile(8, 16, 8, 1, 2), "a test"),))
    patch.setattr(tiles, "plan_split_k", lambda device, tiles, steps, **_: 2 if steps > 1 else 1)
    patch.setattr(problem, "SMALL_M", FEW)
    patch.setattr(problem, "CHAINED_M", 0)


@contextmanager
def new_memory_is_poisoned() -> Iterator[None]:
    """``torch.empty`` holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def _check(inputs: Inputs, found: dict[str, Tensor]) -> Callable[[], None]:
    def check() -> None:
        right, eager = testing.oracle(inputs, SCALING), testing.eager(inputs, SCALING)
        for name, value in found.items():
            assert_no_worse(value, right[name], eager[name], dtype=inputs["x"].dtype, name=name)

    return check


def _all(checks: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def check() -> None:
        for each in checks:
            each()

    return check


def _operands(inputs: Inputs) -> tuple[Any, ...]:
    return tuple(inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B", "grad"))


def _product(p: Tensor, q: Tensor) -> Tensor:
    """scaling P Q, rounded once."""
    return (SCALING * (p.double() @ q.double())).to(p.dtype)


def forward(device: Device, m: int, choice: Choice, dtype: torch.dtype = FP32, layers: int = 1) -> Case:
    """S and Y of one layer after another. Their launches share counters."""
    launches: list[Launch] = []
    checks = []
    for seed in range(layers):
        inputs = make_inputs((m, K), N, R, dtype=dtype, seed=seed)
        x, w, bias, a, b, _ = _operands(inputs)
        s, y = x.new_empty(m, R), x.new_empty(m, N)
        projection = Projection(w, bias, a, b, SCALING)
        launches += lora_linear.forward_launches(device, x, [projection], [None], s, [y], 0.0, choice=choice)
        checks.append(_check(inputs, {"Y": y}))
    return Case(launches, _all(checks))


def _backward(
    device: Device, x: Tensor, dy: Tensor, projection: Projection, s: Tensor, results: Any, choice: Choice
) -> list[Any]:
    dx, da, db = results
    return lora_linear.backward_launches(device, x, [dy], [projection], [s], [None], 0.0, (dx, [da], [db]), choice)


def branch_backward(choice: Choice) -> Case:
    """As :func:`backward` for the branch alone."""
    inputs = make_branch_inputs((MANY, K), N, R)
    x, a, b, dy = (inputs[name] for name in ("x", "lora_A", "lora_B", "grad"))
    dx, da, db = (torch.empty_like(t) for t in (x, a, b))
    projection = Projection(None, None, a, b, SCALING)
    launches = _backward(SM_90, x, dy, projection, _product(x, a.t()), (dx, da, db), choice)
    return Case(launches, _check(inputs, {"dX": dx, "dA": da, "dB": db}))


def backward(device: Device, m: int, dtype: torch.dtype = FP32, choice: Choice = SPLIT) -> Case:
    """dS with dB, then dX with dA, in two launches or in one."""
    inputs = make_inputs((m, K), N, R, dtype=dtype)
    x, w, _, a, b, dy = _operands(inputs)
    dx, da, db = (torch.empty_like(t) for t in (x, a, b))
    projection = Projection(w, None, a, b, SCALING)
    launches = _backward(device, x, dy, projection, _product(x, a.t()), (dx, da, db), choice)
    return Case(launches, _check(inputs, {"dX": dx, "dA": da, "dB": db}))


def weight_grads() -> Case:
    """dA and dB in a launch of their own."""
    inputs = make_inputs((FEW, K), N, R)
    x, w, _, a, b, dy = _operands(inputs)
    s, ds, da, db = _product(x, a.t()), _product(dy, b), torch.empty_like(a), torch.empty_like(b)
    p = jobs.backward_product(x, dy, Projection(w, None, a, b, SCALING), s, None, 0.0, (None, da, db), ds)
    return Case([products.weight_grads(SM_90, [p])], _check(inputs, {"dA": da, "dB": db}))


def _group() -> tuple[list[Inputs], Tensor, list[list[Tensor]]]:
    """Inputs of three projections of one X, and X, W, bias, A, B and dY of each."""
    every = [make_inputs((16, K), 8, R, seed=seed) for seed in range(3)]
    x = every[0]["x"]
    every = [inputs | {"x": x} for inputs in every]
    return every, x, [[each[name] for each in every] for name in ("weight", "bias", "lora_A", "lora_B", "grad")]


def group_forward() -> Case:
    """S of three projections, then each one's Y."""
    every, x, (ws, biases, As, Bs, dys) = _group()
    s, ys = x.new_empty(len(x), 3 * R), [torch.empty_like(dy) for dy in dys]
    projections = [Projection(*each, SCALING) for each in zip(ws, biases, As, Bs, strict=True)]
    launches = lora_linear.forward_launches(SM_120, x, projections, [None] * 3, s, ys, 0.0)
    return Case(launches, _all([_check(inputs, {"Y": y}) for inputs, y in zip(every, ys, strict=True)]))


def group_of_shared_sums(patch: pytest.MonkeyPatch) -> Case:
    """S of three projections, then each one's Y, whose programs share sums."""
    patch.setattr(rules, "choose_form", lambda device, call, described: "split_k")
    patch.setattr(tiles, "fill_split_k", tiles.plan_split_k)
    return group_forward()


def group_backward() -> Case:
    """Each projection's dS, dB and part of dX, then all their dA."""
    every, x, (ws, _, As, Bs, dys) = _group()
    s = [_product(x, a.t()) for a in As]
    dx, das, dbs = torch.empty_like(x), [torch.empty_like(a) for a in As], [torch.empty_like(b) for b in Bs]
    projections = [Projection(w, None, a, b, SCALING) for w, a, b in zip(ws, As, Bs, strict=True)]
    launches = lora_linear.backward_launches(SM_120, x, dys, projections, s, [None] * 3, 0.0, (dx, das, dbs))

    def check_dx() -> None:
        right = sum(testing.oracle(inputs, SCALING)["dX"] for inputs in every)
        torch.testing.assert_close(dx.double(), right, rtol=1e-5, atol=1e-5)

    found = zip(every, das, dbs, strict=True)
    return Case(launches, _all([check_dx, *(_check(inputs, {"dA": da, "dB": db}) for inputs, da, db in found)]))


def quantized_forward() -> Case:
    """Y from a W of 4 bits."""
    inputs = make_inputs((8, K), N, R) | {"weight": testing.nf4_weight(N, K, 16, nested=False)}
    x, w, bias, a, b, dy = _operands(inputs)
    s, y = x.new_empty(len(x), R), torch.empty_like(dy)
    projection = Projection(w.stored, bias, a, b, SCALING)
    launches = lora_linear.forward_launches(SM_90, x, [projection], [None], s, [y], 0.0, choice=IN_LOOP)
    return Case(launches, _check(inputs, {"Y": y}))


def quantized_backward() -> Case:
    """dX from a W of 8 bits."""
    inputs = make_inputs((FEW, K), N, R) | {"weight": testing.fp8_weight(N, K)}
    x, w, _, a, b, dy = _operands(inputs)
    dx, da, db = (torch.empty_like(t) for t in (x, a, b))
    projection = Projection(w.stored, None, a, b, SCALING)
    launches = _backward(SM_90, x, dy, projection, _product(x, a.t()), (dx, da, db), IN_LOOP)
    return Case(launches, _check(inputs, {"dX": dx, "dA": da, "dB": db}))


def gate_and_up(patch: pytest.MonkeyPatch, device: Device) -> Case:
    """S of gate and up, both products with the activation, then S and Y of down."""
    _wider_tiles(patch)
    case = cases.Case("mlp", (16, K), (F, F, 8), (R, R, R), BF16, BF16)
    given = cases.make(case)
    parts = [[given[f"{kind}{i}"] for i in range(3)] for kind in ("weight", "bias", "lora_A", "lora_B")]
    y, g, u, s, s_down = (given["x"].new_empty(16, width) for width in (8, F, F, 2 * R, R))
    projections = [Projection(*each) for each in zip(*parts, case.scalings, strict=True)]
    results = (y, g, u, s, s_down)
    with use_kernel("split"):
        launches = lora_mlp.mlp_forward_launches(device, given["x"], projections, [None] * 3, 0.0, "silu", results)

    def check() -> None:
        right, eager = (found(case, given, [None] * 3, 0.0) for found in (case_checks.oracle, case_checks.eager))
        assert_no_worse(y, right["Y0"], eager["Y0"], name="Y")

    return Case(launches, check)


def _wider_tiles(patch: pytest.MonkeyPatch) -> None:
    """A descriptor holds no quarter of a tile's 16 columns in bfloat16."""
    for module, name in ((tiles, "TMA_TILES"), (mlp_tiles, "GATE_UP_TILES"), (mlp_tiles, "GATE_UP_TMA_TILES")):
        patch.setattr(module, name, (Rule(lambda d, c: True, Tile(8, F, 8, 1, 2), "a test"),))


def gated_backward() -> Case:
    """dS and dB of down, its dH as dG and dU, and its dA, for which H is computed again; in one launch."""
    g, u = (make_inputs((8, K), N, R, seed=seed)["x"] for seed in (1, 2))
    h = activation_ref(g.double(), "gelu")[0] * u.double()
    inputs = make_inputs((8, K), N, R) | {"x": h.float()}
    x, w, _, a, b, dy = _operands(inputs)
    ds, dg, du, da, db = dy.new_empty(8, R), *(torch.empty_like(t) for t in (g, u, a, b))
    projection = Projection(w, None, a, b, SCALING)
    p = jobs.backward_product(g, dy, projection, _product(x, a.t()), None, 0.0, (dg, da, db), ds)
    p = p._replace(call=p.call._replace(gated=True), activation="gelu", gate=Gate(g, u, du))
    launches = lora_linear.product_launches(SM_90, p, CHAINED)

    def check_gate() -> None:
        act, slope = activation_ref(g.double(), "gelu")
        dh = testing.oracle(inputs, SCALING)["dX"]
        for found, right in ((dg, dh * u.double() * slope), (du, dh * act)):
            torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)

    return Case(launches, _all([check_gate, _check(inputs, {"dA": da, "dB": db})]))


def optimizer_steps(patch: pytest.MonkeyPatch) -> Case:
    """Two clipped steps: the first measures all sums of squares, the second goes by those that the first has left."""
    launches: list[Launch] = []

    def record(launch: Launch, device: torch.device) -> None:
        launches.append(launch._replace(options={}))

    patch.setattr(Launch, "run", record)
    patch.setattr(TritonStep, "CHUNK", 16)
    options = {"lr": 2e-2, "shrink_ratio": 0.01, "max_grad_norm": 0.1}
    pairs = make_pairs([(2, 7, 9)])
    for pair in pairs:
        pair.B.data.normal_(generator=torch.Generator().manual_seed(1))
    oracle = StableAdamWRef(in_float64(pairs), **options)
    with use_backend("triton"):
        optimizer = StableLoRAAdamW(pairs, **options)
        params = params_of(optimizer)
        set_grads(params, 3)
        for _ in range(2):
            optimizer.step()
            oracle.step({q: p.grad.double() for p, q in zip(params, oracle.params, strict=True)})
    state = [value for p in params for value in optimizer.state[p].values()]

    def check() -> None:
        assert_close_to(oracle, optimizer)

    return Case(launches, check, [t.detach() for t in (*params, *(p.grad for p in params), *state)])


# The names appear in test ids.
CASES: dict[str, Callable[[pytest.MonkeyPatch], Case]] = {
    "split-K, S then Y, two layers": lambda patch: forward(SM_90, FEW, SPLIT, layers=2),
    "split-K, S beside Y": lambda patch: forward(SM_90, FEW, FUSED),
    "split-K, dS and dB, dX and dA": lambda patch: backward(SM_90, FEW),
    "pointers, S then Y, two layers": lambda patch: forward(SM_120, 16, SPLIT, layers=2),
    "pointers, dS and dB, dX and dA": lambda patch: backward(SM_120, 16),
    "descriptors, S then Y": lambda patch: forward(SM_90, MANY, SPLIT, BF16),
    "descriptors, dS and dB, dX and dA": lambda patch: backward(SM_90, MANY, BF16),
    "chained split-K, S and Y, two layers": lambda patch: forward(SM_90, FEW, CHAINED, layers=2),
    "chained pointers, S and Y, two layers": lambda patch: forward(SM_120, MANY, CHAINED, layers=2),
    "chained descriptors, S and Y, two layers": lambda patch: forward(SM_90, MANY, CHAINED, BF16, layers=2),
    "chained split-K, all gradients": lambda patch: backward(SM_90, FEW, choice=CHAINED),
    "chained pointers, all gradients": lambda patch: backward(SM_120, MANY, choice=CHAINED),
    "chained descriptors, all gradients": lambda patch: backward(SM_90, MANY, BF16, CHAINED),
    "branch, dS and dB, dX and dA": lambda patch: branch_backward(SPLIT),
    "chained branch, all gradients": lambda patch: branch_backward(CHAINED),
    "dA and dB alone": lambda patch: weight_grads(),
    "group, S then three Y": lambda patch: group_forward(),
    "group, S then three split-K Y": group_of_shared_sums,
    "group, three dX, then dA": lambda patch: group_backward(),
    "quantized, S then Y": lambda patch: quantized_forward(),
    "quantized, dS and dB, dX, dA": lambda patch: quantized_backward(),
    "gate and up by pointers, S to Y": lambda patch: gate_and_up(patch, SM_120),
    "gate and up by descriptors, S to Y": lambda patch: gate_and_up(patch, SM_90),
    "chained gated split-K, all gradients": lambda patch: gated_backward(),
    "optimizer, two clipped steps": optimizer_steps,
}
