"""Count the instructions of every launch that predictions ask about, in machine code compiled for a
GPU that need not be present.

    python -m benchmarks.lab.predict.count [--gpu h100] [--check]

renews the GPU's rows in benchmarks/results/instructions.csv, or with ``--check`` exits with 1 if
they differ. A launch takes 2 to 6 s of one core, 0.5 s once Triton has it in its cache; an H100 has
508 launches, each other GPU about 65.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, product
from typing import Any

import pandas as pd
import triton

from benchmarks.common.tables import write_text
from benchmarks.lab.compile_report import machine_code
from benchmarks.lab.compile_report.occupancy import PROCESSORS, occupancy
from benchmarks.lab.compile_report.report import TRITON
from benchmarks.lab.predict import layer_time, quantized
from benchmarks.lab.predict import parts as taken_apart
from benchmarks.lab.predict.ceilings import load_gpu
from benchmarks.lab.predict.instructions import TABLE, Part, jobs_of, key_of, parts
from benchmarks.lab.predict.rivals import MLP
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.settings import STRATEGIES

COLUMNS = ["arch", "launch", "kernel", "variant", "residents", "part", *Part._fields]


def launches(device: Device) -> dict[str, Any]:
    """By key: the launches of all tables that the commands print. The H100's rules are also tested
    with adapters in 16 bits, and its layers are taken apart.
    """
    ways = [_of_layers(device, wide_adapters=True), _of_branches(device)]
    if layer_time.is_counted_in_full(device):
        ways += [_of_layers(device, wide_adapters=False), _of_mlps(device)]
        ways += [_of_quantized(device), _of_parts(device)]
    by_key: dict[str, Any] = {}
    for way in chain.from_iterable(ways):
        by_key |= {key_of(launch): launch for launch in way if hasattr(launch, "kernel")}
    return by_key


def _of_layers(device: Device, wide_adapters: bool) -> Iterator[list[Any]]:
    shapes = layer_time.layers(device, False) + layer_time.layers(device, True)
    if layer_time.is_counted_in_full(device):
        shapes += quantized.shapes()
    for shape, kernel in product(shapes, STRATEGIES[1:]):
        shape = shape._replace(wide_adapters=wide_adapters)
        yield from layer_time.by_kernel(device, shape, kernel)


def _of_branches(device: Device) -> Iterator[list[Any]]:
    shapes = layer_time.layers(device, False) + layer_time.layers(device, True)
    for shape, strategy in product(shapes, ("chained", "split")):
        if shape.m >= layer_time.BRANCH_ROWS:
            yield from layer_time.by_branch(device, shape, strategy)


def _of_mlps(device: Device) -> Iterator[list[Any]]:
    for sizes, dropout, arm in product(
        layer_time.MLPS, (False, True), (layer_time.SEPARATE, layer_time.ONE_OP)
    ):
        yield from layer_time.mlp_launches_of(device, MLP(*sizes, dropout), arm)


def _of_quantized(device: Device) -> Iterator[list[Any]]:
    for shape, kind, kernel in product(
        quantized.shapes(), quantized.BITS, ("in_loop", "dequantize")
    ):
        yield from quantized.by_kernel(device, shape, kind, kernel)


def _of_parts(device: Device) -> Iterator[list[Any]]:
    for shape in taken_apart.SHAPES:
        yield [*taken_apart.launches(device, shape, taken_apart.on_meta).values()]


def count(launch: Any, arch: str) -> list[dict[str, Any]]:
    """The rows of a launch."""
    compiled = machine_code.compile_launch(launch, arch)
    machine, metadata = compiled.asm["cubin"], compiled.metadata
    registers = int(re.findall(r"\bREG:(\d+)", machine_code.cuobjdump(machine))[0])
    share = occupancy(
        arch, registers, metadata.shared, metadata.num_warps, getattr(metadata, "tmem_size", 0) or 0
    )
    residents = round(share * PROCESSORS[arch][0] / metadata.num_warps)
    kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    label = dict(
        zip(COLUMNS, (arch, key_of(launch), kernel, launch.variant, residents), strict=False)
    )
    counted = parts(
        machine_code.nvdisasm(machine), jobs_of(launch), persistent="x_desc" in launch.arguments
    )
    return [{**label, "part": name, **numbers._asdict()} for name, numbers in counted.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.lab.predict.count", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--gpu",
        default="h100",
        help="a file's name in benchmarks/lab/predict/gpus (default: %(default)s)",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the table; exit with 1 if rows differ"
    )
    parser.add_argument(
        "--variant", default="", help="check those of this name alone (default: all)"
    )
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error(
            "TRITON_INTERPRET is set: Triton would interpret the kernels, not compile them; unset it"
        )
    if not triton.__version__.startswith(f"{TRITON}."):
        parser.error(f"the table is from Triton {TRITON}, this is {triton.__version__}")
    device = load_gpu(options.gpu).device
    # The compiler runs without Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        asked = [
            launch
            for launch in launches(device).values()
            if options.variant in ("", launch.variant)
        ]
        counted = pool.map(partial(count, arch=device.arch), asked)
        rows = pd.DataFrame(chain.from_iterable(counted), columns=COLUMNS)
    rows = rows.sort_values([*COLUMNS[2:4], "launch"], kind="stable", ignore_index=True)
    old = pd.read_csv(TABLE, dtype={"launch": str}) if TABLE.exists() else rows[:0]
    if options.check or options.variant:
        known = old[
            (old["arch"] == device.arch)
            & old["variant"].isin([options.variant or variant for variant in old["variant"]])
        ]
        differ = rows.merge(known, how="outer", indicator=True).query("_merge != 'both'")
        print(differ.to_string(index=False) if len(differ) else f"{len(rows)} rows as in the table")
        return int(len(differ) > 0)
    others = old[old["arch"] != device.arch]
    write_text(TABLE, pd.concat([others, rows]).to_csv(index=False, lineterminator="\n"))
    print(f"wrote {len(rows)} rows to {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
