"""Compile the specialized product for an H100 that need not be present.

    python -m benchmarks.lab.specialized [--triton VERSION] [--only WORD]

It prints each variant's shared memory, registers at launch and bytes of spills, and then what is
wrong with its code: WGMMAs that ptxas serializes, and registers that are overwritten while a WGMMA
may still read them. Exit status: 0; 1 if anything is wrong or spills.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import triton

from benchmarks.common import tritons
from benchmarks.lab.compile_report import hazards_sass, machine_code
from benchmarks.lab.compile_report.sass import Program
from benchmarks.lab.specialized.cases import Case, make_empty
from benchmarks.lab.specialized.launches import launch_product
from benchmarks.lab.specialized.support import reason_against
from stablelora_kernels.launch.base import Launch

ARCH = "sm_90"
SIZES = (4096, 4096, 4096)
# What a model's layer asks for, and the largest blocks of ranks.
VARIANTS = {
    "product": Case(*SIZES),
    "branch": Case(*SIZES, r=16, bias=True),
    "branch of rank 64": Case(*SIZES, r=64, bias=True),
    "dX": Case(*SIZES, r=16, trans_w=True),
    "dX, mask": Case(*SIZES, r=16, masked=True, trans_w=True),
    "dX of rank 64, mask": Case(*SIZES, r=64, masked=True, trans_w=True),
}
VARIANTS |= {f"{name}, pairs": case._replace(pairs=True) for name, case in VARIANTS.items()}


class Compiled(NamedTuple):
    """What the machine code of a variant says."""

    shared_bytes: int
    registers: int
    spilled_bytes: int
    # Matrix instructions in the code's text.
    products: int
    faults: list[str]

    @property
    def is_right(self) -> bool:
        return self.products > 0 and not self.spilled_bytes and not self.faults


def compile_variant(launch: Launch) -> Compiled:
    compiled = machine_code.compile_launch(launch, ARCH)
    machine = machine_code.cuobjdump(compiled.asm["cubin"])
    resources = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", machine)}
    faults = [*hazards_sass.overwritten_operands(Program(machine))]
    if serialized := machine_code.serialized(compiled.asm["ptx"]):
        faults.append(f"serialized: {serialized}")
    return Compiled(
        compiled.metadata.shared,
        resources["REG"],
        resources["STACK"] + resources["LOCAL"],
        len(re.findall(r"\bHGMMA\b", machine)),
        faults,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.specialized",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="WORD", help="variants with WORD")
    tritons.add_option(parser)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, and Triton's interpreter compiles nothing")
    tritons.run_again("benchmarks.lab.specialized", options.triton, arguments)
    print(f"Triton {triton.__version__}, {ARCH}")
    print("| variant | shared bytes | registers | spilled bytes | HGMMA | faults |")
    print("|---|--:|--:|--:|--:|---|", flush=True)
    wrong = 0
    for name, case in VARIANTS.items():
        if options.only not in name:
            continue
        if reason := reason_against(case.pairs):
            print(f"| {name} | | | | | left out: {reason} |")
            continue
        found = compile_variant(launch_product(make_empty(case), case.programs, case.pairs))
        faults = "; ".join(found.faults) or "none"
        print(
            f"| {name} | {found.shared_bytes} | {found.registers} | {found.spilled_bytes} | "
            f"{found.products} | {faults} |",
            flush=True,
        )
        wrong += not found.is_right
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
