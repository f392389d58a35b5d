"""Every kernel of lora_linear, forced and at tiny tiles, on each kind of GPU that dispatch tells apart, in the interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import triton
import triton.language as tl

import stablelora_kernels as slk
from stablelora_kernels.dispatch import problem, tiles
from stablelora_kernels.dispatch.problem import DEVICES, Call
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.kernels.common import keep_mask
from stablelora_kernels.launch import counters, lora_common
from stablelora_kernels.launch.lora_linear import backward_launches, forward_launches
from stablelora_kernels.reference import philox_ref
from stablelora_kernels.testing import assert_no_worse
from tests.helpers.inputs import BF16, DEVICE, FP32, SCALING, make_inputs
from tests.helpers.launches import count_launches
from tests.helpers.oracle import check, eager, oracle, run, run_dropped

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="another GPU than the one that is here is pretended"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
ARCHES = ("sm_80", "sm_90")


@pytest.fixture(params=ARCHES)
def arch(request, monkeypatch):
    """The interpreter stands in for this GPU: sm_90 reads through descriptors where strides allow, sm_80 never does."""
    monkeypatch.setattr(problem, "device_of", lambda device: DEVICES[request.param])
    return request.param


def check_run(inputs: dict[str, Tensor | None], p: float, kernel: str = "auto") -> None:
    """A call by ``kernel`` is right, with dropout by the mask that it must have used."""
    with slk.use_kernel(kernel):
        results = (run(inputs, "triton"),) if p == 0 else run_dropped(inputs, "triton", p)
    check(inputs, *results)


def test_descriptors_are_used_where_they_can_be(monkeypatch):
    monkeypatch.setattr(problem, "device_of", lambda device: DEVICES["sm_90"])
    for shape, n, expected in (((70, 64), 48, "_lora_linear_tma_kernel"), ((70, 63), 48, "_lora_linear_kernel")):
        with count_launches() as made:
            run(make_inputs(shape, n, 16, dtype=BF16), "triton")
        assert made == {expected: 2}


# Sums that several programs share.


def shared_sums(inputs: dict[str, Tensor | None], p: float = 0.0) -> dict[str, int]:
    """How many programs share a sum in a call, by kernel, and by "dA" and "dB" beside others; the most of its launches."""
    x, w, a, b = (inputs[name] for name in ("x", "weight", "lora_A", "lora_B"))
    device, (m, _), n, r = DEVICES["sm_90"], x.shape, w.shape[0], a.shape[0]
    y, s, seed = x.new_empty(m, n), x.new_empty(m, r), torch.zeros(1, dtype=torch.int64) if p else None
    found = forward_launches(device, x, w, None, a, b, s, y, seed, 1.0, p)
    found += backward_launches(device, x, y, w, a, b, s, seed, x, a, b, scaling=1.0, dropout_p=p)
    most: dict[str, int] = {}
    for launch in (launch for launch in found if hasattr(launch, "kernel")):
        name, arguments = launch.kernel.__name__, dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        beside = "dB" if name == "_lora_shrink_kernel" else "dA"
        counts = [(name, "SPLITS"), (beside, "GRAD_SPLITS")]
        if launch.constants.get("CHAINED"):
            counts += [("S", "S_SPLITS"), ("dB", "DB_SPLITS")]
        for key, count in counts:
            most[key] = max(most.get(key, 1), arguments.get(count, 1))
    return most


@pytest.mark.covering
@pytest.mark.parametrize(("dtype", "lora_dtype"), [(FP32, FP32), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "r"), [(5, 3), (5, 40)])
def test_shared_sums_of_few_rows(rows, r, p, dtype, lora_dtype):
    """K of forward, then N of backward, so long that programs share it, in parts that do not come out even."""
    for k, n in ((1100, 72), (72, 1100)):
        inputs = make_inputs((rows, k), n, r, dtype=dtype, lora_dtype=lora_dtype)
        found = shared_sums(inputs, p)
        assert found["_lora_linear_split_k_kernel"] > 1
        # Without dropout, forward's product computes S itself.
        assert found["S"] > 1 or (k > n and p == 0)
        check_run(inputs, p)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("r", [3, 80])
def test_shared_sums_of_many_rows(r, p):
    inputs = make_inputs((550, 20), 24, r, dtype=BF16, lora_dtype=FP32)
    found = shared_sums(inputs, p)
    assert found["dA"] > 1 and found["dB"] > 1
    for kernel in ("auto", "vendor"):
        with slk.use_kernel(kernel):
            assert kernel == "auto" or shared_sums(inputs, p)["_lora_weight_grads_kernel"] > 1
        check_run(inputs, p, kernel)


@pytest.mark.parametrize("rows", [5, 550])
def test_shared_sums_do_not_depend_on_who_is_last(rows, monkeypatch):
    """Programs in another order: the same bits, and counters that are 0 again."""
    inputs = make_inputs((rows, 1300 if rows == 5 else 64), 40, 8, dtype=BF16, lora_dtype=FP32)
    assert max(shared_sums(inputs).values()) > 1
    first = run(inputs, "triton")
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    original, turned = builder.set_grid_idx, []

    def from_the_end(x: int, y: int, z: int) -> None:
        turned.append((x, y, z))
        original(*(size - 1 - i for size, i in zip(builder.grid_dim, (x, y, z), strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", from_the_end)
    second = run(inputs, "triton")
    assert turned
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert counters._in_use
    assert all(not counter.any() for counter in counters._in_use.values())


@pytest.mark.parametrize(("rows", "counted"), [(5, 3), (600, 5)])
def test_sums_at_the_same_time_have_counters_of_their_own(rows, counted):
    """dS and dB, dX and dA in one launch, and the chain that orders them; none may see another's counters."""
    inputs = make_inputs((rows, 200), 2000, 80, dtype=BF16)
    x, w, a, b, dy = (inputs[name] for name in ("x", "weight", "lora_A", "lora_B", "grad"))
    made = backward_launches(
        DEVICES["sm_90"], x, dy, w, a, b, x.new_empty(rows, 80), None, x, a, b, scaling=1.0, dropout_p=0.0
    )
    spans = []
    for launch in made:
        arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        names = ("counter_ptr", "grad_counter_ptr", "s_counter_ptr", "db_counter_ptr", "chain_ptr")
        for counter in (arguments.get(name) for name in names):
            if counter is not None and counter.numel():
                spans.append((counter.data_ptr(), counter.data_ptr() + counter.numel() * 4))
    assert len(made) == 1 and len(spans) == counted
    for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
        assert end <= start


# Offsets beyond 32 bits.


@pytest.mark.covering(1)
@pytest.mark.parametrize("kernel", ["fused", "chained", "split", "vendor"])
@pytest.mark.parametrize("rows", [40, 72])
def test_offsets_beyond_2_to_the_31(kernel, rows, arch, spacious):
    """x, the weight, A, B and dY with their last rows more than 2^31 elements behind their first."""
    inputs = make_inputs((rows, 48), 40, 24 if kernel != "split" else 40, dtype=BF16)
    wide = dict(inputs)
    for name in ("x", "weight", "lora_A", "lora_B", "grad"):
        matrix = inputs[name]
        stride = -(-(2**31 + 2**27) // (matrix.shape[0] - 1) // 8) * 8
        wide[name] = spacious(matrix, stride)
        assert (matrix.shape[0] - 1) * stride > 2**31
    with slk.use_kernel(kernel):
        close, far = run(inputs, "triton"), run(wide, "triton")
    check(inputs, close)
    for name in close:
        assert torch.equal(close[name], far[name]), name


@pytest.mark.covering(1)
@pytest.mark.parametrize("kernel", ["fused", "chained", "split", "vendor"])
@pytest.mark.parametrize("rows", [40, 72])
def test_results_beyond_2_to_the_31(kernel, rows, arch, spacious):
    """Y and S stored so far apart; the ops allocate them close together, so the launches are made here."""
    inputs = make_inputs((rows, 48), 40, 24, dtype=BF16)
    x, w, bias, a, b = (inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    y, s = (spacious(torch.full((rows, size), float("nan"), dtype=BF16)) for size in (40, 24))
    assert (rows - 1) * y.stride(0) > 2**31
    for launch in forward_launches(DEVICES[arch], x, w, bias, a, b, s, y, None, SCALING, 0.0, Choice(kernel, "")):
        launch.run(x.device)
    assert_no_worse(y, oracle(inputs)["Y"], eager(inputs)["Y"], name="Y")
    assert_no_worse(s, SCALING * x.double() @ a.double().T, SCALING * x @ a.T, name="S")


@pytest.mark.covering(1)
@pytest.mark.parametrize("kernel", ["fused", "chained", "split"])
@pytest.mark.parametrize("rows", [40, 72])
def test_steps_beyond_2_to_the_31(kernel, rows, arch, spacious):
    """x, the weight, A and B with columns so far apart that a step along the sum exceeds 2^31 elements."""
    inputs = make_inputs((rows, 144), 72, 24, dtype=BF16)
    wide = inputs | {name: spacious(inputs[name].t()).t() for name in ("x", "weight", "lora_A", "lora_B")}
    assert 64 * wide["x"].stride(1) > 2**31
    with slk.use_kernel(kernel):
        check(inputs, run(wide, "triton"))


@triton.jit
def _mask_kernel(out_ptr, seed, row0, n_cols, threshold, BLOCK_C: tl.constexpr):
    rows = row0 + tl.arange(0, 4).to(tl.int64)
    keep = keep_mask(seed, rows, 0, n_cols, threshold, BLOCK_C)
    tl.store(out_ptr + tl.arange(0, 4)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :], keep.to(tl.int32))


@pytest.mark.parametrize("row0", [0, 2**31 - 2, 2**40])
def test_mask_beyond_2_to_the_32_groups(row0):
    seed, columns, p = 2**61 + 12345, 32, 0.4
    out = torch.full((4, columns), -1, dtype=torch.int32)
    _mask_kernel[(1,)](out, seed, row0, columns, round(p * 2**31), BLOCK_C=columns)
    counters = torch.arange(row0 * 8, (row0 + 4) * 8, dtype=torch.int64)
    words = philox_ref(seed, counters).reshape(4, columns)
    assert torch.equal(out.bool(), (words >> 1) >= round(p * 2**31))
    assert 0 < out.sum() < out.numel()


def test_tiles_fit_into_shared_memory_by_their_own_arithmetic():
    """``fit`` takes stages away until the buffers fit, and never the last two."""
    tile = Tile(128, 256, 64, 8, 4)
    for device in DEVICES.values():
        spare = 0 if device.tma else 1
        for stage in (10_000, 50_000, 200_000):
            stages = tiles.fit(tile, device, stage).num_stages
            assert 2 <= stages <= 4
            assert stages == 2 or (stages - spare) * stage <= device.shared_limit
            assert stages == 4 or (stages + 1 - spare) * stage > device.shared_limit


def test_no_rows_launch_nothing_but_the_gradients_zeros(arch):
    inputs = make_inputs((0, 40), 24, 8, dtype=BF16)
    with count_launches() as made:
        out = run(inputs, "triton")
    assert made == {"_lora_weight_grads_kernel": 1}
    assert not out["dA"].any() and not out["dB"].any()


def test_vendor_branch_in_one_launch_and_two_with_repeated_masks():
    call = Call("forward", 64 * 132, 256, 256, 16, BF16, BF16, True)
    for m, expected in (
        (call.m, ["_lora_expand_kernel"]),
        (64, ["_lora_shrink_kernel", "_lora_expand_kernel"]),
    ):
        x, w, a, b = (
            torch.empty(size, dtype=BF16, device="meta") for size in ((m, 256), (256, 256), (16, 256), (256, 16))
        )
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        found = forward_launches(
            DEVICES["sm_90"], x, w, None, a, b, None, x.new_empty(m, 256), seed, 1.0, 0.1, Choice("vendor", "")
        )
        assert isinstance(found[0], lora_common.VendorProduct)
        assert [launch.kernel.__name__ for launch in found[1:]] == expected


def test_s_is_stored_where_y_has_one_column_of_tiles(monkeypatch):
    monkeypatch.setattr(problem, "device_of", lambda device: DEVICES["sm_90"])
    inputs = make_inputs((70, 64), 48, 16, dtype=BF16, lora_dtype=FP32)
    with slk.use_kernel("fused"):
        check(inputs, run(inputs, "triton"))
