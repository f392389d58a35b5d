"""Compiling kernels for GPUs that need not be there, and reading what came out. Used by the compile_*.py beside this file.

These run in processes of their own: Triton decides at import whether it interprets or compiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.lab.compile_report.machine_code import cuobjdump, sass_resources

ARCHITECTURES = ("cuda:80", "cuda:86", "cuda:90", "cuda:100", "hip:gfx942")
# Bytes of shared memory that one program may have.
SHARED_LIMITS = {"cuda:80": 166_912, "cuda:86": 101_376, "cuda:90": 232_448, "cuda:100": 232_448, "hip:gfx942": 65_536}


def target(name: str) -> GPUTarget:
    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], where: GPUTarget, **options: Any
) -> Any:
    """``kernel`` for ``where``, with its pointers and the integers in ``types`` marked as multiples of 16.

    ``types`` gives Triton's type of each argument that is not in ``constants``; one that ends in "+" is a multiple of 16.
    """
    signature = {name: types.get(name, "constexpr").rstrip("+") for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attrs = {
        (i,): aligned
        for i, name in enumerate(kernel.arg_names)
        if types.get(name, "")[:1] == "*" or types.get(name, "")[-1:] == "+"
    }
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=where, options={"enable_fp_fusion": True, **options})


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes spilled."""
    found = sass_resources(cuobjdump(cubin))
    return {"registers": found["registers"], "spilled": found["spills"]}


def run_module(name: str, *args: str) -> Any:
    """The JSON that ``python -m tests.<name> <args>`` prints, run without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.helpers.{name}", *args], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
