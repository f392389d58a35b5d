"""Compile the optimizer's kernels for absent GPUs: ``python -m tests.helpers.compile_stable_adamw cuda:90/2``.

The number after the slash is the kernel's VARIANTS. A second number is its FLAGS; the kernel then has neither AMP nor clipping.
tests/kernels/test_stable_adamw_kernel.py runs this in a process without the interpreter. It prints a JSON object for each
argument: for NVIDIA's GPUs the number of vector loads and stores of global memory by their bits, registers a thread and bytes
spilled.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

from stablelora_kernels.kernels.stable_adamw import step as kernels
from stablelora_kernels.kernels.stable_adamw import tables
from stablelora_kernels.kernels.stable_adamw.norms import _square_sums_kernel
from stablelora_kernels.optim.triton_engine import TritonStep
from tests.helpers.compiling import compile_kernel, resources, target

TYPES = {
    "tensors_ptr": "*i64", "addresses_ptr": "*i64", "chunks_ptr": "*i32", "hyper_ptr": "*fp32",
    "words_ptr": "*i64", "steps_ptr": "*fp32", "turns_ptr": "*i8", "latched_ptr": "*i32", "squares_ptr": "*fp32",
    "grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32", "grad_squares_ptr": "*fp32", "n_chunks": "i32",
    "n_grad_squares": "i32", "max_grad_norm": "fp32", "n_squares": "i32", "skipped_ptr": "*i32",
}  # fmt: skip


def main(name: str, variants: int, flags_of_step: int | None = None) -> None:
    where = target(name)
    constants: dict[str, Any] = {"VARIANTS": variants, "CHUNK": TritonStep.CHUNK}
    more = flags_of_step is None
    flags = {"HAS_SCALE": more, "HAS_INF": more, "CLIP": more, "FLAGS": flags_of_step or 0}
    flags["GRAD_SUMS"] = tables.MAX_GRAD_SUMS
    warps = {"num_warps": tables.NUM_WARPS}
    step_types, sums_types = (
        {name: TYPES[name] for name in kernel.arg_names if name in TYPES}
        for kernel in (kernels._stable_adamw_kernel, _square_sums_kernel)
    )
    step = compile_kernel(kernels._stable_adamw_kernel, step_types, constants | flags, where, **warps)
    sums = compile_kernel(_square_sums_kernel, sums_types, constants | {"FLAGS": 0}, where, **warps)
    result: dict[str, Any] = {"shared": step.metadata.shared, "kinds": sorted(step.asm)}
    if "ptx" in step.asm:
        wide = re.compile(r"\b(ld|st)\.global\S*\.v(\d)\.b(\d+)")
        for label, built in (("step", step), ("sums", sums)):
            found = Counter(f"{op}{int(count) * int(bits)}" for op, count, bits in wide.findall(built.asm["ptx"]))
            result[label] = dict(found)
        result["step"] |= resources(step.asm["cubin"])
    print(json.dumps(result))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, *numbers = argument.split("/")
        main(name, *map(int, numbers))
