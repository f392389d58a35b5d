"""The formulas of bytes against the interpreter's count, the counter against a kernel counted by
hand, floors and targets.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("pandas", reason="runs where pandas is installed: pip install .[bench]")
pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

import pandas as pd
import triton
import triton.language as tl

from benchmarks.lab.mlp_launches import mlp_launches
from benchmarks.lab.predict import bytes_moved, formula
from benchmarks.lab.predict.bytes_moved import APART, ONE_OP, SEPARATE, TOGETHER
from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.testing import fp8_weight, nf4_weight
from stablelora_kernels.testing.cases import BF16, FP16, FP32, Case, make, run
from tests.benchmarks.lab.byte_counter import counted
from tests.helpers.case_checks import table

pytestmark = [
    pytest.mark.skipif(
        not backend.INTERPRETING,
        reason="bytes are counted in the interpreter: runs on machines without a GPU",
    ),
    pytest.mark.usefixtures("one_thread"),
]
H100 = DEVICES["sm_90"]


def check_bytes(case: Case, given: dict[str, Any] | None = None) -> list[Any]:
    """The launches of a call, of which the interpreter counts the formula's bytes, tensor by
    tensor.
    """
    with counted() as found:
        run(case, given)
    for seen in found:
        assert seen.tensors == formula.formula_by_tensor(seen.launch), (
            seen.kernel,
            seen.launch.variant,
        )
    return [seen.launch for seen in found]


# Several tiles in both directions at small sizes.
SMALL = Tile(32, 32, 32, 4, 2)
# Rows, columns of X and of each Y, rank, dtypes, and the tile if it is not the table's.
FORMS = {
    "ragged": (70, 39, (53, 20, 20), 20, (BF16, FP32), SMALL),
    "aligned": (70, 72, (48, 40, 40), 32, (FP16, FP16), SMALL),
    "rank 1": (33, 56, (40, 24, 24), 1, (FP32, FP32), SMALL),
    "three blocks of ranks": (70, 40, (56, 24, 24), 75, (BF16, FP32), SMALL),
    "shared sums over K": (17, 1100, (100, 24, 24), 40, (BF16, FP32), None),
    "shared sums over rows": (550, 40, (24, 16, 16), 80, (BF16, BF16), None),
    "the highest rank": (70, 40, (24, 16, 16), 130, (BF16, FP32), None),
}


def build(op: str, form: str, arch: str, kernel: str, p: float) -> Case | None:
    m, k, n, r, (dtype, lora_dtype), tile = FORMS[form]
    if (kernel == "fused" and (r > 64 or p or op == "branch")) or (kernel == "chained" and r > 128):
        return None
    count = {"group": 3, "mlp": 3}.get(op, 1)
    sizes = (n[0], n[0], n[1]) if op == "mlp" else n[:count]
    backward_kernel = "split" if kernel == "fused" else None
    return Case(
        op, (m, k), sizes, (r,) * count, dtype, lora_dtype, p=p, kernel=kernel, backward_kernel=backward_kernel,
        arch=arch, tile=tile,
    )  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize(
    "case",
    table(
        build, drawn=40, op=["linear", "branch", "group", "mlp"], form=[*FORMS], arch=["sm_80", "sm_90"],
        kernel=["auto", "fused", "chained", "split", "vendor"], p=[0.0, 0.3],
    ),
)  # fmt: skip
def test_the_formula_counts_right(case: Case) -> None:
    check_bytes(case)


@pytest.mark.parametrize(
    "wanted", [("x",), ("lora_A0",), ("lora_B0",), ("lora_A0", "lora_B0")], ids="-".join
)
def test_few_of_the_gradients_of_a_broadcast_x(wanted: tuple[str, ...]) -> None:
    check_bytes(
        Case(shape=(70, 24), dtype=BF16, layouts={"x": "expanded"}, wanted=wanted, arch="sm_90")
    )


@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("m", "n", "k", "blocksize", "nested", "dtype", "first"),
    [
        (9, 264, 512, 64, True, BF16, "down"),
        # Two programs' blocks to a scale, a tile of two scales, and edges in both directions.
        (70, 1032, 512, 256, True, BF16, "down"),
        (70, 136, 96, 32, True, FP16, "down"),
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
    case = Case("linear", (m, k), (n,), (8,), dtype, p=p, arch="sm_90")
    launch, *_ = check_bytes(case, make(case) | {"weight0": weight})
    assert launch.kernel.__name__.startswith(f"_lora_{first}" if first == "down" else f"_{first}")


def test_launches_of_an_mlp_are_planned_as_they_are_made() -> None:
    case = Case("mlp", (70, 40), (136, 136, 72), (8, 8, 8), BF16, p=0.3, arch="sm_90")
    planned = mlp_launches(H100, 70, (72, 136, 40), 8, (BF16, FP32), 0.3)
    assert [launch.variant for way in planned for launch in way] == [
        launch.variant for launch in check_bytes(case)
    ]


# Floors and targets.


def test_floors_by_hand():
    """Forward and backward, in bfloat16 with a bias: X of 10 elements, W of 15, Y of 6; A and B of
    8 in float32.
    """
    frozen = 2 * (10 + 15 + 3 + 6) + 2 * (6 + 15 + 10)
    layer = bytes_moved.Case
    assert layer(2, 3, 5, 1).floors() == (frozen + 4 * 8 + (2 * 10 + 4 * 8 + 4 * 8), frozen)
    assert (
        layer(2, 3, 5, 1, 0.1, lora_dtype=BF16).floors()[0]
        == frozen + 2 * 8 + (2 * 10 + 2 * 8 + 2 * 8) + 2 * 8
    )
    # Half a byte an element, a byte of scale for 64, and 4 bytes for 256 of those; a byte an
    # element, 4 bytes of scale a row.
    plain = layer(2, 64, 64, 1).floors()[1] - 2 * 2 * 64 * 64
    assert layer(2, 64, 64, 1, how="nf4").floors()[1] == plain + 2 * (64 * 32 + 64 + 4)
    assert layer(2, 64, 64, 1, how="fp8").floors()[1] == plain + 2 * (64 * 64 + 4 * 64)


def row_of(*sizes):
    case = bytes_moved.Case(*sizes)
    return bytes_moved.whole(case, bytes_moved.launch_table(H100, case))


def test_what_is_saved_stays_saved():
    """The passes of a layer, the reads that projections of one X share, and those of a gated MLP's
    G, U, H and dH.
    """
    for kernel, launches, passes in (("chained", 2, 1), ("split", 4, 3), ("vendor", 5, 7)):
        row = row_of(8192, 4096, 4096, 16, 0.1, kernel)
        assert row["launches"] == launches and row["extra X, Y passes"] == pytest.approx(
            passes, abs=1e-3
        )
        # The mask's bits are written once and read twice.
        assert (
            row["extra passes"] < passes + 0.27 + 3 / 16
            and 1 < row["unique / floor"] < row["issued / floor"]
        )
    apart, together = (
        row_of(8192, (4096, 1024, 1024), 4096, 16, 0.0, how) for how in (APART, TOGETHER)
    )
    # The branches come first, and the vendor's products add to them.
    assert (apart["launches"], together["launches"]) == (15, 15) and together[
        "unique"
    ] < 0.78 * apart["unique"]
    three, one = (row_of(2048, 14336, 4096, 16, 0.0, how) for how in (SEPARATE, ONE_OP))
    assert (three["launches"], one["launches"]) == (17, 12) and one["unique"] < 0.72 * three[
        "unique"
    ]


@pytest.mark.parametrize(
    ("width", "dtype", "b"), [(256, FP32, 1e-3), (2048, BF16, 8.0), (2777, FP16, 1e-3)]
)
def test_the_optimizer_is_close_to_its_floor(width, dtype, b):
    """The second step, as the first also measures the sums; shrinking, or latched as B is large.
    Sizes may fit no chunk.
    """
    values = {
        "0.lora_A": torch.ones(4, width),
        "0.lora_B": torch.full((width, 4), b),
        "other": torch.ones(5000),
    }
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
    assert (
        len(found) == 1
        and floor <= found[0].traffic.unique <= found[0].traffic.issued <= 1.007 * floor
    )


def test_the_command_writes_all_rows(tmp_path, monkeypatch, capsys):
    real = [bytes_moved.REAL[0], bytes_moved.Case(64, (48, 16), 32, 4, 0.1, APART)]
    monkeypatch.setattr(bytes_moved, "REAL", real)
    bytes_moved.main(["--out", str(tmp_path), "--device", "sm_80"])
    assert "as on sm_80" in capsys.readouterr().out
    rows, launches = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("bytes", "launches"))
    issued = (launches.read_issued + launches.written_issued).groupby(launches.m)
    assert [*rows.launches] == [*issued.size()] and [*rows.issued] == [*issued.sum()]


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
def _broken_kernel(x_ptr, N):
    tl.load(x_ptr)
    tl.load(N)


def test_a_kernel_counted_by_hand_also_after_an_error():
    """Two programs over 0-7 and 4-10 (11 is masked off): 15 elements of which 11 are distinct."""
    x, y, hidden = torch.zeros(11), torch.zeros(11, dtype=BF16), torch.zeros(8, dtype=FP16)
    arguments = (x, y, torch.tensor([hidden.data_ptr()]), torch.zeros(1, dtype=torch.int32), 11)
    tiny = Launch(_tiny_kernel, "", "", (2,), arguments, {"BLOCK": 8}, {})
    with counted() as found:
        with pytest.raises(Exception, match="ptr"):
            Launch(_broken_kernel, "", "", (2,), (x, 11), {}, {}).run(x.device)
        assert found == []
        tiny.run(x.device)
    # Nothing is counted behind the block.
    tiny.run(x.device)
    (launch,) = found
    assert launch.kernel == "_tiny_kernel" and launch.tensors == {
        "x": (15 * 4, 0, 11 * 4, 0),
        "table": (2 * 8, 0, 8, 0),
        "elsewhere": (2 * 16, 0, 16, 0),
        "counter": (8, 8, 4, 4),
        "y": (0, 15 * 2, 0, 11 * 2),
    }
    assert (launch.traffic.issued, launch.traffic.unique) == (154, 98)
