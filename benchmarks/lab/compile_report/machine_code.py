"""Compiling one launch for a GPU that need not be present, and reading the resulting machine code."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import ir, native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from benchmarks.lab.compile_report import hazards


class Source(NamedTuple):
    """The input of Triton's compiler for a launch: equal for launches that share a kernel."""

    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], Any]


def target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def source(launch: Any, arch: str) -> Source:
    """The types of the arguments, and Triton's knowledge of their values, if ``launch`` ran on ``arch``."""
    backend, kernel = make_backend(target(arch)), launch.kernel
    given = dict(zip((p.name for p in kernel.params if not p.is_constexpr), launch.args, strict=True))
    result = Source({}, {}, {})
    for place, p in enumerate(kernel.params):
        kind, known = "constexpr", None
        if not p.is_constexpr:
            specialize = (not p.do_not_specialize, not p.do_not_specialize_on_alignment)
            kind, known = native_specialize_impl(backend, given[p.name], p.is_const, *specialize)
        result.signature[p.name] = kind
        if kind == "constexpr":
            result.constants[p.name] = launch.constants[p.name] if p.is_constexpr else given[p.name]
        elif isinstance(known, str) and known:
            result.attributes[(place,)] = backend.parse_attr(known)
    return result


def values(launch: Any, arch: str) -> dict[str, str]:
    """Everything but the kernel that the code of ``launch`` depends on, in words: ``stride=1``, ``M: i32 of 16``."""
    found = source(launch, arch)
    words = {}
    for place, (name, kind) in enumerate(found.signature.items()):
        known = "".join(f" of {value}" for _, value in found.attributes.get((place,), ()))
        words[name] = f"{name}={found.constants[name]}" if kind == "constexpr" else f"{name}: {kind}{known}"
    return words | {name: f"{name}={value}" for name, value in launch.options.items()}


def compile_launch(launch: Any, arch: str) -> Any:
    """``launch``'s kernel, compiled as Triton would to launch it on ``arch``."""
    built = ASTSource(launch.kernel, *source(launch, arch))
    return triton.compile(built, target=target(arch), options={"enable_fp_fusion": True, **launch.options})


def source_digest(launch: Any, arch: str) -> str:
    """A digest of the input of :func:`compile_launch`, which takes no time: equal digests mean equal code."""
    return _digest(launch, arch, ASTSource(launch.kernel, *source(launch, arch)).hash())


def code_digest(launch: Any, arch: str) -> str:
    """A digest of the intermediate code of ``launch`` after inlining: equal digests mean equal code. It takes 0.1 to 0.2 s.

    Edits that leave the code of a variant as it was, such as an argument that the variant does not have, keep its digest.
    """
    backend = make_backend(target(arch))
    options = backend.parse_options({"enable_fp_fusion": True, **launch.options})
    context, stages = ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    built = ASTSource(launch.kernel, *source(launch, arch))
    implementation = backend.get_codegen_implementation(options)
    module = built.make_ir(target(arch), options, implementation, backend.get_module_map(), context)
    backend.add_stages(stages, options, built.language)
    return _digest(launch, arch, stages["ttir"](module, {}).str_nodebug())


def _digest(launch: Any, arch: str, code: str) -> str:
    words = f"{triton.__version__} {arch} {sorted(launch.options.items())} {code}"
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def cuobjdump(cubin: bytes) -> str:
    """Resources and instructions of a cubin, by the tool in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_SASS = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\S+)(?:[^;]*?\b(0x[0-9a-f]+))?[^;]*;")
_SASS_MEMORY = ("LD", "ST", "ATOM", "RED")


def sass_counts(text: str) -> tuple[int, int]:
    """Instructions, and those to memory, of the largest innermost loop that holds matrix instructions; of all where none does."""
    code = [(int(place, 16), op, target) for place, op, target in _SASS.findall(text) if not op.startswith("NOP")]
    places = {place: index for index, (place, _, _) in enumerate(code)}
    having = []
    for end, (_, op, target) in enumerate(code):
        start = places.get(int(target, 16), end) if op.startswith("BRA") and target else end
        if start < end and any("MMA" in op for _, op, _ in code[start : end + 1]):
            having.append((start, end))
    inner = [a for a in having if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in having)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, len(code) - 1))
    ops = [op for _, op, _ in code[start : end + 1] if op != "LDGDEPBAR"]
    return len(ops), sum(op.startswith(_SASS_MEMORY) for op in ops)


_SERIALIZED = re.compile(r"\((C\d+)\)[^\n]*serialized due to (.*?) in (?:the )?function")


def serialized(ptx: str) -> str:
    """Why ptxas lets each WGMMA wait for the one before it, or ``""``: Hopper's matrix units then idle between them."""
    if "wgmma" not in ptx:
        return ""
    # As Triton calls it.
    flags = ["--regAllocOptLevel=2"] if triton.__version__ >= "3.9" else []
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-lineinfo", "-v", *flags, "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return serialization(log)


def serialization(log: str) -> str:
    """The reasons in a log of ptxas, each with its code: ``"C7511 insufficient register resources"``."""
    return "; ".join(sorted({f"{code} {reason}" for code, reason in _SERIALIZED.findall(log)}))


# Fewer are a kernel's scaling, not its product.
FEWEST_FMAS = 32
# Names have the shape and not the types, ``HGMMA.64x256x16``.
_MATRIX = re.compile(r"\b(?:(?:[HI]MMA|[HIQ]GMMA)\.\w+|UTC\w*MMA|v_mfma_[a-z]+\d+_\d+x\d+x\d+)")
_TILE = re.compile(r"cp\.(?:reduce\.)?async\.bulk\.(?!prefetch)[\w.:]*?(shared::\w+|global)\b")
_GCN_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(?:dwordx?(\d*)|b(\d+)|\w*?(short|byte))")


def matrix_instructions(machine: str) -> str:
    """The instructions that compute a kernel's products: the matrix units', or FFMA in numbers; ``""`` for an empty kernel."""
    names, scalar = {*_MATRIX.findall(machine)}, re.findall(r"\bFFMA2?\b", machine)
    return " ".join(sorted(names or ({*scalar} if len(scalar) >= FEWEST_FMAS else ())))


def nvidia_widths(ptx: str) -> tuple[list[int], list[int]]:
    """Bits of each load and of each store: of PTX, whose widths the assembler keeps. Scalars, of one address for all, don't count.

    A copy of a whole tile (TMA) has 128 bits.
    """
    accesses = [access for access in hazards.ptx_accesses(ptx) if access and access.varies]
    loads, stores = ([each.bits for each in accesses if each.store == store] for store in (False, True))
    for end in _TILE.findall(ptx):
        (stores if end == "global" else loads).append(128)
    return loads, stores


def amd_widths(gcn: str) -> tuple[list[int], list[int]]:
    """Bits of each load and of each store by vector instructions; scalars mostly have instructions of their own."""
    bits = [
        (way, {"short": 16, "byte": 8}[part] if part else int(plain) if plain else 32 * int(dwords or 1))
        for way, dwords, plain, part in _GCN_ACCESS.findall(gcn)
    ]
    return [each for way, each in bits if way == "load"], [each for way, each in bits if way == "store"]


def read(compiled: Any) -> dict[str, Any]:
    """The report's columns that come from the code.

    Raises:
        ValueError: the code has a fault of those in ``hazards``.
    """
    asm = compiled.asm
    if "cubin" in asm:
        machine, ptx = cuobjdump(asm["cubin"]), asm["ptx"]
        faults = [*hazards.reloaded_scalars(ptx), *hazards.store_round_trips(ptx), *hazards.short_buffers(asm["ttgir"])]
        found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", machine))
        # Some code reserves a stack that it does not use.
        spills = (int(found["STACK"]) + int(found["LOCAL"])) * bool(re.search(r"\b(?:STL|LDL)\b", machine))
        registers, reason, widths = found["REG"], serialized(ptx), nvidia_widths(ptx)
    else:
        machine = asm["amdgcn"]
        faults = [*hazards.early_counts(machine)]
        found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", machine))
        spills, registers = int(found["private_segment_fixed_size"]), found["vgpr_count"]
        reason, widths = "", amd_widths(machine)
    if faults:
        raise ValueError("; ".join(faults))
    load_bits, store_bits = (round(sum(bits) / len(bits)) if bits else 0 for bits in widths)
    return {
        "registers": int(registers),
        "spills": spills,
        "mma": matrix_instructions(machine) if "tt.dot" in asm["ttir"] else "",
        "serialized": reason,
        "load_bits": load_bits,
        "store_bits": store_bits,
    }
