"""Compiling one launch for a GPU that need not be present, and reading the resulting machine code."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.lab.compile_report import hazards, programs

# Of Triton: (3, 9).
RELEASE = tuple(int(number) for number in triton.__version__.split(".")[:2])


class HazardError(ValueError):
    """Compiled code has a fault that may make its results wrong."""


def target(arch: str) -> GPUTarget:
    return (
        GPUTarget("cuda", int(arch[3:]), 32)
        if arch.startswith("sm_")
        else GPUTarget("hip", arch, 64)
    )


def source(launch: Any, arch: str) -> tuple[ASTSource, Any]:
    """The compiler's input and options if ``launch`` ran on ``arch``, as Triton's own call makes
    them.
    """
    backend, kernel = make_backend(target(arch)), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(*launch.args, **launch.compiled_with)
    options, *rest = kernel._pack_args(backend, given, bound, specialization, given)
    return ASTSource(kernel, *rest), options


def words(launch: Any, arch: str) -> tuple[str, ...]:
    """Everything but the kernel that the code of ``launch`` depends on: ``x.row=1``, ``M: i32 of
    16``.
    """
    found, _ = source(launch, arch)
    facts = {path: f"={value}" for path, value in found.constants.items()}
    facts |= {
        path: "".join(f" of {value}" for _, value in pairs) for path, pairs in found.attrs.items()
    }
    given = launch.arguments
    made = [
        f"{name}{facts.get(path, '')}"
        if kind == "constexpr"
        else f"{name}: {kind}{facts.get(path, '')}"
        for path, name, kind in _leaves(
            (), [*given], [*given.values()], [*found.signature.values()]
        )
    ]
    return (*made, *(f"{name}={value}" for name, value in launch.options.items()))


def _leaves(
    path: tuple[int, ...], names: Sequence[str], values: Sequence[Any], kinds: Any
) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """The place, name and type of each leaf of arguments."""
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        kind = kinds if kinds == "constexpr" else kinds[i]
        if isinstance(value, tuple) and kind != "constexpr":
            fields = getattr(value, "_fields", range(len(value)))
            yield from _leaves((*path, i), [f"{name}.{field}" for field in fields], value, kind)
        else:
            yield (*path, i), name, kind


def compile_launch(launch: Any, arch: str) -> Any:
    """``launch``'s kernel, compiled as Triton would to launch it on ``arch``."""
    built, options = source(launch, arch)
    return triton.compile(built, target=target(arch), options=options.__dict__)


def source_digest(launch: Any, arch: str) -> str:
    """A digest of the input of :func:`compile_launch`: equal digests mean equal code."""
    options = sorted(launch.options.items())
    words = f"{triton.__version__} {arch} {options} {source(launch, arch)[0].hash()}"
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _run(
    tool: str | Path, options: Sequence[str], content: bytes
) -> subprocess.CompletedProcess[str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run(
            [tool, *options, file.name], capture_output=True, text=True, check=True
        )


_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def cuobjdump(cubin: bytes) -> str:
    """Resources and instructions of a cubin, by the tool in Triton's wheel."""
    return _run(_TOOLS / "cuobjdump", ["--dump-resource-usage", "-sass"], cubin).stdout


def serialized(ptx: str) -> str:
    """Why ptxas lets each WGMMA wait for the one before it, or ``""``: Hopper's matrix units then
    idle between them.
    """
    # As Triton calls it.
    flags = ["--regAllocOptLevel=2"] if RELEASE >= (3, 7) else []
    options = ["-lineinfo", "-v", *flags, "--gpu-name=sm_90a", "-o", os.devnull]
    log = _run(get_ptxas(90).path, options, ptx.encode()).stderr if "wgmma" in ptx else ""
    found = re.findall(r"\((C\d+)\)[^\n]*serialized due to (.*?) in (?:the )?function", log)
    return "; ".join(sorted({f"{code} {reason}" for code, reason in found}))


_MATRIX = re.compile(r"\b(?:(?:[HI]MMA|[HIQ]GMMA)\.\w+|UTC\w*MMA|v_mfma_[a-z]+\d+_\d+x\d+x\d+)")
# Fewer are a kernel's scaling, not its product.
FEWEST_FMAS = 32
_GCN_ACCESS = re.compile(
    r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(?:dwordx?(\d*)|b(\d+)|\w*?(short|byte))"
)


def read(compiled: Any) -> dict[str, Any]:
    """The figures of the report that come from the code.

    ``mma``: the instructions of a kernel's products by shape, ``HGMMA.64x256x16``: the matrix
    units', else FFMA. ``load_bits`` and ``store_bits``: means over the accesses in the text to
    addresses that differ between threads. On NVIDIA's GPUs they are read from PTX, whose widths the
    assembler keeps; on AMD's, scalars mostly have instructions of their own. ``store_waits``: those of
    Hopper, see ``hazards.store_waits``.

    Raises:
        HazardError: the code has a fault that a function of ``hazards.HAZARDS`` finds.
    """
    asm, reason, store_waits = compiled.asm, "", 0
    if "cubin" in asm:
        machine, ptx = cuobjdump(asm["cubin"]), programs.ptx(asm["ptx"])
        faults = hazards.faults(
            ptx=ptx, ttgir=programs.ttgir(asm["ttgir"]), sass=programs.sass(machine)
        )
        found = {
            name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", machine)
        }
        # Some code reserves a stack that it does not use.
        spills = (found["STACK"] + found["LOCAL"]) * bool(re.search(r"\b(?:STL|LDL)\b", machine))
        registers, reason = found["REG"], serialized(asm["ptx"])
        store_waits = hazards.store_waits(ptx)
        accesses = [
            (each.store, each.bits) for each in hazards.ptx_accesses(ptx) if each and each.varies
        ]
    else:
        machine, faults = asm["amdgcn"], hazards.faults(gcn=programs.gcn(asm["amdgcn"]))
        found = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\n", machine)}
        registers, spills = found["vgpr_count"], found["private_segment_fixed_size"]
        accesses = [
            (
                way == "store",
                {"short": 16, "byte": 8}[part] if part else int(plain or 32 * int(dwords or 1)),
            )
            for way, dwords, plain, part in _GCN_ACCESS.findall(machine)
        ]
    if faults:
        raise HazardError("; ".join(faults))
    names, scalar = {*_MATRIX.findall(machine)}, re.findall(r"\bFFMA2?\b", machine)
    names |= {*scalar} if not names and len(scalar) >= FEWEST_FMAS else set()
    row = {
        "registers": registers,
        "spills": spills,
        "serialized": reason,
        "store_waits": store_waits,
    }
    row["mma"] = " ".join(sorted(names)) if "tt.dot" in asm["ttir"] else ""
    for column, wanted in (("load_bits", False), ("store_bits", True)):
        bits = [each for store, each in accesses if store == wanted]
        row[column] = round(sum(bits) / len(bits)) if bits else 0
    return row
