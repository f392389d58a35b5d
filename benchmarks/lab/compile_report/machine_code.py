"""Compiling one launch for a GPU that need not be present, and reading the resulting machine code.

The report gives the narrowest *hot* access. An access is hot if:

- It reaches global memory, and its address differs between the threads of a program. That leaves out what all threads read
  alike: table entries, seeds, counters, hyper-parameters. It is found by following the thread's number from register to
  register through the code. An access of a whole tile (TMA) counts as 128 bits. Atomics don't count.
- Loads: in a kernel with matrix products, those in the innermost loops that hold them, and in innermost loops that issue TMA;
  of these loops, those that move at least half as many bytes a round as the one that moves most. In any other kernel those
  outside loops, where an elementwise kernel has its tiles, or all if there are none.
- Stores: all.
- Of these the narrowest are dropped that together are less than a twentieth of the bytes a thread moves by the text of the
  code, each instruction counted once and a TMA as 64 bytes.

A kernel that has no such access has 0 bits. On NVIDIA's GPUs accesses and loops are read from PTX, whose widths the assembler
keeps; registers, spills and matrix instructions are read from the machine code.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import dropwhile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import ir, native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from benchmarks.lab.compile_report import hazards
from benchmarks.lab.compile_report.assembly import GCN_THREAD, PTX_THREAD, Access, Code, parse_gcn, parse_ptx

SCRAPS = 1 / 20
TMA_BYTES = 64


class Loop(NamedTuple):
    """By places in the code."""

    head: int
    body: frozenset[int]


def loops(code: Code) -> list[Loop]:
    """All loops; those that begin at the same place are one."""
    after = [_successors(code, place) for place in range(len(code))]
    before: dict[int, list[int]] = defaultdict(list)
    for place, places in enumerate(after):
        for successor in places:
            before[successor].append(place)
    tails: dict[int, list[int]] = defaultdict(list)
    for place, successor in _back_edges(after):
        tails[successor].append(place)
    found = []
    for head, ends in tails.items():
        body, todo = {head}, list(ends)
        while todo:
            place = todo.pop()
            if place not in body:
                body.add(place)
                todo += before[place]
        found.append(Loop(head, frozenset(body)))
    return found


def _successors(code: Code, place: int) -> tuple[int, ...]:
    instruction = code[place]
    following = (place + 1,) if instruction.continues and place + 1 < len(code) else ()
    return following if instruction.target is None else (*following, instruction.target)


def _back_edges(after: list[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Edges to an instruction that is still open in a depth-first search: in compiled code, those that close loops."""
    state = [0] * len(after)
    # Code that only an indirect jump or a call reaches is searched from its own first instruction.
    for root in range(len(after)):
        if state[root]:
            continue
        state[root] = 1
        path: list[tuple[int, Iterator[int]]] = [(root, iter(after[root]))]
        while path:
            place, rest = path[-1]
            successor = next(rest, None)
            if successor is None:
                state[place] = 2
                path.pop()
            elif state[successor] == 1:
                yield place, successor
            elif state[successor] == 0:
                state[successor] = 1
                path.append((successor, iter(after[successor])))


def varying(code: Code, thread: Iterable[str]) -> list[bool]:
    """For each instruction, whether it accesses memory at an address that is computed from the registers in ``thread``."""
    bit: dict[str, int] = {}
    for name in (*thread, *(name for instruction in code for name in (*instruction.writes, *instruction.reads))):
        bit.setdefault(name, 1 << len(bit))

    def mask(names: Iterable[str]) -> int:
        return sum(bit[name] for name in set(names))

    start = mask(thread)
    writes = [mask(instruction.writes) for instruction in code]
    reads = [mask(instruction.reads) for instruction in code]
    # A register that nothing writes keeps its value in unreachable code, too.
    fixed = start & ~mask(name for instruction in code for name in instruction.writes)
    known = [start, *[fixed] * (len(code) - 1)]
    seen = [False] * len(code)
    todo = list(range(len(code) - 1, -1, -1))
    while todo:
        place = todo.pop()
        if seen[place]:
            continue
        seen[place] = True
        state = known[place]
        if state & reads[place]:
            state |= writes[place]
        elif code[place].certain:
            state &= ~writes[place]
        for successor in _successors(code, place):
            if state & ~known[successor]:
                known[successor] |= state
                seen[successor] = False
                todo.append(successor)
    return [
        instruction.access is not None and any(bit.get(name, 0) & state for name in instruction.access.address)
        for instruction, state in zip(code, known, strict=True)
    ]


# Names in machine code, and in PTX.
_MATRIX = re.compile(r"\b(?:(?:[HI]MMA|[HIQ]GMMA)\.\w+|UTC\w*MMA|v_mfma_[a-z]+\d+_\d+x\d+x\d+)")
_FMA = re.compile(r"\b(?:FFMA2?|v_(?:pk_)?fmac?_f32|v_dot\w+)")
_MATRIX_OPS = re.compile(r"wgmma\.mma|mma\.sync|tcgen05\.mma|v_mfma")
_FMA_OPS = re.compile(r"fma\.rn\.f32|v_(?:pk_)?fmac?_f32|v_dot")


def products(machine: str, code: Code) -> tuple[str, list[Loop]]:
    """The instructions that compute a kernel's matrix products, and the innermost loops with them.

    Names have the shape and not the types, ``HGMMA.64x256x16``; where there are no matrix instructions, FFMA or the like.
    """
    names = set(_MATRIX.findall(machine))
    pattern = _MATRIX_OPS if names else _FMA_OPS
    inner = _innermost(loops(code), {place for place, instruction in enumerate(code) if pattern.match(instruction.op)})
    if inner and not names:
        names = set(_FMA.findall(machine))
    return " ".join(sorted(names)), inner


def _innermost(found: list[Loop], marked: set[int]) -> list[Loop]:
    having = [loop for loop in found if loop.body & marked]
    return [loop for loop in having if not any(other.body < loop.body for other in having)]


def hot_bits(code: Code, thread: Iterable[str], inner: list[Loop]) -> tuple[int, int]:
    """The narrowest hot load and store, in bits; ``inner``: the loops of the matrix products, empty where there are none."""
    loads, stores = {}, []
    for place, (instruction, varies) in enumerate(zip(code, varying(code, thread), strict=True)):
        access = instruction.access
        if access is not None and access.store and (varies or access.tile):
            stores.append(access)
        elif access is not None and (varies or access.tile):
            loads[place] = access
    found = loops(code)
    if inner:
        inner = inner + _innermost(found, {place for place, access in loads.items() if access.tile})
        rounds = [[loads[p] for p in sorted(loads.keys() & loop.body)] for loop in inner]
        most = max(sum(map(_moved, accesses)) for accesses in rounds)
        hot = [access for accesses in rounds if 2 * sum(map(_moved, accesses)) >= most for access in accesses]
    else:
        outside = [access for place, access in loads.items() if not any(place in loop.body for loop in found)]
        hot = outside or list(loads.values())
    return _narrowest(hot), _narrowest(stores)


def _moved(access: Access) -> int:
    return TMA_BYTES if access.tile else access.bits // 8


def _narrowest(accesses: Iterable[Access]) -> int:
    moved: dict[int, int] = defaultdict(int)
    for access in accesses:
        moved[access.bits] += _moved(access)
    total, passed = sum(moved.values()), 0
    for bits in sorted(moved):
        passed += moved[bits]
        if passed >= total * SCRAPS:
            return bits
    return 0


# One launch.


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


def sass_resources(text: str) -> dict[str, int]:
    """Registers a thread and bytes spilled: of its stack where the code uses local memory, 0 where it only reserves some."""
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    spills = re.search(r"\b(?:STL|LDL)\b", text) is not None
    return {"registers": int(found["REG"]), "spills": spills * (int(found["STACK"]) + int(found["LOCAL"]))}


def gcn_resources(text: str) -> dict[str, int]:
    """Vector registers a thread, accumulation registers included, and bytes of scratch memory."""
    found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
    return {"registers": int(found["vgpr_count"]), "spills": int(found["private_segment_fixed_size"])}


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


_GCN_WAIT = re.compile(r"s_waitcnt\b.*\bvmcnt\(0\)")
_GCN_STORE = re.compile(r"(?:buffer|global)_store_")


def early_counts(gcn: str) -> int:
    """Atomics that publish stores of the whole program, but behind a barrier before which waves do not wait for theirs."""
    lines = [line.split(";")[0].strip() for line in gcn.splitlines()]
    early = 0
    for place, line in enumerate(lines):
        if not line.startswith("global_atomic_add"):
            continue
        before = iter(lines[place::-1])
        # Past the barriers, two in a row.
        behind = dropwhile(lambda line: line != "s_barrier", before)
        first = next((line for line in behind if _GCN_WAIT.match(line) or _GCN_STORE.match(line)), "")
        early += bool(_GCN_STORE.match(first))
    return early


def read(compiled: Any) -> dict[str, Any]:
    """The report's columns that come from the code.

    Raises:
        ValueError: the code has a fault of those in ``hazards``, or AMD's publishes what it has not stored yet.
    """
    reason = ""
    if "cubin" in compiled.asm:
        reason = serialized(compiled.asm["ptx"])
        machine = cuobjdump(compiled.asm["cubin"])
        code, thread, resources = parse_ptx(compiled.asm["ptx"]), PTX_THREAD, sass_resources(machine)
        if faults := hazards.faults(code, varying(code, thread), compiled.asm):
            raise ValueError("; ".join(faults))
    else:
        machine = compiled.asm["amdgcn"]
        if early := early_counts(machine):
            raise ValueError(f"{early} atomics publish stores that other waves have not waited for")
        code, thread, resources = parse_gcn(machine), GCN_THREAD, gcn_resources(machine)
    mma, inner = products(machine, code) if "tt.dot" in compiled.asm["ttir"] else ("", [])
    load_bits, store_bits = hot_bits(code, thread, inner)
    return {**resources, "mma": mma, "serialized": reason, "load_bits": load_bits, "store_bits": store_bits}
