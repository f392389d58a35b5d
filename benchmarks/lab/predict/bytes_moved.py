"""Bytes that the kernels move, and their launches: counted, by formula, and against the least possible.

    python -m benchmarks.lab.predict.bytes_moved [--device sm_90] [--out DIRECTORY]

At small shapes, one case for each regime, every load and store is counted in Triton's interpreter, launch by launch, and
compared with the formula. At real shapes the formula alone. The optimizer's steady step is counted. ``--out`` writes a CSV
file for each table, those of layers with a row a launch.

What a figure means:

- *Issued* are the bytes that programs ask for. *Unique* are those that a launch touches, each once: what memory must deliver
  if a cache holds all else during a launch, and nothing from one launch to the next. Real traffic is in between. A chained
  launch reads X twice, for S and for the product; it counts once here, and comes from memory twice if L2 is smaller than X.
- *Floor* is the least for the operation as a whole: operands read once in forward and once in backward, results written once.
- *Extra passes* over an activation beyond the frozen layer = (unique bytes of all launches of forward and backward, less those
  of the frozen layer's forward, which reads X, W and bias and writes Y, and backward, which reads dY and W and writes dX) /
  (bytes of X, which is [M, K]). All tensors count, also A, B, S, dS, dA, dB, seeds and the sums that programs share.
- *Extra X, Y passes* = the same with X, Y, dY and dX alone in both terms of the difference.
- Of a gated MLP, a *pass* is a read or a write of one [M, F] matrix by one launch. Programs of one launch that read the same
  matrix count once; in *reader passes* dA's programs, which may read G and U apart from dH's, count for themselves.

The vendor's product counts as reading X, W and bias once and writing Y once: its code is not known. The launch that draws
dropout's seed, of 8 bytes, is not in the list.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Triton reads it as it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import pandas as pd
import torch

from benchmarks.lab.predict import formula as t
from benchmarks.lab.predict.counter import counted
from benchmarks.lab.predict.layer_time import DIRECTIONS, MLP_ARMS
from benchmarks.lab.predict.rivals import BF16, MLP, Work, passes
from stablelora_kernels.dispatch.problem import DEVICES, Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch.dry_run import call_launches, group_launches, quantized_launches
from stablelora_kernels.quantized import FP8Weight, NF4Weight

FP16, FP32 = torch.float16, torch.float32
OPTIMIZER_TARGET, PASSES_TARGET = 1.02, 3.0
MOVED = list(t.Traffic._fields)

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
    forced: str = ""
    # "nf4", in blocks of 64 with nested scales, or "fp8"; the kernels are then dispatch's.
    quantized: str = ""

    def floors(self) -> tuple[int, int]:
        """Least bytes, forward and backward, of the layer and of the frozen one: operands read once, results written once.

        Forward reads X, W, bias and writes Y; backward reads dY, W and writes dX. With LoRA, both read A, B and dropout's seed,
        and backward reads X and writes dA and dB. Not S: it could be computed again from X and A, which backward reads anyway.
        """
        x, y, weight, bias = (
            count * self.dtype.itemsize for count in (self.m * self.k, self.m * self.n, self.n * self.k, self.n)
        )
        blocks = -(-self.n * self.k // 64)
        if self.quantized == "nf4":
            weight = -(-self.n * self.k // 2) + blocks + 4 * -(-blocks // 256)
        elif self.quantized == "fp8":
            weight = self.n * self.k + 4 * self.n
        frozen = 2 * (x + y + weight) + bias
        adapters = self.r * (self.n + self.k) * self.lora_dtype.itemsize
        return frozen + x + 3 * adapters + 16 * (self.p > 0), frozen


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
    Case(200, 264, 136, 16, 0.1, forced="vendor"),
    Case(9, 328, 960, 16, quantized="nf4"),
    Case(70, 264, 320, 16, 0.1, quantized="nf4"),
    Case(300, 136, 192, 16, quantized="nf4"),
    Case(9, 329, 75, 16, quantized="nf4"),
    Case(70, 264, 320, 16, 0.1, quantized="fp8"),
)
SIZES, RANKS, DROPOUTS = ((4096, 4096), (14336, 4096)), (16, 64), (0.0, 0.1)
REAL = [Case(m, *size, r, p) for size, r, p, m in product(SIZES, RANKS, DROPOUTS, (1, 16, 64, 512, 2048, 8192))]
REAL += [
    Case(m, 4096, 4096, 16, quantized=kind) for kind, m in product(("nf4", "fp8"), (1, 16, 64, 256, 512, 2048, 8192))
]
TARGET = Case(8192, 4096, 4096, 16, 0.1)


class Group(NamedTuple):
    """Projections of one X, of ``ns`` output features with a bias each; A and B in float32."""

    m: int
    ns: tuple[int, ...]
    k: int
    r: int
    p: float = 0.0
    dtype: torch.dtype = BF16


# In Llama 3.1 8B: an attention's q, k and v, an MLP's gate and up, and that MLP.
PROJECTIONS = ((4096, 1024, 1024), (14336, 14336))
GROUPS = [Group(m, ns, 4096, r, p) for ns, r, p, m in product(PROJECTIONS, RANKS, DROPOUTS, (64, 512, 2048, 8192))]
MLPS = [MLP(m, 4096, 14336, r, p > 0) for r, p, m in product(RANKS, DROPOUTS, (32, 512, 2048, 8192))]


class Set(NamedTuple):
    """An optimizer's parameters: equal pairs, and others outside pairs."""

    pairs: int
    r: int
    width: int
    dtype: torch.dtype = FP32
    others: tuple[int, ...] = ()
    latched: bool = False


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
    choice = Choice(case.forced, "") if case.forced else None
    return call_launches(device, *sizes, choice, choice, where=where)


def quantized_weight(n: int, k: int, kind: str) -> NF4Weight | FP8Weight:
    """A weight with every value of a code, if it has enough elements and scales."""
    if kind == "fp8":
        return FP8Weight(torch.zeros(n, k).to(torch.float8_e4m3fn), torch.ones(n))
    blocks = -(-n * k // 64)
    packed, absmax = ((torch.arange(size) % 256).to(torch.uint8) for size in (-(-n * k // 2), blocks))
    nested = (torch.ones(-(-blocks // 256)), torch.ones(256), torch.zeros(()), 256)
    return NF4Weight(packed, absmax, torch.ones(16), (n, k), 64, *nested)


def moved(launch: Any) -> t.Tensors:
    """The bytes of a launch by tensor, by formula; those of an elementwise one between layers all as read."""
    if isinstance(launch, Work):
        return {launch.name: t.Traffic(int(launch.bytes), 0, int(launch.bytes), 0)}
    return t.formula_by_tensor(launch)


def count(made: Iterable[Any]) -> list[t.Tensors]:
    """The same for launches on the CPU's tensors, counted."""
    with counted() as found:
        for launch in made:
            launch.run(torch.device("cpu"))
    return [launch.tensors for launch in found]


def all_tensors(found: Iterable[t.Tensors]) -> t.Traffic:
    return t.total(traffic for tensors in found for traffic in tensors.values())


def case_rows(device: Device, case: Case, counting: bool = False) -> list[Row]:
    """A row for each launch, then one for all, by formula or counted and compared with the formula."""
    ways = launches(device, case, "cpu" if counting else "meta")
    made = [launch for way in ways for launch in way]
    by_formula = [moved(launch) for launch in made]
    tensors = count(made) if counting else by_formula
    rows: list[Row] = []
    for number, (launch, found, expected) in enumerate(zip(made, tensors, by_formula, strict=True)):
        kernel = launch.kernel.__name__ if hasattr(launch, "kernel") else "vendor"
        rows.append({
            **case._asdict(), "pass": DIRECTIONS[number >= len(ways[0])], "variant": launch.variant, "launches": 1,
            "kernel": kernel.removeprefix("_").removesuffix("_kernel"), **all_tensors([found])._asdict(),
            "formula": "ideal" if kernel == "vendor" else "equal" if found == expected else "DIFFERENT",
            "unique_by_tensor": " ".join(f"{name}:{traffic.unique}" for name, traffic in found.items()),
        })  # fmt: skip
    everything, (floor, frozen) = all_tensors(tensors), case.floors()
    one_pass = case.m * case.k * case.dtype.itemsize
    activations = sum(map(t.activation_bytes, tensors)) - 2 * case.m * (case.n + case.k) * case.dtype.itemsize
    rows.append({
        **case._asdict(), "pass": "both", "kernel": "all", "launches": len(made), **everything._asdict(), "floor": floor,
        "floor_frozen": frozen, "unique / floor": everything.unique / floor, "issued / floor": everything.issued / floor,
        "extra passes": (everything.unique - frozen) / one_pass, "extra X, Y passes": activations / one_pass,
    })  # fmt: skip
    return rows


def group_rows(device: Device, group: Group) -> list[Row]:
    """Projections one by one, where autograd adds up their dX, and together: a row each, by formula."""
    m, ns, k, r, p, dtype = group
    apart = [launch for n in ns for way in call_launches(device, m, n, k, r, dtype, FP32, p) for launch in way]
    apart += [passes("both dX", m * k, 3)] * (len(ns) - 1)
    together = [launch for way in group_launches(device, m, ns, k, r, dtype, FP32, p) for launch in way]
    # Saved for backward either way: X once, each S, and dropout's seeds.
    saved = m * (k + r * len(ns)) * dtype.itemsize + 8 * len(ns) * (p > 0)
    rows = []
    for arm, made in (("apart", apart), ("together", together)):
        found = [moved(launch) for launch in made]
        rows.append({
            **group._asdict(), "arm": arm, "launches": len(made), "unique": all_tensors(found).unique, "saved": saved,
            "X, Y passes": sum(map(t.activation_bytes, found)) / (m * k * dtype.itemsize),
        })  # fmt: skip
    return rows


def mlp_rows(device: Device, mlp: MLP) -> list[Row]:
    """A gated MLP by three layers and an activation, and as one op: a row for each direction, by formula."""
    rows = []
    for arm, launches_of in MLP_ARMS.items():
        for way, made in zip(DIRECTIONS, launches_of(device, mlp), strict=True):
            found = [moved(launch) for launch in made]
            # The layers' launches have a bias each, which an MLP of this kind has not.
            biases = sum(tensors["bias"].unique for tensors in found if "bias" in tensors)
            wide = sum(wide_bytes(launch, mlp) for launch in made) / (mlp.m * mlp.f * BF16.itemsize)
            rows.append({
                **mlp._asdict(), "pass": way, "arm": arm, "launches": len(made), "unique": all_tensors(found).unique - biases,
                "[M, F] passes": wide, "reader passes": wide + sum(map(reads_apart, made)),
            })  # fmt: skip
    return rows


def wide_bytes(launch: Any, mlp: MLP) -> int:
    """Unique bytes of the tensors of [M, F], which move whole."""
    if isinstance(launch, Work):
        return int(launch.bytes) if launch.name == "activation" else 0
    given = t.named_tensors(t.arguments_of(launch))
    return sum(part.unique for name, part in moved(launch).items() if tuple(given[name].shape) == (mlp.m, mlp.f))


def reads_apart(launch: Any) -> int:
    """How many more passes there are if dA's programs read G and U for themselves."""
    v = {} if isinstance(launch, Work) else t.arguments_of(launch)
    return 2 * bool(v.get("GATE") and v.get("HAS_GRAD") and v.get("PRODUCTS"))


def optimizer_row(tensors: Set) -> Row:
    """A counted step: the second one, as the first also measures the sums."""
    from stablelora_kernels.dispatch.settings import use_backend
    from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW

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
        moments = {
            name: [optimizer.state[p][key] for p in params] for name, key in (("m", "exp_avg"), ("v", "exp_avg_sq"))
        }
        with counted(p=params, g=[p.grad for p in params if p.grad is not None], **moments) as found:
            optimizer.step()
    # p, g, m and v read; p, m and v written; the moments are float32.
    floor = sum(p.numel() for p in params) * (3 * tensors.dtype.itemsize + 16)
    traffic = t.total(launch.traffic for launch in found)
    touched = (f"{name}:{part.unique}" for launch in found for name, part in launch.tensors.items())
    return {
        **tensors._asdict(), "launches": len(found), **traffic._asdict(), "unique / floor": traffic.unique / floor,
        "issued / floor": traffic.issued / floor, "unique_by_tensor": " ".join(touched),
    }  # fmt: skip


def checks(device: Device, optimizer: Sequence[Row]) -> list[str]:
    """The targets, each with its figure."""
    worst, target = max(row["issued / floor"] for row in optimizer), case_rows(device, TARGET)[-1]
    shape = f"lora_linear {TARGET.m} x {TARGET.n} x {TARGET.k}, r {TARGET.r}, dropout {TARGET.p:g}"
    figures = [("the optimizer's issued bytes over the floor, at most", worst, OPTIMIZER_TARGET)]
    figures += [(f"{shape}, {key}", target[key], PASSES_TARGET) for key in ("extra passes", "extra X, Y passes")]
    return [
        f"{words}: {found:.4f}, target at most {limit:g}: {'met' if found <= limit else 'missed'}"
        for words, found, limit in figures
    ]


def shown(rows: Sequence[Row], in_mb: bool) -> str:
    """A table without the columns that are for the CSV files, and of real shapes without single launches."""
    frame = pd.DataFrame(rows).replace({BF16: "bf16", FP16: "fp16", FP32: "fp32"})
    if in_mb and "kernel" in frame:
        frame = frame[frame.kernel == "all"].drop(columns=["kernel", "pass", "formula", "forced"])
        for kind in ("issued", "unique"):
            frame[kind] = frame.pop(f"read_{kind}") + frame.pop(f"written_{kind}")
    frame = frame.drop(columns=["unique_by_tensor", "variant", "floor_frozen"], errors="ignore")
    for name in frame.columns.intersection(["issued", "unique", "floor", "saved"]) if in_mb else ():
        frame[f"{name} MB"] = frame.pop(name) / 1e6
    return frame.to_string(index=False, na_rep="", float_format="{:,.3f}".format)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.predict.bytes_moved",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--device",
        choices=sorted(DEVICES),
        default="sm_90",
        help="the GPU whose launches are made (default: %(default)s)",
    )
    add("--out", type=Path, help="where to write the tables as CSV files (default: nowhere)")
    options = parser.parse_args(argv)
    device = DEVICES[options.device]
    optimizer = [optimizer_row(tensors) for tensors in SETS]
    tables = {
        "counted": (
            "Layers, counted in the interpreter, bytes",
            [row for c in SMALL for row in case_rows(device, c, True)],
        ),
        "layers": (
            "Layers by formula, forward and backward",
            [row for case in REAL for row in case_rows(device, case)],
        ),
        "groups": ("Projections of one X, by formula", [row for each in GROUPS for row in group_rows(device, each)]),
        "mlps": ("A gated MLP, by formula", [row for mlp in MLPS for row in mlp_rows(device, mlp)]),
        "optimizer": ("The optimizer's step, counted, bytes", optimizer),
    }
    for name, (title, rows) in tables.items():
        print(f"{title}, launches as on {device.arch}:\n{shown(rows, name not in ('counted', 'optimizer'))}\n")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(options.out / f"{name}.csv", index=False, lineterminator="\n")
    print(*checks(device, optimizer), sep="\n")


if __name__ == "__main__":
    main()
