"""The formulas of bytes against the interpreter's count, the counter against kernels counted by hand, floors and targets."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pandas", reason="tables need the bench extra")
pytest.importorskip("triton", reason="Triton is not installed on this platform")

import pandas as pd
import triton
import triton.language as tl

from benchmarks.lab.predict import bytes_moved, formula
from benchmarks.lab.predict.bytes_moved import APART, BF16, ONE_OP, SEPARATE, TOGETHER, Case
from stablelora_kernels.dispatch import backend, problem, tiles
from stablelora_kernels.dispatch.problem import DEVICES, Rule
from stablelora_kernels.dispatch.settings import use_backend, use_kernel
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.launch.lora_linear import backward_launches, forward_launches
from stablelora_kernels.ops.dry_run import mlp_launches
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.projection import Projection
from stablelora_kernels.testing import fp8_weight, nf4_weight
from tests.benchmarks.lab.byte_counter import counted

pytestmark = [
    pytest.mark.skipif(not backend.INTERPRETING, reason="bytes are counted in the interpreter only"),
    pytest.mark.usefixtures("one_thread"),
]
FP16, FP32 = torch.float16, torch.float32
H100 = DEVICES["sm_90"]
both_forms = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])


def compare(*ways):
    """The kernels of launches, and the sums that programs share, whose bytes must be the formula's, tensor by tensor."""
    made = [launch for way in ways for launch in way]
    with counted() as found:
        for launch in made:
            launch.run(torch.device("cpu"))
    for launch, seen in zip(made, found, strict=True):
        assert seen.tensors == formula.formula_by_tensor(launch), (seen.kernel, launch.variant)
        assert seen.traffic == formula.formula(launch)
    shared = sorted({name for seen in found for name in seen.tensors if name.endswith("parts")})
    return " ".join([seen.kernel.removeprefix("_lora_").removesuffix("_kernel") for seen in found] + shared)


def compare_one(x, projection, y, s, seed, dx, p, base=None):
    """Those of forward and backward of one projection; the rest of ``compare``."""
    grad, of_a, of_b = torch.zeros_like(y), torch.zeros_like(projection.lora_A), torch.zeros_like(projection.lora_B)
    forward = forward_launches(H100, x, [projection], [seed], s, [y], p, base)
    return compare(forward, backward_launches(H100, x, [grad], [projection], [s], [seed], p, (dx, [of_a], [of_b])))


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Many tiles in both directions, ragged edges, and several blocks of ranks at small sizes."""
    for name in ("TMA_TILES", "LINEAR_TILES", "SHRINK_TILES", "WEIGHT_GRADS_TILES"):
        monkeypatch.setattr(tiles, name, (Rule(lambda d, c: True, Tile(16, 32, 16, 4, 2), "a test"),))
    monkeypatch.setattr(problem, "MAX_FUSED_R", 32)
    monkeypatch.setattr(problem, "SMALL_M", 16)


@pytest.mark.covering
@pytest.mark.parametrize(("kernel", "p"), [("fused", 0.0), ("split", 0.3), ("vendor", 0.0), ("vendor", 0.3)])
@both_forms
@pytest.mark.parametrize(
    ("m", "n", "k", "r", "dtypes"),
    [(35, 53, 39, 20, (BF16, FP32)), (34, 48, 72, 32, (FP16, FP16)), (33, 40, 56, 1, (FP32, FP32)),
     # Three blocks of ranks, the last one partly there.
     (35, 56, 40, 75, (BF16, FP32))],
)  # fmt: skip
def test_the_formula_counts_right_at_tiny_tiles(m, n, k, r, dtypes, kernel, p, arch, tiny_tiles):
    kernel = "split" if kernel == "fused" and r > 32 else kernel
    compare(*bytes_moved.launches(DEVICES[arch], Case(m, n, k, r, p, kernel, *dtypes), "cpu"))


@pytest.mark.covering(1)
@both_forms
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(5, 330, 1300, 3), "linear_split_k linear_split_k parts"),
        (Case(17, 100, 1100, 40, 0.3), "linear_split_k linear_split_k parts s_job.shared.parts"),
        (Case(70, 136, 264, 16, 0.1, lora_dtype=BF16), "linear linear"),
        (Case(70, 137, 75, 128, 0.1), "linear linear"),
        (Case(40, 100, 136, 16, dtype=FP32), "vendor linear vendor linear"),
        (Case(550, 24, 40, 80, 0.1), "linear linear da.shared.parts db.shared.parts"),
        (Case(550, 24, 40, 80, 0.1, "split"), "shrink linear shrink linear da.shared.parts db.shared.parts"),
        (Case(550, 24, 40, 80, 0.1, "vendor"), "vendor linear vendor linear da.shared.parts db.shared.parts"),
        (Case(70, 24, 40, 130, 0.1, "vendor"), "vendor shrink linear vendor shrink linear"),
        # Projections of one X: descriptors and pointers, split-K sums, ranks that fill no block, the vendor's products.
        (Case(200, (72, 40, 40), 264, 20, 0.1, TOGETHER), None),
        (Case(72, (40, 40), 1032, 8, 0.0, TOGETHER), None),
        (Case(9, (72, 40, 40), 136, 16, 0.0, TOGETHER), None),
        (Case(72, (40, 24, 24), 72, 80, 0.0, TOGETHER), None),
        (Case(72, (40, 24, 24), 136, 16, 0.1, TOGETHER, FP32), None),
    ],
)
def test_the_formula_counts_right_at_the_tables_tiles(case, expected, arch):
    found = compare(*bytes_moved.launches(DEVICES[arch], case, "cpu")).replace("_tma", "")
    assert expected in (None, found)


@pytest.mark.covering(1)
@both_forms
@pytest.mark.parametrize(
    ("m", "n", "f", "k", "r", "p", "dtype", "kernel"),
    # Descriptors and pointers; ranks that fill no block and several blocks; the vendor's products; few rows.
    [
        (136, 72, 264, 136, 20, 0.3, BF16, "split"),
        (70, 67, 75, 71, 3, 0.3, BF16, "split"),
        (9, 72, 136, 40, 8, 0.3, BF16, "auto"),
        (70, 72, 136, 40, 8, 0.0, BF16, "chained"),
        (70, 72, 136, 40, 8, 0.3, FP32, "auto"),
        (70, 72, 136, 40, 80, 0.3, BF16, "vendor"),
    ],
)
def test_the_formula_counts_an_mlp(m, n, f, k, r, p, dtype, kernel, arch):
    with use_kernel(kernel):
        ways = mlp_launches(DEVICES[arch], m, (n, f, k), r, (dtype, FP32), p, where="cpu")
    compare(*ways)


def test_few_of_the_gradients_and_a_broadcast_x():
    x, dy = torch.zeros(1, 24, dtype=BF16).expand(40, 24), torch.zeros(40, 20, dtype=BF16)
    a, b, s = torch.zeros(8, 24), torch.zeros(20, 8), torch.zeros(40, 8, dtype=BF16)
    for da, db in ((a.clone(), None), (None, b.clone()), (a.clone(), b.clone())):
        given = None if da is None else x, [dy], [Projection(None, None, a, b, 1.0)], [None if db is None else s]
        compare(backward_launches(H100, *given, [None], 0.0, (None, [da], [db])))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("m", "r"), [(20, 8), (70, 80), (70, 130)])
def test_the_branch_alone(m, r, p):
    """Its base is read where it is, and its dX reads none."""
    x, y, base, dx = (torch.zeros(m, columns, dtype=BF16) for columns in (40, 56, 56, 40))
    projection = Projection(None, None, torch.zeros(r, 40), torch.zeros(56, r), 1.0)
    s, seed = torch.zeros(m, r, dtype=BF16), torch.tensor([3]) if p else None
    *_, launch = forward_launches(H100, x, [projection], [seed], s, [y], p, base)
    assert formula.formula_by_tensor(launch)["base"] == (m * 56 * 2, 0, m * 56 * 2, 0)
    compare_one(x, projection, y, s, seed, dx, p, base)


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("m", "n", "k", "blocksize", "nested", "dtype", "first"),
    [
        (9, 264, 512, 64, True, BF16, "shrink"),
        # Two programs' blocks to a scale, a tile of two scales, and edges in both directions.
        (70, 1032, 512, 256, True, BF16, "shrink"),
        (70, 136, 96, 32, True, FP16, "shrink"),
        # Dequantized first, and so for want of alignment.
        (300, 264, 512, 64, True, BF16, "dequantize"),
        (9, 31, 75, 64, False, BF16, "dequantize"),
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_quantized_weights(kind, m, n, k, blocksize, nested, dtype, first, p):
    weight = nf4_weight(n, k, blocksize, nested) if kind == "nf4" else fp8_weight(n, k)
    for part in (weight.packed, weight.absmax) if kind == "nf4" else ():
        if part.dtype == torch.uint8:
            # Every value of both codes.
            part.copy_((torch.arange(part.numel()) % 256).to(torch.uint8))
    x, y, s, dx, bias = (torch.zeros(size, dtype=dtype) for size in ((m, k), (m, n), (m, 8), (m, k), n))
    projection = Projection(weight.stored, bias, torch.zeros(8, k), torch.zeros(n, 8), 1.0)
    found = compare_one(x, projection, y, s, torch.tensor([3]) if p else None, dx, p)
    assert found.removeprefix("_").startswith(first)


# Floors and targets.


def test_floors_by_hand():
    """Forward and backward, in bfloat16 with a bias: X of 10 elements, W of 15, Y of 6; A and B of 8 in float32."""
    frozen = 2 * (10 + 15 + 3 + 6) + 2 * (6 + 15 + 10)
    assert Case(2, 3, 5, 1).floors() == (frozen + 4 * 8 + (2 * 10 + 4 * 8 + 4 * 8), frozen)
    assert Case(2, 3, 5, 1, 0.1, lora_dtype=BF16).floors()[0] == frozen + 2 * 8 + (2 * 10 + 2 * 8 + 2 * 8) + 2 * 8
    # Half a byte an element, a byte of scale for 64, and 4 bytes for 256 of those; a byte an element, 4 bytes of scale a row.
    plain = Case(2, 64, 64, 1).floors()[1] - 2 * 2 * 64 * 64
    assert Case(2, 64, 64, 1, how="nf4").floors()[1] == plain + 2 * (64 * 32 + 64 + 4)
    assert Case(2, 64, 64, 1, how="fp8").floors()[1] == plain + 2 * (64 * 64 + 4 * 64)


def row_of(*case):
    return bytes_moved.whole(Case(*case), bytes_moved.launch_table(H100, Case(*case)))


def test_what_is_saved_stays_saved():
    """The passes of a layer, the reads that projections of one X share, and those of a gated MLP's G, U, H and dH."""
    for kernel, launches, passes in (("auto", 4, 3), ("chained", 2, 1)):
        row = row_of(8192, 4096, 4096, 16, 0.1, kernel)
        assert row["launches"] == launches and row["extra X, Y passes"] == pytest.approx(passes, abs=1e-3)
        assert row["extra passes"] < passes + 0.27 and 1 < row["unique / floor"] < row["issued / floor"]
    apart, together = (row_of(8192, (4096, 1024, 1024), 4096, 16, 0.0, how) for how in (APART, TOGETHER))
    assert (apart["launches"], together["launches"]) == (16, 13) and together["unique"] < 0.7 * apart["unique"]
    three, one = (row_of(2048, 14336, 4096, 16, 0.0, how) for how in (SEPARATE, ONE_OP))
    assert (three["launches"], one["launches"]) == (10, 8) and one["unique"] < 0.85 * three["unique"]


@pytest.mark.parametrize(("width", "dtype", "b"), [(256, FP32, 1e-3), (2048, BF16, 8.0), (2777, FP16, 1e-3)])
def test_the_optimizer_is_close_to_its_floor(width, dtype, b):
    """The second step, as the first also measures the sums; shrinking, or latched as B is large. Sizes may fit no chunk."""
    values = {"0.lora_A": torch.ones(4, width), "0.lora_B": torch.full((width, 4), b), "other": torch.ones(5000)}
    named = {name: p.to(dtype).requires_grad_() for name, p in values.items()}
    optimizer = StableLoRAAdamW([*named.items()])
    for p in named.values():
        p.grad = torch.full_like(p, 1e-3)
    with use_backend("triton"):
        optimizer.step()
        with counted() as found:
            optimizer.step()
    # p, g, m and v read; p, m and v written; the moments are float32.
    floor = sum(p.numel() for p in named.values()) * (3 * dtype.itemsize + 16)
    assert len(found) == 1 and floor <= found[0].traffic.unique <= found[0].traffic.issued <= 1.007 * floor


def test_the_command_writes_all_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bytes_moved, "REAL", [bytes_moved.REAL[0], Case(64, (48, 16), 32, 4, 0.1, APART)])
    bytes_moved.main(["--out", str(tmp_path), "--device", "sm_80"])
    assert "as on sm_80" in capsys.readouterr().out
    table, launches = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("bytes", "launches"))
    issued = launches.read_issued + launches.written_issued
    assert [*table.launches] == [*launches.groupby("m").size()] and [*table.issued] == [
        *issued.groupby(launches.m).sum()
    ]


# The counter.


@triton.jit
def _tiny_kernel(x_ptr, y_ptr, table_ptr, counter_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * 4 + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N, other=0.0)
    hidden = tl.load(table_ptr).to(tl.pointer_type(tl.float16))
    x += tl.load(hidden + tl.arange(0, BLOCK)).to(tl.float32)
    tl.atomic_add(counter_ptr, 1)
    tl.store(y_ptr + at, x.to(tl.bfloat16), mask=at < N)


@triton.jit
def _broken_kernel(x_ptr, y_ptr, table_ptr, counter_ptr, N, BLOCK: tl.constexpr):
    tl.load(x_ptr)
    tl.load(N)


def test_a_kernel_counted_by_hand_also_after_an_error():
    """Two programs over 0-7 and 4-10 (11 is masked off): 15 elements of which 11 are distinct."""
    x, y, hidden = torch.zeros(11), torch.zeros(11, dtype=BF16), torch.zeros(8, dtype=FP16)
    arguments = (x, y, torch.tensor([hidden.data_ptr()]), torch.zeros(1, dtype=torch.int32), 11)
    with counted() as found:
        with pytest.raises(Exception, match="ptr"):
            _broken_kernel[(2,)](*arguments, BLOCK=8)
        assert found == []
        _tiny_kernel[(2,)](*arguments, BLOCK=8)
        with counted() as inner:
            _tiny_kernel[(2,)](*arguments, BLOCK=8)
    _tiny_kernel[(2,)](*arguments, BLOCK=8)
    assert inner == found[1:] == found[:1]
    assert found[0].kernel == "_tiny_kernel" and found[0].tensors == {
        "x": (15 * 4, 0, 11 * 4, 0),
        "table": (2 * 8, 0, 8, 0),
        "elsewhere": (2 * 16, 0, 16, 0),
        "counter": (8, 8, 4, 4),
        "y": (0, 15 * 2, 0, 11 * 2),
    }
    assert (found[0].traffic.issued, found[0].traffic.unique) == (154, 98)
