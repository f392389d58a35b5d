"""Compiles the optimizer's kernels for GPUs that are not here, in a process without the interpreter.

Triton decides as it is imported whether it interprets or compiles.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stablelora_kernels.kernels.stable_adamw import step as kernels
from stablelora_kernels.kernels.stable_adamw import tables
from stablelora_kernels.kernels.stable_adamw.norms import _square_sums_kernel
from stablelora_kernels.optim.triton_engine import TritonStep

TYPES = {
    "tensors_ptr": "*i64", "addresses_ptr": "*i64", "chunks_ptr": "*i32", "hyper_ptr": "*fp32",
    "words_ptr": "*i64", "steps_ptr": "*fp32", "turns_ptr": "*i8", "latched_ptr": "*i32", "squares_ptr": "*fp32",
    "grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32", "grad_squares_ptr": "*fp32", "n_chunks": "i32",
    "n_grad_squares": "i32", "max_grad_norm": "fp32", "n_squares": "i32", "skipped_ptr": "*i32",
}  # fmt: skip


def compile_kernel(kernel: Any, constants: dict[str, Any], target: str) -> Any:
    """``kernel`` for ``target``, whose pointers are multiples of 16."""
    backend, arch = target.split(":")
    gpu = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    signature = {name: TYPES.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind[0] == "*"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    options = {"enable_fp_fusion": True, "num_warps": tables.NUM_WARPS}
    return triton.compile(source, target=gpu, options=options)


def spills(cubin: bytes) -> bool:
    """Whether the machine code uses local memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True, check=True)
    assert "EXIT" in done.stdout
    return re.search(r"\b(?:STL|LDL)\b", done.stdout) is not None


def main(target: str, variants: int) -> None:
    """Print what was compiled; for NVIDIA's GPUs also the vector loads and stores of global memory, by their bits."""
    constants: dict[str, Any] = {"VARIANTS": variants, "CHUNK": TritonStep.CHUNK, "FLAGS": 0}
    flags = {"HAS_SCALE": True, "HAS_INF": True, "CLIP": True, "GRAD_SUMS": tables.MAX_GRAD_SUMS}
    step = compile_kernel(kernels._stable_adamw_kernel, constants | flags, target)
    sums = compile_kernel(_square_sums_kernel, constants, target)
    result: dict[str, Any] = {"kinds": sorted(step.asm)}
    if "ptx" in step.asm:
        wide = re.compile(r"\b(ld|st)\.global\S*\.v(\d)\.b(\d+)")
        for label, built in (("step", step), ("sums", sums)):
            found = Counter(f"{op}{int(count) * int(bits)}" for op, count, bits in wide.findall(built.asm["ptx"]))
            result[label] = dict(found)
        result["step"]["spills"] = spills(step.asm["cubin"])
    print(json.dumps(result))
