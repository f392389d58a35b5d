"""The counted cases, their rows and tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch

from benchmarks.common.tables import RESULTS, aligned
from benchmarks.lab.traffic import floors, group, mlp
from benchmarks.lab.traffic import formula as t
from benchmarks.lab.traffic.counter import counted
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch.dry_run import call_launches, quantized_launches
from stablelora_kernels.quantized import FP8Weight, NF4Weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
RESULT = RESULTS / "traffic.csv"
OPTIMIZER_TARGET, PASSES_TARGET = 1.02, 3.0

Row = dict[str, Any]


class Case(NamedTuple):
    """A call of ``lora_linear`` with a bias, forward and backward; with a forced kernel for Y and dX, or a quantized W."""

    m: int
    n: int
    k: int
    r: int
    p: float = 0.0
    dtype: torch.dtype = BF16
    lora_dtype: torch.dtype = FP32
    kernel: str = ""
    # "nf4", in blocks of 64 with nested scales, or "fp8"; the kernels are then dispatch's.
    quantized: str = ""

    @property
    def dtypes(self) -> str:
        dtypes = "/".join(dict.fromkeys((SHORT[self.dtype], SHORT[self.lora_dtype])))
        return f"{dtypes} {self.quantized}".rstrip()

    @property
    def weight(self) -> int | None:
        """Bytes of a quantized weight, its scales included."""
        if not self.quantized:
            return None
        blocks, elements = -(-self.n * self.k // 64), self.n * self.k
        return elements + 4 * self.n if self.quantized == "fp8" else -(-elements // 2) + blocks + 4 * -(-blocks // 256)

    @property
    def columns(self) -> Row:
        return {**dict(zip(("M", "N", "K", "r", "dropout"), self, strict=False)), "dtypes": self.dtypes}


# One case for each regime. Sizes do not divide tiles; rows are multiples of 16 bytes, as descriptors require.
SMALL = (
    Case(1, 520, 1032, 16),
    Case(9, 328, 904, 64, 0.1),
    Case(70, 264, 200, 16),
    Case(70, 264, 200, 16, lora_dtype=BF16),
    Case(200, 264, 200, 16, 0.1),
    Case(200, 200, 264, 64),
    Case(136, 264, 136, 128, 0.1),
    Case(136, 264, 136, 128, 0.1, lora_dtype=BF16),
    Case(600, 136, 72, 16, 0.1),
    Case(72, 136, 200, 16, dtype=FP32),
    Case(72, 136, 200, 64, 0.1, dtype=FP32),
    Case(200, 264, 136, 16, 0.1, kernel="vendor"),
)
SMALL_QUANTIZED = (
    Case(9, 328, 960, 16, quantized="nf4"),
    Case(70, 264, 320, 16, 0.1, quantized="nf4"),
    Case(300, 136, 192, 16, quantized="nf4"),
    Case(9, 329, 75, 16, quantized="nf4"),
    Case(70, 264, 320, 16, 0.1, quantized="fp8"),
)
ROWS = (1, 16, 64, 512, 2048, 8192)
SIZES = ((4096, 4096), (14336, 4096))
REAL = tuple(Case(m, n, k, r, p) for (n, k), r, p, m in product(SIZES, (16, 64), (0.0, 0.1), ROWS))
REAL_QUANTIZED = tuple(
    Case(m, 4096, 4096, 16, quantized=kind) for kind, m in product(("nf4", "fp8"), (1, 16, 64, 256, 512, 2048, 8192))
)
TARGET = Case(8192, 4096, 4096, 16, 0.1)


class Set(NamedTuple):
    """An optimizer's parameters: equal pairs, and others outside pairs."""

    pairs: int
    r: int
    width: int
    dtype: torch.dtype = FP32
    others: tuple[int, ...] = ()
    latched: bool = False

    @property
    def label(self) -> str:
        beside = f" + {sum(self.others):,} elements" if self.others else ""
        return f"{self.pairs} pairs r {self.r} width {self.width}{beside} {SHORT[self.dtype]}"


SETS = (
    Set(1, 4, 256),
    Set(4, 16, 2048),
    Set(4, 16, 2048, latched=True),
    Set(4, 16, 2048, BF16),
    Set(2, 64, 4096),
    Set(2, 16, 2048, others=(2048, 100_003)),
)


def launches(device: Device, case: Case, where: str = "meta") -> tuple[list[Any], list[Any]]:
    """The forward's and the backward's launches of ``case``, as ``device`` would make them, on tensors without memory or, to
    count them, on the CPU's."""
    sizes = (*case[:4], case.dtype, case.lora_dtype, case.p)
    if case.quantized:
        weight = case.quantized if where == "meta" else quantized_weight(case.n, case.k, case.quantized)
        return quantized_launches(device, *sizes, weight, where=where)
    choice = Choice(case.kernel, "") if case.kernel else None
    return call_launches(device, *sizes, choice, choice, where=where)


def quantized_weight(n: int, k: int, kind: str) -> NF4Weight | FP8Weight:
    """A weight with every value of a code, if it has enough elements and scales."""
    if kind == "fp8":
        return FP8Weight(torch.zeros(n, k).to(torch.float8_e4m3fn), torch.ones(n))
    blocks = -(-n * k // 64)
    packed, absmax = ((torch.arange(size) % 256).to(torch.uint8) for size in (-(-n * k // 2), blocks))
    nested = (torch.ones(-(-blocks // 256)), torch.ones(256), torch.zeros(()), 256)
    return NF4Weight(packed, absmax, torch.ones(16), (n, k), 64, *nested)


def _name(launch: Any) -> str:
    kernel = launch.kernel.__name__ if hasattr(launch, "kernel") else "vendor"
    return str(kernel).removeprefix("_").removesuffix("_kernel")


def case_rows(device: Device, case: Case, count: bool) -> list[Row]:
    """A row for each launch, then one for all, counted or by formula."""
    directions = launches(device, case, "cpu" if count else "meta")
    listed = [(word, launch) for word, made in zip(("forward", "backward"), directions, strict=True) for launch in made]
    if count:
        with counted() as found:
            for _, launch in listed:
                launch.run(torch.device("cpu"))
        tensors = [launch.tensors for launch in found]
    else:
        tensors = [t.formula_by_tensor(launch) for _, launch in listed]
    operation = "lora_linear_quantized" if case.quantized else "lora_linear"
    common = {"source": "counted" if count else "formula", "device": device.arch, "operation": operation}
    rows: list[Row] = []
    for number, ((word, launch), by_name) in enumerate(zip(listed, tensors, strict=True), 1):
        row = {"pass": word, "number": number, "kernel": _name(launch), "variant": launch.variant, "launches": 1}
        unique = " ".join(f"{name}:{traffic.unique}" for name, traffic in by_name.items())
        moved = t.total(by_name.values())._asdict()
        rows.append({**common, **case.columns, **row, **moved, "unique_by_tensor": unique})
    everything = t.total(traffic for by_name in tensors for traffic in by_name.values())
    frozen = (
        floors.floor_frozen_forward(*case[:3], case.dtype, weight=case.weight).unique
        + floors.floor_frozen_backward(*case[:3], case.dtype, weight=case.weight).unique
    )
    floor = t.total(floors.floor_lora(*case[:4], case.dtype, case.lora_dtype, case.p > 0, weight=case.weight)).unique
    one_pass = case.m * case.k * case.dtype.itemsize
    activations = sum(map(t.activation_bytes, tensors))
    frozen_activations = 2 * case.m * (case.n + case.k) * case.dtype.itemsize
    summary = {
        "pass": "both", "kernel": "all", "variant": " ".join(_name(launch) for _, launch in listed),
        "launches": len(listed), **everything._asdict(), "floor": floor, "floor_frozen": frozen,
        "unique_to_floor": round(everything.unique / floor, 4), "issued_to_floor": round(everything.issued / floor, 2),
        "extra_passes": round((everything.unique - frozen) / one_pass, 4),
        "extra_activation_passes": round((activations - frozen_activations) / one_pass, 4),
    }  # fmt: skip
    return [*rows, {**common, **case.columns, **summary}]


def optimizer_rows(tensors: Set) -> list[Row]:
    """A row of a counted step, and one by formula. Counts the second step: the first also measures the sums."""
    from stablelora_kernels.dispatch.settings import use_backend
    from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
    from stablelora_kernels.optim.state import Pair

    generator = torch.Generator().manual_seed(0)
    named = []
    for i in range(tensors.pairs):
        a = torch.randn(tensors.r, tensors.width, generator=generator)
        # A pair latches once ||A|| / n is not above ||B|| / m.
        b = torch.full((tensors.width, tensors.r), 8.0 if tensors.latched else 1e-3)
        named += [(f"{i}.lora_A", a), (f"{i}.lora_B", b)]
    named += [(f"other{i}", torch.randn(size, generator=generator)) for i, size in enumerate(tensors.others)]
    named = [(name, p.to(tensors.dtype).requires_grad_()) for name, p in named]
    params = [p for _, p in named]
    optimizer = StableLoRAAdamW(named)
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    with use_backend("triton"):
        optimizer.step()
        state = optimizer.state
        moments = {name: [state[p][key] for p in params] for name, key in (("m", "exp_avg"), ("v", "exp_avg_sq"))}
        with counted(p=params, g=[p.grad for p in params if p.grad is not None], **moments) as found:
            optimizer.step()
    sizes = [p.numel() for p in params], [p.element_size() for p in params]
    floor = floors.floor_optimizer(*sizes)
    pairs = [Pair(2 * i, 2 * i + 1) for i in range(tensors.pairs)]
    by_formula = floors.optimizer_formula(*sizes, pairs, tensors.latched)
    rows = []
    for source, traffic in (("counted", t.total(launch.traffic for launch in found)), ("formula", by_formula)):
        row: Row = {
            "source": source, "operation": "stable_adamw", "r": tensors.r, "dtypes": SHORT[tensors.dtype], "kernel": "all",
            "variant": tensors.label + (" latched" if tensors.latched else ""), "launches": len(found), **traffic._asdict(),
            "floor": floor.unique, "unique_to_floor": round(traffic.unique / floor.unique, 4),
            "issued_to_floor": round(traffic.issued / floor.unique, 4),
        }  # fmt: skip
        if source == "counted":
            by_tensor = ((name, part) for launch in found for name, part in launch.tensors.items())
            row["unique_by_tensor"] = " ".join(f"{name}:{part.unique}" for name, part in by_tensor)
        rows.append(row)
    return rows


MOVED = ("read_issued", "written_issued", "read_unique", "written_unique")


def _case_cells(row: Row) -> list[str]:
    return [f"{row['M']}x{row['N']}x{row['K']}", str(row["r"]), f"{row['dropout']:g}", row["dtypes"]]


def counted_table(rows: Sequence[Row], formula: Sequence[Row]) -> list[str]:
    heads = ["M x N x K", "r", "p", "dtypes", "launch", *(word.replace("_", " ") for word in MOVED)]
    cells = [[*heads, "formula", "unique/floor"]]
    for row, other in zip(rows, formula, strict=True):
        same = "equal" if all(row[key] == other[key] for key in MOVED) else "DIFFERENT"
        name = f"{row['launches']} launches" if row["kernel"] == "all" else f"{row['pass']} {row['kernel']}"
        how = "ideal" if row["kernel"] == "vendor" else same
        ratio = f"{row['unique_to_floor']:.3f}" if "unique_to_floor" in row else ""
        cells.append([*_case_cells(row), name, *(f"{row[key]:,}" for key in MOVED), how, ratio])
    return aligned(cells, 5)


def formula_table(rows: Sequence[Row]) -> list[str]:
    heads = ["M x N x K", "r", "p", "dtypes", "launches"]
    cells = [[*heads, "issued MB", "unique MB", "floor MB", "unique/floor", "extra passes", "X, Y passes"]]
    for row in rows:
        unique, issued = (row[f"read_{kind}"] + row[f"written_{kind}"] for kind in ("unique", "issued"))
        numbers = [f"{value / 1e6:,.1f}" for value in (issued, unique, row["floor"])]
        ratios = [f"{row[key]:.3f}" for key in ("unique_to_floor", "extra_passes", "extra_activation_passes")]
        cells.append([*_case_cells(row), str(row["launches"]), *numbers, *ratios])
    return aligned(cells, 4)


def optimizer_table(rows: Sequence[Row]) -> list[str]:
    cells = [
        ["tensors", "launches", *(word.replace("_", " ") for word in MOVED), "unique/floor", "issued/floor", "formula"]
    ]
    for row, other in zip(rows[::2], rows[1::2], strict=True):
        same = "equal" if all(row[key] == other[key] for key in MOVED) else "DIFFERENT"
        ratios = [f"{row[key]:.4f}" for key in ("unique_to_floor", "issued_to_floor")]
        cells.append([row["variant"], str(row["launches"]), *(f"{row[key]:,}" for key in MOVED), *ratios, same])
    return aligned(cells)


def group_rows(device: Device) -> tuple[list[Row], list[str]]:
    """Rows of projections that share X, one by one and together, and their table."""
    rows = [group.group_row(device, each) for each in group.REAL]
    return rows, group.group_table(rows)


def mlp_rows(device: Device) -> tuple[list[Row], list[str]]:
    """Rows of a gated MLP, by three layers and as one op, and their table."""
    rows = [row for each in mlp.REAL for row in mlp.mlp_rows(device, each)]
    return rows, mlp.mlp_table(rows)


def _check(words: str, found: float, limit: float) -> str:
    return f"{words}: {found:.4f}, target at most {limit:g}: {'met' if found <= limit else 'missed'}"


def checks(optimizer: Sequence[Row], real: Sequence[Row]) -> list[str]:
    """The targets, each with its figure."""
    counted = [row for row in optimizer if row["source"] == "counted"]
    target = next(row for row in real if all(row[key] == value for key, value in TARGET.columns.items()))
    shape = f"lora_linear {TARGET.m} x {TARGET.n} x {TARGET.k}, r {TARGET.r}, dropout {TARGET.p:g}"
    return [
        *(
            _check(f"optimizer, issued bytes to the floor, {row['variant']}", row["issued_to_floor"], OPTIMIZER_TARGET)
            for row in counted
        ),
        _check(f"{shape}, extra passes, all tensors", target["extra_passes"], PASSES_TARGET),
        _check(f"{shape}, extra passes, X, Y, dY and dX alone", target["extra_activation_passes"], PASSES_TARGET),
    ]
