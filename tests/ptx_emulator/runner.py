"""Run launches on the emulator: compile each to PTX, lay out its parameters, and give kernels the
process's own memory.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.lab.compile_report.machine_code import source, source_digest, target
from stablelora_kernels.launch.base import Launch, leaves
from tests.ptx_emulator.machine import LaunchState, Machine, Schedule
from tests.ptx_emulator.memory import Faults, global_memory
from tests.ptx_emulator.parse import parse
from tests.ptx_emulator.program import CompiledProgram
from tests.ptx_emulator.tma import TensorMap

# PTX by the digest of its source.
CACHE = Path(
    os.environ.get("PTX_EMULATOR_CACHE") or Path(__file__).parents[2] / ".build" / "ptx_emulator"
)
# Farther apart than this, in bytes, rows are pieces of memory of their own.
FAR = 2**28
_programs: dict[str, CompiledProgram] = {}
# Changes the PTX before it runs, see ``plants``.
edits: list[Callable[[str, str], str]] = []
Piece = tuple[int, int, str]


class Compiled(NamedTuple):
    """The kernel's name and PTX, Triton's metadata, and the types of its arguments' leaves,
    "constexpr" of constants.
    """

    name: str
    ptx: str
    metadata: dict[str, Any]
    types: list[str]


def compile_to_ptx(launch: Launch, arch: str) -> Compiled:
    """As Triton compiles ``launch`` for ``arch``, without ptxas, which needs most of the time."""
    path = CACHE / f"{launch.kernel.__name__}-{source_digest(launch, arch)}.pickle"
    if path.exists():
        return Compiled(*pickle.loads(path.read_bytes()))
    backend, (built, options) = make_backend(target(arch)), source(launch, arch)
    metadata: dict[str, Any] = {"target": target(arch), **options.__dict__}
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, built.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation = backend.get_codegen_implementation(options)
    module = built.make_ir(target(arch), options, implementation, backend.get_module_map(), context)
    for name, stage in stages.items():
        if name != "cubin":
            module = stage(module, metadata)
    kept = {
        name: metadata.get(name)
        for name in ("name", "num_warps", "shared", "tensordesc_meta", "global_scratch_size")
    }
    # In the order of the arguments' leaves; behind them are the constants.
    types = [*leaves(tuple(built.signature.values()))]
    result = Compiled(kept["name"], str(module), kept, types)
    CACHE.mkdir(parents=True, exist_ok=True)
    # Several processes may compile the same kernel.
    scrap = path.with_suffix(f".{os.getpid()}")
    scrap.write_bytes(pickle.dumps(tuple(result)))
    scrap.replace(path)
    return result


def program_of(compiled: Compiled) -> CompiledProgram:
    ptx = compiled.ptx
    for edit in edits:
        ptx = edit(compiled.name, ptx)
    if ptx not in _programs:
        program = parse(ptx)
        program.threads = program.threads or 32 * compiled.metadata["num_warps"]
        _programs[ptx] = CompiledProgram(program)
    return _programs[ptx]


def extent(t: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if not t.numel():
        return 0
    return (
        sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    ) * t.element_size()


def pieces(t: Tensor, name: str) -> list[Piece]:
    """The tensor's memory; of one whose rows or columns lie far apart, each of them."""
    if t.dim() == 2 and extent(t) > FAR:
        lines = t if t.stride(0) >= t.stride(1) else t.t()
        return [(line.data_ptr(), extent(line), name) for line in lines]
    return [(t.data_ptr(), extent(t), name)]


def parameters(
    launch: Launch, compiled: Compiled, program: CompiledProgram
) -> tuple[bytes, dict[int, TensorMap], list[Piece]]:
    """The bytes of a launch's parameters, its tensor maps by their places among them, and the
    memory that they name.
    """
    layouts = iter(compiled.metadata["tensordesc_meta"] or ())
    memory: list[Piece] = []
    # Triton's own arguments, in the order of the parameters.
    values: list[tuple[Any, str]] = []
    for (name, value), kind in zip(launch.named.items(), compiled.types, strict=False):
        if kind == "constexpr":
            continue
        if isinstance(value, Tensor):
            memory += pieces(value, name)
            values.append((value.data_ptr(), kind))
        elif isinstance(value, TensorDescriptor):
            memory += pieces(value.base, name)
            values.append((_tensor_map(value, next(layouts)), kind))
            values += [(number, "i64") for number in (*value.shape, *value.strides)]
        else:
            values.append((value, kind))
    data, maps = bytearray(max(p.offset + p.size for p in program.params)), {}
    # Triton has more parameters, for memory of its own, which no kernel here has.
    for param, (value, kind) in zip(program.params, values, strict=False):
        if isinstance(value, TensorMap):
            maps[param.offset] = value
            continue
        packed = (
            struct.pack("<f", value)
            if kind == "fp32"
            else (int(value) % (1 << 8 * param.size)).to_bytes(param.size, "little")
        )
        data[param.offset : param.offset + param.size] = packed
    return bytes(data), maps, memory


def _tensor_map(descriptor: TensorDescriptor, layout: dict[str, Any]) -> TensorMap:
    base, size = descriptor.base, layout["elem_size"]
    rows, columns = descriptor.shape
    return TensorMap(
        base.data_ptr(), (rows, columns), size, descriptor.strides[0] * size, tuple(layout["block_size"]), layout["swizzle"],
        descriptor.padding == "nan",
    )  # fmt: skip


def run(launch: Launch, schedule: Schedule, more: Iterable[tuple[Tensor, str]] = ()) -> Faults:
    """Run ``launch``. ``more``: tensors that the kernel reaches by tables of addresses."""
    memory = [piece for t, name in more for piece in pieces(t, name)]
    compiled = compile_to_ptx(launch, schedule.arch)
    if compiled.metadata["global_scratch_size"]:
        raise NotImplementedError(
            f"the PTX emulator has no global scratch memory for {compiled.name}"
        )
    program = program_of(compiled)
    data, maps, named = parameters(launch, compiled, program)
    grid = (*launch.grid, 1, 1)[:3]
    state = LaunchState(program, compiled.name, grid, data, compiled.metadata["shared"] or 0, maps)
    machine = Machine(global_memory(memory + named, program.global_granule), state, schedule)
    machine.run()
    return machine.faults
