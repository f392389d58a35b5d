"""What no table of calls shows of the layers' kernels: sums that programs share, their counters,
offsets beyond 32 bits.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

import triton
import triton.language as tl
from triton.runtime import interpreter

from stablelora_kernels.dispatch import chained, rules, tiles
from stablelora_kernels.dispatch.problem import DEVICES, SMALL_M, Call
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.tiles import MAX_SHARED_SUMS, Tile
from stablelora_kernels.kernels.common import draw_keep, keep_of
from stablelora_kernels.launch import fill_jobs, workspace
from stablelora_kernels.launch.base import Launch, described
from stablelora_kernels.launch.lora_linear import (
    BackwardCall,
    ForwardCall,
    Gradients,
    backward_launches,
    forward_launches,
)
from stablelora_kernels.ops.meta_calls import linear_launches
from stablelora_kernels.projection import Projection
from stablelora_kernels.reference import philox_ref
from stablelora_kernels.testing import assert_no_worse
from stablelora_kernels.testing.cases import BF16, DEVICE, FP32, Case, Mask, make, run
from stablelora_kernels.testing.expectations import eager, oracle
from tests.helpers.case_checks import assert_close, check
from tests.helpers.cases import far

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="pretends a GPU: runs on machines without one"),
    pytest.mark.usefixtures("poisoned_outputs"),
]


# Sums that several programs share.


def any_counter():
    """Whether a counter, a flag or a ticket was left above 0."""
    lanes = [
        workspace.counters(MAX_SHARED_SUMS, torch.device("cpu"), lane)
        for lane in range(workspace.LANES)
    ]
    return any(lane.any() for lane in lanes)


SHARING = [
    *(Case("linear", (rows, k), (40,), (8,), BF16, FP32, arch="sm_90") for rows, k in ((5, 1300), (550, 64))),
    *(Case("linear", (70, 64), (48,), (16,), BF16, FP32, strategy="one_launch", arch=arch) for arch in ("sm_80", "gfx942")),
    *(
        Case("mlp", (rows, 136), (72, 72, 16), (8, 20, 3), BF16, FP32, p=0.2, strategy=strategy, arch=arch)
        for rows, strategy, arch in (
            (5, "auto", "sm_90"), (70, "auto", "sm_90"), (70, "one_launch", "sm_80"), (70, "branch_first", "sm_80"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", SHARING, ids=str)
def test_shared_sums_do_not_depend_on_who_is_last(case, monkeypatch):
    """Two programs share every sum of several steps. Run from the last to the first, they leave the
    same bits, no counter, and what lies behind their parts.
    """
    shared = []

    def two(device, tiles, steps, **_):
        shared.append(steps > 1)
        return 2 if steps > 1 else 1

    def from_the_end(x, y, z):
        original(*(size - 1 - i for size, i in zip(builder.grid_dim, (x, y, z), strict=True)))

    def scratch(like, *shape, dtype=None):
        size = math.prod(shape)
        memory = torch.full((size + (1 << 18),), 7, dtype=dtype or like.dtype)
        behind.append(memory[size:])
        return memory[:size].view(shape)

    behind = []
    monkeypatch.setattr(fill_jobs, "scratch", scratch)
    monkeypatch.setattr(tiles, "plan_split_k", two)
    first = run(case)
    assert any(shared) and not any_counter()
    check(case, first)
    builder = interpreter.interpreter_builder
    original = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", from_the_end)
    assert_close(run(case), first)
    assert not any_counter()
    assert behind and all((memory == 7).all() for memory in behind)


@pytest.mark.parametrize(("rows", "counted"), [(5, 3), (600, 5), (5200, 5)])
def test_sums_at_the_same_time_have_counters_of_their_own(rows, counted):
    """dS and dB, dX and dA in one launch, the chain that orders them, and the tickets for tiles of
    dX; none may see another's counters.
    """
    given = make(Case("linear", (rows, 200), (2000,), (80,), BF16, BF16))
    x, w, a, b, dy = (given[name] for name in ("x", "weight0", "lora_A0", "lora_B0", "grad0"))
    projection, s = Projection(w, None, a, b, 1.0), x.new_empty(rows, 80)
    backward = BackwardCall(x, [dy], [projection], [s], [None], 0.0, Gradients(x, [a], [b]))
    (launch,) = backward_launches(DEVICES["sm_90"], backward, Choice("one_launch", ""))
    counts = {
        name: t
        for name, t in launch.named.items()
        if name in ("chain", "tickets") or name.endswith("counter")
    }
    found = [t for t in counts.values() if t is not None and t.numel()]
    spans = sorted(
        (counter.data_ptr(), counter.data_ptr() + counter.numel() * 4) for counter in found
    )
    assert len(spans) == counted
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("device", DEVICES.values(), ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_flags_fit_into_a_lane(device, dtype):
    """A flag stands for 64 rows or more; a call with more rows than that many flags have is
    refused.
    """
    most = Call("forward", tiles.MAX_CHAINED_M, 4096, 4096, 16, dtype, FP32, True)
    rows = chained.chained_plans(device, most, Tile(64, 64, 32, 4, 3), False)[0].tile.BLOCK_M
    assert rows >= 64 and tiles.CHAIN_HEAD + -(-most.m // rows) <= MAX_SHARED_SUMS
    rules.check_possible(most, "one_launch")
    with pytest.raises(ValueError, match=f"rows up to {most.m}, got {most.m + 1}"):
        rules.check_possible(most._replace(m=most.m + 1), "one_launch")


@pytest.mark.parametrize("device", DEVICES.values(), ids=str)
def test_counters_of_the_widest_layers_fit_into_a_lane(device):
    """A vocabulary's dB has thousands of tiles."""
    counted = [
        t.numel()
        for n, r in itertools.product((4096, 262_144, (4096, 4096, 4096)), (16, 512))
        for way in linear_launches(device, 16_384, n, 4096, r, (BF16, FP32), 0.1)
        for launch in way
        if isinstance(launch, Launch)
        for name, t in launch.named.items()
        if isinstance(t, torch.Tensor) and name.endswith(("chain", "tickets", "counter"))
    ]
    assert 0 < max(counted) <= MAX_SHARED_SUMS


def test_what_a_descriptor_can_hold():
    memory = torch.zeros(64 * 64 + 16, dtype=BF16)
    aligned = -memory.data_ptr() % 16 // memory.itemsize
    rows = memory[aligned:][: 64 * 64].view(64, 64)
    assert described(rows) and described(rows[8:, 8:])
    others = {
        "address": rows[:, 1:],
        "stride": memory[aligned:][: 63 * 60].view(63, 60),
        "columns": rows.t(),
        "rows of stride 0": rows[:1].expand(64, 64),
    }
    assert [name for name, t in others.items() if described(t)] == []


# Offsets beyond 32 bits.

STRATEGIES = [
    (strategy, rows, arch)
    for strategy, rows, arch in itertools.product(
        rules.STRATEGIES[1:], (40, 72), ("sm_80", "sm_90")
    )
    if strategy != "few_rows" or rows <= SMALL_M
]


@pytest.mark.covering(1)
@pytest.mark.parametrize(("strategy", "rows", "arch"), STRATEGIES)
def test_rows_beyond_2_to_the_31(strategy, rows, arch):
    """All operands with their last rows more than 2^31 elements behind their first."""
    r = 40 if strategy == "one_launch" else 24
    case = Case("linear", (rows, 48), (40,), (r,), BF16, BF16, strategy=strategy, arch=arch)
    given = make(case)
    wide = dict(given)
    for name in ("x", "weight0", "lora_A0", "lora_B0", "grad0"):
        last = given[name].shape[0] - 1
        wide[name] = far(given[name], -(-(2**31 + 2**27) // last // 8) * 8)
        assert last * wide[name].stride(0) > 2**31
    close = run(case, given)
    check(case, close, given)
    assert_close(run(case, wide), close)


@pytest.mark.covering(1)
@pytest.mark.parametrize(("strategy", "rows", "arch"), STRATEGIES)
def test_results_beyond_2_to_the_31(strategy, rows, arch):
    """Y and S stored so far apart; the ops allocate them close together, so the launches are made
    here.
    """
    case = Case("linear", (rows, 48), (40,), (24,), BF16, BF16)
    given = make(case)
    x, w, bias, a, b = (given[name] for name in ("x", "weight0", "bias0", "lora_A0", "lora_B0"))
    y, s = (far(torch.full((rows, size), float("nan"), dtype=BF16), 2**26) for size in (40, 24))
    assert (rows - 1) * y.stride(0) > 2**31
    projection, choice = Projection(w, bias, a, b, 1.7), Choice(strategy, "")
    forward = ForwardCall(x, [projection], [None], [None], s, [y], 0.0)
    for launch in forward_launches(DEVICES[arch], forward, choice):
        launch.run(x.device)
    assert_no_worse(y, *(by(case, given, [Mask()])["Y0"] for by in (oracle, eager)), name="Y")
    assert_no_worse(s, 1.7 * x.double() @ a.double().T, 1.7 * x @ a.T, name="S")


LINEAR = Case("linear", (40, 144), (72,), (24,), BF16, BF16)
GROUP = Case("group", (70, 144), (72, 72), (24, 8), BF16, BF16, arch="sm_80")
MLP = Case(
    "mlp", (70, 144), (72, 72, 16), (8, 8, 8), BF16, FP32, strategy="one_launch", arch="sm_80"
)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        *((LINEAR.but(strategy=strategy, arch=arch), ["x", "weight0", "lora_A0", "lora_B0"])
          for strategy, arch in (("few_rows", "sm_80"), ("one_launch", "sm_90"), ("one_launch", "sm_80"))),
        (GROUP, ["x", "weight1", "lora_B0"]),
        (MLP, ["x"]),
        (MLP, ["weight0", "weight1"]),
    ],
    ids=str,
)  # fmt: skip
def test_steps_beyond_2_to_the_31(case, names):
    """Operands with columns so far apart that a step along the sum exceeds 2^31 elements."""
    given = make(case)
    wide = given | {name: far(given[name].t(), 2**26).t() for name in names}
    assert all(64 * wide[name].stride(1) > 2**31 for name in names)
    check(case, run(case, wide), given)


@triton.jit
def _to_float32_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index).to(tl.float32))


def test_every_bfloat16_becomes_its_float32():
    """In the interpreter as tests/helpers/interpreter.py has it, which converts in another way than
    Triton's.
    """
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)
    out = torch.empty(2**16, dtype=FP32)
    _to_float32_kernel[(1,)](every, out, BLOCK=2**16)
    torch.testing.assert_close(out, every.float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _mask_kernel(out_ptr, seed, row0, n_cols, threshold, BLOCK_C: tl.constexpr):
    rows = row0 + tl.arange(0, 4).to(tl.int64)
    keep = keep_of(draw_keep(seed, rows, 0, n_cols, threshold, BLOCK_C))
    tl.store(
        out_ptr + tl.arange(0, 4)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :],
        keep.to(tl.int32),
    )


@pytest.mark.parametrize("row0", [0, 2**31 - 2, 2**40])
def test_mask_beyond_2_to_the_32_groups(row0):
    """Of elements, one whose random bits are the threshold, which keeps it."""
    seed, columns = 2**61 + 12345, 32
    out = torch.full((4, columns), -1, dtype=torch.int32)
    words = philox_ref(seed, torch.arange(row0 * 4, (row0 + 4) * 4, dtype=torch.int64))
    drawn = torch.stack((words, words >> 16), dim=-1).reshape(4, columns) & 0x7FFF
    least = int(drawn.flatten().sort().values[50])
    _mask_kernel[(1,)](out, seed, row0, columns, least, BLOCK_C=columns)
    assert torch.equal(out.bool(), drawn >= least)
    assert 0 < out.sum() < out.numel()


def test_tiles_fit_into_shared_memory_by_their_own_arithmetic():
    """``fit`` takes stages away until the buffers fit, and never the last two."""
    tile = Tile(128, 256, 64, 8, 4)
    for device, stage in itertools.product(DEVICES.values(), (10_000, 60_000, 200_000)):
        spare, stages = 0 if device.tma else 1, tiles.fit(tile, device, stage).num_stages
        assert 2 <= stages <= 4
        assert stages == 2 or (stages - spare) * stage <= device.shared_limit
        assert stages == 4 or (stages + 1 - spare) * stage > device.shared_limit
