"""Compile the optimizer's kernels for GPUs that need not be there: ``python -m tests.compile_stable_adamw cuda:90/2``, the
number after the slash being the kernel's VARIANTS.

Run by test_stable_adamw.py in a process without the interpreter. Prints a JSON object for each argument: for NVIDIA's GPUs
the number of vector loads and stores of global memory by their bits, registers a thread and bytes spilled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stablelora_kernels.kernels import stable_adamw as kernels
from stablelora_kernels.ops.stable_adamw_triton import TritonStep

POINTERS = {
    "tensors_ptr": "*i64", "values_ptr": "*i64", "addresses_ptr": "*i64", "chunks_ptr": "*i32", "hyper_ptr": "*fp32",
    "words_ptr": "*i64", "steps_ptr": "*fp32", "ticks_ptr": "*i32", "latched_ptr": "*i32", "squares_ptr": "*fp32",
    "grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32", "grad_squares_ptr": "*fp32", "n_chunks": "i32",
    "n_grad_squares": "i32", "max_grad_norm": "fp32", "stride_values": "i32",
}  # fmt: skip


def target(name: str) -> GPUTarget:
    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def compile_kernel(kernel: Any, where: GPUTarget, **constants: Any) -> Any:
    """``kernel`` with its pointers aligned to 16 bytes, as PyTorch's are."""
    signature = {name: POINTERS.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=where, options={"num_warps": kernels.NUM_WARPS, "enable_fp_fusion": True})


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of local memory, which only spills use here, by the wheel's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def main(name: str, variants: int) -> None:
    where = target(name)
    step = compile_kernel(
        kernels._stable_adamw_kernel,
        where,
        HAS_SCALE=True,
        HAS_INF=True,
        CLIP=True,
        VARIANTS=variants,
        CHUNK=TritonStep.CHUNK,
        GRAD_SUMS=kernels.MAX_GRAD_SUMS,
    )
    sums = compile_kernel(kernels._square_sums_kernel, where, VARIANTS=variants, CHUNK=TritonStep.CHUNK)
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
        name, variants = argument.split("/")
        main(name, int(variants))
