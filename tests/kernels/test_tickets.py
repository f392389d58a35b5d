"""Tiles by ticket: each is computed once, whichever program draws it, and the counter is 0
afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product as product_of
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from triton.runtime import interpreter

from stablelora_kernels.dispatch.problem import DEVICES, cdiv
from stablelora_kernels.dispatch.rules import STRATEGIES, Choice
from stablelora_kernels.launch import workspace
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.launch.lora_linear import ForwardCall, forward_launches
from stablelora_kernels.ops.meta_calls import linear_launches
from stablelora_kernels.projection import Projection
from stablelora_kernels.testing.cases import BF16, DEVICE, FP16, FP32, TINY, Case, make, run
from tests.helpers.case_checks import assert_close, check

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="pretends a GPU: runs on machines without one"),
    pytest.mark.usefixtures("poisoned_outputs"),
]

# On a GPU of so few processors, each program has several tiles, and the last of them not equally
# many.
TILES = Case(
    "linear", (140, 48), (104,), (16,), BF16, FP32, strategy="one_launch", arch="sm_90", processors=3, tile=TINY
)  # fmt: skip
CASES = [
    *(TILES.but(p=p) for p in (0.0, 0.2)),
    # S has a launch of its own.
    *(TILES.but(op="group", sizes=(104, 40), ranks=(16, 4), p=p) for p in (0.0, 0.2)),
    TILES.but(dtype=FP16, lora_dtype=FP16),
    # More programs than tiles in backward; one program for all tiles.
    TILES.but(shape=(140, 32), processors=5),
    TILES.but(processors=1),
    Case(
        "mlp", (140, 48), (104, 104, 48), (8, 4, 3), BF16, FP32, strategy="one_launch", arch="sm_90",
        processors=2, tile=TINY,
    ),
]  # fmt: skip


@contextmanager
def in_order(order: Callable[[int], int]) -> Iterator[None]:
    """Let the interpreter, which runs one program after another, begin with other ones:
    ``order(i)``, counted from the last one, in place of the i-th.
    """
    builder = interpreter.interpreter_builder
    original = builder.set_grid_idx

    def set_grid_idx(x: int, y: int, z: int) -> None:
        programs = builder.grid_dim[0]
        original(order(programs - 1 - x) % programs, y, z)

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        builder.set_grid_idx = original


def left_over() -> int:
    """The counters of all lanes that are not 0."""
    cpu = torch.device("cpu")
    lanes = [
        workspace.counters(workspace.MAX_SHARED_SUMS, cpu, lane) for lane in range(workspace.LANES)
    ]
    return sum(int(lane.count_nonzero()) for lane in lanes)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tile_does_not_depend_on_who_draws_it(case: Case) -> None:
    """The program that begins first draws every tile that is not the first of another one."""
    first = run(case)
    check(case, first)
    assert left_over() == 0
    for order in (lambda i: i, lambda i: i + 1):
        with in_order(order):
            assert_close(run(case), first)
        assert left_over() == 0


def product(rows: int, processors: int) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch of a forward that reads S, its Y, and Y as it must be.

    It is the first of two projections', whose S one launch computes.
    """
    case = Case("linear", (rows, 64), (264,), (16,), BF16, BF16)
    given = make(case)
    x, w, a, b = (given[name] for name in ("x", "weight0", "lora_A0", "lora_B0"))
    y = torch.full((rows, 264), float("nan"), dtype=BF16)
    s = torch.empty(rows, 32, dtype=BF16)
    projections, none = [Projection(w, None, a, b, 1.0)] * 2, [None] * 2
    call = ForwardCall(x, projections, none, none, s, [y, torch.empty_like(y)], 0.0)
    device = DEVICES["sm_90"]._replace(processors=processors)
    down, launch, _ = forward_launches(device, call)
    assert isinstance(down, Launch) and isinstance(launch, Launch)
    down.run(x.device)
    exact = x.double() @ w.double().T + (x.double() @ a.double().T) @ b.double().T
    return launch, y, exact


def test_tiles_of_one_round_draw_no_ticket() -> None:
    """The counter may then hold anything, which stays."""
    launch, y, exact = product(rows=140, processors=132)
    tickets = launch.arguments["tickets"]
    tickets.fill_(77)
    try:
        launch.run(y.device)
        assert int(tickets) == 77
    finally:
        tickets.zero_()
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=0.05)


def test_tickets_decide_about_tiles() -> None:
    """A counter that is one too high leaves out one tile."""
    launch, y, exact = product(rows=700, processors=4)
    arguments = launch.arguments
    tile = arguments["TILE"]
    assert cdiv(700, tile.BLOCK_M) * cdiv(264, tile.BLOCK_N) > arguments["PRODUCTS"] == 4
    launch.run(y.device)
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=0.05)
    y.fill_(float("nan"))
    arguments["tickets"].fill_(1)
    launch.run(y.device)
    left_out = (y.isnan() | y.isinf()).nonzero()
    first, last = left_out.min(0).values, left_out.max(0).values
    assert (last - first < torch.tensor([tile.BLOCK_M, tile.BLOCK_N])).all()
    assert left_over() == 0


def persistent(launch: Any) -> bool:
    """Whether programs of the product take more than one tile each."""
    arguments = launch.arguments
    if "TILE" not in arguments or not arguments.get("PRODUCTS", 1):
        return False
    tile = arguments["TILE"]
    tiles = cdiv(arguments["M"], tile.BLOCK_M) * cdiv(arguments["N"], tile.BLOCK_N)
    programs = arguments.get("PRODUCTS", math.prod(launch.grid))
    return tiles * int(arguments.get("SPLITS", 1)) > programs


@pytest.mark.parametrize("arch", DEVICES)
def test_no_program_of_a_product_has_fixed_tiles(arch: str) -> None:
    """Of any kernel, on any GPU: those whose programs take several tiles draw tickets."""
    by_kernel: dict[str, set[bool]] = {}
    device = DEVICES[arch]
    for rows in (8, 512, 8192):
        for strategy, n in product_of(STRATEGIES[1:], (4096, (4096, 4096))):
            choices = (Choice(strategy, ""), Choice(strategy, ""))
            forward, backward = linear_launches(
                device, rows, n, 4096, 16, (BF16, FP32), 0.0, choices=choices
            )
            for launch in forward + backward:
                if isinstance(launch, Launch) and persistent(launch):
                    name = launch.kernel.__name__
                    drawn = launch.arguments.get("tickets") is not None
                    by_kernel.setdefault(name, set()).add(drawn)
    assert by_kernel == ({"_lora_linear_tma_kernel": {True}} if device.tma else {})
