"""The formulas of bytes against the counter, floors and targets, and the command."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pandas", reason="tables need the bench extra")
pytest.importorskip("triton", reason="Triton is not installed on this platform")

import pandas as pd

from benchmarks.lab.predict import bytes_moved, formula
from benchmarks.lab.predict.bytes_moved import BF16, FP16, FP32, Case, Group, Set
from benchmarks.lab.predict.counter import counted
from benchmarks.lab.predict.layer_time import one_op
from benchmarks.lab.predict.rivals import MLP
from stablelora_kernels.dispatch import backend, problem, tiles
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.dispatch.settings import use_kernel
from stablelora_kernels.dispatch.tiles import Tile, TileRule
from stablelora_kernels.launch.dry_run import group_launches, mlp_launches

pytestmark = [
    pytest.mark.skipif(not backend.INTERPRETING, reason="bytes are counted in the interpreter only"),
    pytest.mark.usefixtures("one_thread"),
]
CPU = torch.device("cpu")


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Many tiles in both directions, ragged edges, and several blocks of ranks at small sizes."""
    for name in ("TMA_TILES", "LINEAR_TILES", "SHRINK_TILES", "EXPAND_TILES", "WEIGHT_GRADS_TILES"):
        monkeypatch.setattr(tiles, name, (TileRule(lambda d, c: True, Tile(16, 32, 16, 4, 2), "a test"),))
    monkeypatch.setattr(problem, "MAX_FUSED_R", 32)
    monkeypatch.setattr(problem, "SMALL_M", 16)


def compare(*ways):
    """What launches move, counted, which must be what the formula says, tensor by tensor."""
    made = [launch for way in ways for launch in way]
    with counted() as found:
        for launch in made:
            launch.run(CPU)
    for launch, seen in zip(made, found, strict=True):
        assert seen.tensors == formula.formula_by_tensor(launch), (seen.kernel, launch.variant)
        assert seen.traffic == formula.formula(launch), seen.kernel
    return found


def compare_case(arch: str, case: Case) -> list[str]:
    """The names of a case's kernels, compared."""
    found = compare(*bytes_moved.launches(DEVICES[arch], case, "cpu"))
    return [seen.kernel.removeprefix("_").removesuffix("_kernel") for seen in found]


@pytest.mark.covering
@pytest.mark.parametrize(("kernel", "p"), [("fused", 0.0), ("split", 0.3), ("vendor", 0.0), ("vendor", 0.3)])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("m", "n", "k", "r", "dtypes"),
    [(35, 53, 39, 20, (BF16, FP32)), (34, 48, 72, 32, (FP16, FP16)), (33, 40, 56, 1, (FP32, FP32))],
)
def test_the_formula_counts_right_at_tiny_tiles(m, n, k, r, dtypes, kernel, p, arch, tiny_tiles):
    compare_case(arch, Case(m, n, k, r, p, *dtypes, forced=kernel))


@pytest.mark.parametrize("kernel", ["split", "vendor"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_formula_counts_loops_over_ranks(kernel, arch, tiny_tiles):
    """Three blocks of 32 ranks, the last one partly there."""
    names = compare_case(arch, Case(35, 56, 40, 75, 0.3, forced=kernel))
    expected = {"split": "lora_linear_tma" if arch == "sm_90" else "lora_linear", "vendor": "lora_expand"}
    assert names.count(expected[kernel]) == 2 and names.count("lora_shrink") == 2


# For the interpreter: descriptors and pointers, split-K sums, ranks that fill no block, the vendor's products.
GROUPS = (
    Group(70, (136, 72, 72), 200, 16),
    Group(70, (136, 72), 200, 3, 0.1),
    Group(200, (72, 40, 40), 264, 20, 0.1),
    Group(72, (40, 40), 1032, 8),
    Group(9, (72, 40, 40), 136, 16),
    Group(40, (72, 40), 136, 16, 0.1),
    Group(72, (40, 24, 24), 72, 80),
    Group(72, (40, 24, 24), 136, 16, 0.1, FP32),
)


@pytest.mark.covering(1)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{group.m} r{group.r} p{group.p}")
def test_the_formula_counts_projections_that_share_x(group, arch):
    m, ns, k, r, p, dtype = group
    compare(*group_launches(DEVICES[arch], m, ns, k, r, dtype, FP32, p, "cpu"))


def test_sharing_x_saves_its_reads_and_the_sums_of_its_gradients():
    """Three projections: two reads of X for S, two for dA; of dX five passes are left of nine. Rows in bfloat16.

    The vendor's product for k and v, and the branch onto it, are two launches, with S's of its own or without.
    """
    apart, together = bytes_moved.group_rows(DEVICES["sm_90"], Group(8192, (4096, 1024, 1024), 4096, 16))
    assert (apart["launches"], together["launches"]) == (14, 13)
    assert apart["X, Y passes"] - together["X, Y passes"] == 8
    assert together["unique"] < 0.7 * apart["unique"]


# Descriptors and pointers; ranks that fill no block and several blocks; the vendor's products; few rows.
MLPS = [
    (136, 72, 264, 136, 16, 0.0, BF16, "split"),
    (136, 72, 264, 136, 20, 0.3, BF16, "split"),
    (70, 67, 75, 71, 3, 0.3, BF16, "split"),
    (70, 72, 136, 40, 80, 0.0, BF16, "split"),
    (9, 72, 136, 40, 8, 0.3, BF16, "auto"),
    (70, 72, 136, 40, 8, 0.0, BF16, "chained"),
    (70, 72, 136, 40, 8, 0.3, FP32, "auto"),
    (70, 72, 136, 40, 80, 0.3, BF16, "vendor"),
]
LLAMA = MLP(2048, 4096, 14336, 16)


@pytest.mark.covering(1)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("m", "n", "f", "k", "r", "p", "dtype", "kernel"), MLPS, ids=str)
def test_the_formula_counts_an_mlp(m, n, f, k, r, p, dtype, kernel, arch):
    with use_kernel(kernel):
        ways = mlp_launches(DEVICES[arch], m, n, f, k, r, dtype, FP32, p, "silu", "cpu")
    compare(*ways)


def test_one_op_moves_less():
    """G, U and H are written by one kernel, dG and dU by another: neither H nor dH is read or written for the activation."""
    rows = {(row["arm"], row["pass"]): row for row in bytes_moved.mlp_rows(DEVICES["sm_90"], LLAMA)}
    for way, launches, passes, unique in (("forward", (4, 3), 2, 0.9), ("backward", (5, 4), 3, 0.8)):
        apart, one = rows["three layers", way], rows["one op", way]
        assert (apart["launches"], one["launches"]) == launches
        assert apart["[M, F] passes"] - one["[M, F] passes"] == passes
        assert one["unique"] < unique * apart["unique"]
    assert rows["three layers", "forward"]["[M, F] passes"] == 6
    # dA's programs read G and U for themselves, where H was read once.
    assert apart["[M, F] passes"] - one["reader passes"] == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_no_launch_of_an_mlp_is_elementwise(arch):
    names = [launch.kernel.__name__ for way in one_op(DEVICES[arch], LLAMA) for launch in way]
    assert "_gated_activation_kernel" not in names


@pytest.mark.covering(1)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(5, 330, 1300, 3), "split_k split_k"),
        (Case(17, 100, 1100, 40, 0.3), "split_k split_k"),
        (Case(17, 100, 1100, 80), "split_k split_k"),
        (Case(70, 264, 136, 16), "linear linear"),
        (Case(70, 136, 264, 16, 0.1, lora_dtype=BF16), "linear linear"),
        (Case(136, 200, 136, 64), "linear linear"),
        (Case(70, 137, 75, 128, 0.1), "linear linear"),
        (Case(40, 100, 136, 16, dtype=FP32), "vendor expand vendor expand weight_grads"),
        (Case(550, 24, 40, 80, 0.1), "linear linear"),
        (Case(550, 24, 40, 80, 0.1, forced="split"), "shrink linear shrink linear"),
        (Case(70, 136, 264, 16, 0.1, forced="split"), "shrink linear shrink linear"),
        (Case(550, 24, 40, 80, 0.1, forced="vendor"), "vendor shrink expand vendor shrink expand weight_grads"),
    ],
)
def test_the_formula_counts_right_at_the_tables_tiles(case, expected, arch):
    names = [
        name.removeprefix("lora_").removeprefix("linear_").removesuffix("_tma") for name in compare_case(arch, case)
    ]
    assert " ".join("linear" if name == "tma" else name for name in names) == expected


def test_the_cases_above_share_sums():
    """Else the formula for shared sums would not have been tried."""
    for case, kernels in (
        (Case(5, 330, 1300, 3), "split_k"),
        (Case(17, 100, 1100, 40, 0.3), "split_k shrink"),
        (Case(550, 24, 40, 80), "dB dA"),
        (Case(550, 24, 40, 80, forced="vendor"), "weight_grads"),
    ):
        shared = set()
        for launch in (launch for made in bytes_moved.launches(DEVICES["sm_90"], case) for launch in made):
            if not hasattr(launch, "kernel"):
                continue
            arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
            name = launch.kernel.__name__.removeprefix("_lora_").removeprefix("linear_").removesuffix("_kernel")
            if arguments.get("SPLITS", 1) > 1:
                shared.add(name)
            if arguments.get("GRAD_SPLITS", 1) > 1:
                shared.add("dB" if name == "shrink" else "dA")
            if launch.constants.get("CHAINED"):
                shared |= {name for name, key in (("shrink", "S_SPLITS"), ("dB", "DB_SPLITS")) if arguments[key] > 1}
        assert set(kernels.split()) <= shared


def test_few_of_the_gradients_and_no_rows():
    from stablelora_kernels.launch.lora_linear import backward_launches

    x, dy, w = torch.zeros(40, 24, dtype=BF16), torch.zeros(40, 20, dtype=BF16), torch.zeros(20, 24, dtype=BF16)
    a, b, s = torch.zeros(8, 24), torch.zeros(20, 8), torch.zeros(40, 8, dtype=BF16)
    for rows in (40, 0):
        for need_a, need_b in ((True, False), (False, True), (True, True)):
            made = backward_launches(
                DEVICES["sm_90"], x[:rows] if need_a else None, dy[:rows], w, a, b, s[:rows] if need_b else None, None, None,
                a.clone() if need_a else None, b.clone() if need_b else None, scaling=1.0, dropout_p=0.0,
            )  # fmt: skip
            results = [
                moved.written_issued
                for seen in compare(made)
                for name, moved in seen.tensors.items()
                if {"da", "db", "grad"} & set(name.split("="))
            ]
            assert sum(results) == 4 * (8 * 24 * need_a + 20 * 8 * need_b)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("m", "r"), [(20, 8), (70, 80), (70, 130)])
def test_the_branch_alone(m, r, p):
    """Its base is read where it is, and its dX reads none."""
    from stablelora_kernels.launch import lora_branch

    x, y, base, dx = (torch.zeros(m, columns, dtype=BF16) for columns in (40, 56, 56, 40))
    a, b, s, seed = torch.zeros(r, 40), torch.zeros(56, r), torch.zeros(m, r, dtype=BF16), torch.tensor([3])
    seed = seed if p else None
    da, db, dy = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(y)
    forward = lora_branch.forward_launches(DEVICES["sm_90"], base, x, a, b, s, y, seed, 1.0, p)
    backward = lora_branch.backward_launches(DEVICES["sm_90"], x, dy, a, b, s, seed, dx, da, db, 1.0, p)
    by_name = compare(forward, backward)[len(forward) - 1].tensors
    assert by_name["base"] == (m * 56 * 2, 0, m * 56 * 2, 0) and by_name["y"] == (0, m * 56 * 2, 0, m * 56 * 2)


@pytest.mark.covering
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("m", "n", "k", "blocksize", "nested", "dtype"),
    [
        (9, 72, 256, 64, True, BF16),
        (9, 72, 256, 64, False, BF16),
        (70, 200, 320, 64, True, BF16),
        # Two programs' blocks to a scale, a tile of two scales, and edges in both directions.
        (70, 136, 512, 256, True, BF16),
        (70, 136, 96, 32, True, FP16),
        (200, 136, 192, 64, True, BF16),
        (9, 72, 256, 64, True, FP32),
        # Dequantized first, and so for want of alignment.
        (300, 72, 256, 64, True, BF16),
        (9, 31, 75, 64, True, BF16),
        (9, 31, 75, 64, False, BF16),
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_quantized_weights(kind, m, n, k, blocksize, nested, dtype, p):
    from stablelora_kernels.launch import lora_linear_quantized as launch
    from stablelora_kernels.testing import fp8_weight, nf4_weight

    weight = nf4_weight(n, k, blocksize, nested) if kind == "nf4" else fp8_weight(n, k)
    if kind == "nf4":
        # Every value of both codes: all bytes, over and over.
        for part in (weight.packed, weight.absmax):
            if part.dtype == torch.uint8:
                part.copy_((torch.arange(part.numel()) % 256).to(torch.uint8))
    x, y, dx, dy = (torch.zeros(m, columns, dtype=dtype) for columns in (k, n, k, n))
    a, b, s, bias = torch.zeros(8, k), torch.zeros(n, 8), torch.zeros(m, 8, dtype=dtype), torch.zeros(n, dtype=dtype)
    da, db, seed = torch.zeros_like(a), torch.zeros_like(b), torch.tensor([3]) if p else None
    device = DEVICES["sm_90"]
    launches = [
        *launch.forward_launches(device, x, weight.stored, bias, a, b, s, y, seed, 1.0, p),
        *launch.backward_launches(device, x, dy, weight.stored, a, b, s, seed, dx, da, db, 1.0, p),
    ]
    with counted() as found:
        for launch in launches:
            launch.run(CPU)
    for launch, seen in zip(launches, found, strict=True):
        expected = formula.formula_by_tensor(launch)
        if weight.shape[0] * weight.shape[1] < 256 * blocksize:
            # Too few scales for all values of their code.
            for tensors in (seen.tensors, expected):
                if "nested_code" in tensors:
                    tensors["nested_code"] = tensors["nested_code"]._replace(read_unique=0)
        assert seen.tensors == expected, (seen.kernel, launch.variant)
    kernels = [seen.kernel for seen in found]
    first = "_dequantize_kernel" if m > 256 or k == 75 or (dtype == FP32 and m > 16) else "_lora_shrink_kernel"
    assert kernels[0] == first


def test_a_broadcast_operand_is_unique_once():
    from stablelora_kernels.launch.lora_linear import forward_launches

    x, w, y = (
        torch.zeros(1, 64, dtype=BF16).expand(70, 64),
        torch.zeros(48, 64, dtype=BF16),
        torch.zeros(70, 48, dtype=BF16),
    )
    a, b = torch.zeros(8, 64), torch.zeros(48, 8)
    choice = Choice("fused", "")
    (launch,) = forward_launches(DEVICES["sm_90"], x, w, None, a, b, None, y, None, 1.0, 0.0, choice)
    (seen,) = compare([launch])
    assert seen.tensors["x"] == (70 * 64 * 2, 0, 64 * 2, 0)


def test_meta_and_real_tensors_give_one_formula():
    for case in bytes_moved.SMALL:
        real, meta = (bytes_moved.launches(DEVICES["sm_90"], case, where) for where in ("cpu", "meta"))
        for one, other in zip((*real[0], *real[1]), (*meta[0], *meta[1]), strict=True):
            assert formula.formula_by_tensor(one) == formula.formula_by_tensor(other)


# Floors and targets.


def test_floors_by_hand():
    """Forward and backward, in bfloat16 with a bias: X of 10 elements, W of 15, Y of 6; A and B of 8 in float32."""
    frozen = 2 * (10 + 15 + 3 + 6) + 2 * (6 + 15 + 10)
    assert Case(2, 3, 5, 1).floors() == (frozen + 4 * 8 + (2 * 10 + 4 * 8 + 4 * 8), frozen)
    assert Case(2, 3, 5, 1, 0.1, lora_dtype=BF16).floors() == (
        frozen + 2 * 8 + (2 * 10 + 2 * 8 + 2 * 8) + 2 * 8,
        frozen,
    )
    # Half a byte an element, a byte of scale for 64, and 4 bytes for 256 of those; a byte an element, 4 bytes of scale a row.
    plain = Case(2, 64, 64, 1).floors()[1] - 2 * 2 * 64 * 64
    assert Case(2, 64, 64, 1, quantized="nf4").floors()[1] == plain + 2 * (64 * 32 + 64 + 4)
    assert Case(2, 64, 64, 1, quantized="fp8").floors()[1] == plain + 2 * (64 * 64 + 4 * 64)


@pytest.mark.covering
@pytest.mark.parametrize("case", [Case(200, 136, 136, 16, 0.1), Case(70, 137, 75, 8)])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", ["chained", "split"])
def test_no_launch_touches_less_than_the_floor(kernel, case, arch):
    *launches, row = bytes_moved.case_rows(DEVICES[arch], case._replace(forced=kernel), counting=True)
    assert row["launches"] == len(launches) == (4 if kernel == "split" else 2)
    assert {launch["formula"] for launch in launches} == {"equal"}
    assert row["read_unique"] + row["written_unique"] > row["floor"] > row["floor_frozen"]
    assert 1 < row["unique / floor"] < row["issued / floor"]
    # Forward's S, dS with dB, and dA. In a chained launch the first two read what the product reads as well.
    expected = 2 + case.n / case.k if kernel == "split" else 1
    assert row["extra X, Y passes"] == pytest.approx(expected, abs=1e-4)
    assert row["extra passes"] > row["extra X, Y passes"]


def test_activation_passes_at_the_target_do_not_grow():
    """The figure for all tensors, with S and the shared sums, is a little above; the benchmark prints both."""
    row = bytes_moved.case_rows(DEVICES["sm_90"], bytes_moved.TARGET)[-1]
    assert row["extra X, Y passes"] <= bytes_moved.PASSES_TARGET
    assert row["extra passes"] < bytes_moved.PASSES_TARGET + 0.27
    assert row["launches"] == 4


@pytest.mark.parametrize(
    "tensors",
    [
        Set(4, 16, 2048),
        Set(2, 16, 2048, latched=True),
        Set(2, 16, 2048, BF16),
        # Sizes that fit no chunk.
        Set(1, 3, 2777, FP16, others=(1, 5000)),
    ],
)
def test_the_optimizer_is_close_to_its_floor(tensors):
    row = bytes_moved.optimizer_row(tensors)
    assert row["launches"] == 1
    assert 1 < row["unique / floor"] <= row["issued / floor"] <= bytes_moved.OPTIMIZER_TARGET
    elements = 2 * tensors.pairs * tensors.r * tensors.width + sum(tensors.others)
    touched = dict(part.split(":") for part in row["unique_by_tensor"].split())
    size = tensors.dtype.itemsize
    for name, one_byte in (("p", 2 * size), ("g", size), ("m", 8), ("v", 8)):
        assert int(touched[name]) == one_byte * elements
    assert "elsewhere" not in touched


def test_the_command_writes_all_rows(tmp_path, monkeypatch, capsys):
    """With one case of each table, as the whole takes a minute."""
    for name, place in {
        "SMALL": slice(7, 8),
        "REAL": slice(1),
        "SETS": slice(1),
        "GROUPS": slice(1),
        "MLPS": slice(1),
    }.items():
        monkeypatch.setattr(bytes_moved, name, getattr(bytes_moved, name)[place])
    bytes_moved.main(["--out", str(tmp_path), "--device", "sm_80"])
    printed = capsys.readouterr().out
    assert "DIFFERENT" not in printed and "equal" in printed
    assert "target at most 1.02: met" in printed and "target at most 3" in printed
    counted, layers, groups, mlps, optimizer = (
        pd.read_csv(tmp_path / f"{name}.csv") for name in ("counted", "layers", "groups", "mlps", "optimizer")
    )
    for rows in (counted, layers):
        *launches, whole = rows.itertuples()
        assert whole.kernel == "all" and whole.launches == len(launches)
        assert whole.read_issued == sum(launch.read_issued for launch in launches)
    assert [*groups.arm] == ["apart", "together"] and len(mlps) == 4 and len(optimizer) == 1
