"""Bytes that a launch moves, by one formula for each of its jobs (``kernels/lora/jobs.py``).

``tests/benchmarks/lab/byte_counter.py`` counts the same in Triton's interpreter and explains the
terms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from stablelora_kernels.dispatch.problem import cdiv


class Traffic(NamedTuple):
    """Bytes."""

    read_issued: int = 0
    written_issued: int = 0
    read_unique: int = 0
    written_unique: int = 0

    @property
    def issued(self) -> int:
        return self.read_issued + self.written_issued

    @property
    def unique(self) -> int:
        return self.read_unique + self.written_unique


# The memory of a launch, by its arguments' names: "x=dy" for what is given as x_desc, or x.ptr, and
# as dy.ptr.
Tensors = dict[str, Traffic]
# X, Y, dY and dX, under the names that the kernels have for them; "z" is X of dA and dY of dB,
# "both dX" autograd's sum of two.
ACTIVATIONS = frozenset({"x", "y", "z", "both dX"})
# What a launch may do: S or dS, dB, the product with its branch, dA.
JOBS = ("S", "DB", "Y", "DA")


def total(parts: Iterable[Traffic]) -> Traffic:
    return Traffic(*map(sum, zip(Traffic(), *parts, strict=True)))


def activation_bytes(tensors: Tensors) -> int:
    """Unique bytes of X, Y, dY and dX; S and dS, of r columns, are none of them."""
    return sum(
        traffic.unique
        for names, traffic in tensors.items()
        if any(name.rpartition(".")[2] in ACTIVATIONS for name in names.split("="))
    )


def named_tensors(named: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among a launch's named arguments, descriptors' included. Views of one memory are
    one tensor.
    """
    found: dict[int, tuple[Tensor, dict[str, None]]] = {}
    for name, value in named.items():
        if (tensor := _tensor(value)) is not None:
            names = found.setdefault(_memory(tensor), (tensor, {}))[1]
            names[re.sub("(_ptr|_desc|[.]ptr)$", "", name)] = None
    return {"=".join(names): tensor for tensor, names in found.values()}


def _tensor(value: Any) -> Tensor | None:
    """The tensor in a descriptor, or behind the pointer of a job's ``Matrix`` or ``Rows``."""
    value = getattr(value, "ptr", getattr(value, "base", value))
    return value if isinstance(value, Tensor) else None


def _memory(t: Tensor) -> int:
    """A number that only views of one memory share, on the meta device too."""
    return t.untyped_storage()._cdata


def _distinct(t: Tensor) -> int:
    """Elements of ``t`` in memory, where a dimension of stride 0 repeats them."""
    return math.prod(
        size if stride or not size else 1 for size, stride in zip(t.shape, t.stride(), strict=True)
    )


class _Account:
    """Adds up what a launch moves, by memory and place in it. None moves nothing; what is touched
    again is not unique.
    """

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], Traffic] = {}

    def add(self, operand: Any, read: int = 0, written: int = 0, touched: int = 0) -> None:
        """Elements that all programs together read and write, and how many of the tensor they
        touch: all unless given.
        """
        if (t := _tensor(operand)) is not None and read + written:
            place, size = (_memory(t), int(t.storage_offset())), t.element_size()
            was, unique = self.places.get(place, Traffic()), size * (touched or _distinct(t))
            self.places[place] = Traffic(
                was.read_issued + size * read,
                was.written_issued + size * written,
                max(was.read_unique, unique * (read > 0)),
                max(was.written_unique, unique * (written > 0)),
            )

    def read(self, *operands: Any, times: int = 1) -> None:
        """All of each tensor, so many times."""
        for t in map(_tensor, operands):
            self.add(t, read=0 if t is None else times * t.numel())

    def write(self, *operands: Any) -> None:
        for t in map(_tensor, operands):
            self.add(t, written=0 if t is None else t.numel())

    def share(self, parts: Tensor, counter: Tensor, splits: int, used: float = 1) -> None:
        """A sum that ``splits`` programs share: stored, read, and counted; of its memory this share
        is ``used``.
        """
        if splits > 1:
            elements = round(parts.numel() * used)
            self.add(parts, elements, elements, elements)
            # The last program sets them back to 0.
            self.add(counter, splits * counter.numel(), (splits + 1) * counter.numel())

    def of(self, t: Tensor) -> list[Traffic]:
        """What moves in the memory of ``t``."""
        return [traffic for (memory, _), traffic in self.places.items() if memory == _memory(t)]


def formula_by_tensor(launch: Any, jobs: Collection[str] = JOBS) -> Tensors:
    """The bytes of each tensor in a launch, or in those of its JOBS, without running it; tensors
    may be on the meta device.

    One that is neither ours nor the vendor's counts as a read of all of its ``bytes``.
    """
    if hasattr(launch, "bytes"):
        return {launch.name: Traffic(int(launch.bytes), 0, int(launch.bytes), 0)}
    account = _Account()
    if not hasattr(launch, "kernel"):
        named = launch._asdict()
        account.read(launch.x, launch.w, launch.bias, launch.y if launch.add else None)
        account.write(launch.y)
    else:
        named, arguments = launch.named, launch.arguments
        _FORMULAS.get(launch.kernel.__name__, _add_jobs)(account, arguments, jobs, launch.grid[0])
    found = {name: account.of(t) for name, t in named_tensors(named).items()}
    return {name: total(traffic) for name, traffic in found.items() if traffic}


def formula(launch: Any, jobs: Collection[str] = JOBS) -> Traffic:
    """The bytes of a launch, or of those of its JOBS, without running it."""
    return total(formula_by_tensor(launch, jobs).values())


def operand(arguments: dict[str, Any], name: str) -> Any:
    """What a kernel takes through a descriptor or a pointer."""
    found = (arguments.get(each) for each in (f"{name}_desc", f"{name}_ptr", name))
    return next(
        (value for each in found if (value := getattr(each, "ptr", each)) is not None), None
    )


def weights(arguments: dict[str, Any]) -> list[Any]:
    """A product's W: none for a branch alone, two for gate and up."""
    return [w for name in ("w", "wg", "wu") if (w := operand(arguments, name)) is not None]


def branches(arguments: dict[str, Any]) -> list[tuple[Any, Any]]:
    """A product's branches, with their constants."""
    names = {"BRANCH": "branch", "BRANCH_G": "branch_g", "BRANCH_U": "branch_u"}
    return [
        (arguments[name], arguments[constants])
        for constants, name in names.items()
        if constants in arguments
    ]


def thin_jobs(arguments: dict[str, Any]) -> dict[str, tuple[Any, Any, Any, int]]:
    """S, dB and dA of a launch: X or Z, what else the kernel takes for each, its tile, and the
    programs that share a sum.
    """
    x, z, dy = (arguments.get(name) for name in ("x", "z", "dy"))
    given = {
        "S": (x, arguments.get("s_job", arguments.get("s"))),
        "DB": (dy or x, arguments.get("db")),
        "DA": (z, arguments.get("da")),
    }
    return {
        name: (read, job, arguments[name], arguments.get(f"{name}_SPLITS", arguments.get("SPLITS")))
        for name, (read, job) in given.items()
        if arguments.get(name) is not None
    }


def _add_jobs(t: _Account, a: dict[str, Any], jobs: Collection[str], programs: int) -> None:
    for name, (read, job, tile, splits) in thin_jobs(a).items():
        if name in jobs:
            (_add_s if name == "S" else _add_grad)(t, a["M"], read, job, tile, splits)
            t.share(job.shared.parts, job.shared.counter, splits)
    if "Y" in jobs and a.get("chain") is not None:
        _add_chain(t, a, programs)
    if "Y" in jobs and "TILE" in a and a.get("PRODUCTS", 1):
        _add_product(t, a)
        if "tickets" in a:
            _add_tickets(t, a)


def _add_s(t: _Account, m: int, x: Any, job: Any, tile: Any, splits: int) -> None:
    """S, or dS, of projections that share X."""
    tiles_m, tiles_r = cdiv(m, tile.BLOCK_M), cdiv(job.members[0].R, tile.BLOCK_R)
    t.read(x, times=tiles_r)
    for member in job.members:
        t.read(member.down, times=tiles_m)
        # Of a seed, programs read the first word.
        t.add(member.seed, read=tiles_m * tiles_r * splits, touched=1)
        if member.mask is not None:
            t.add(member.mask, written=member.mask.numel() * tiles_r)
        t.write(member.s)


def _add_grad(t: _Account, m: int, z: Any, job: Any, tile: Any, _: int) -> None:
    """dA or dB of projections that share Z."""
    tiles_c, tiles_r = cdiv(z.width, tile.BLOCK_C), cdiv(job.members[0].R, tile.BLOCK_R)
    t.read(z, z.u, times=tiles_r)
    for member in job.members:
        t.read(member.t, times=tiles_c)
        t.read(member.mask, times=tiles_r)
        t.write(member.out)


def _add_chain(t: _Account, a: dict[str, Any], programs: int) -> None:
    """What keeps the ``programs`` of a chained launch in order."""
    m, s, da = a["M"], a["S"], a["DA"]
    tiles_s = cdiv(m, s.BLOCK_M) * cdiv(a["s_job"].members[0].R, s.BLOCK_R)
    # A flag is awaited for each tile of Y, and by each program of dA for all of its rows.
    waits = cdiv(m, a["TILE"].BLOCK_M) * cdiv(a["N"], a["TILE"].BLOCK_N) if a["PRODUCTS"] else 0
    if da is not None:
        rows = cdiv(cdiv(m, da.BLOCK_M), a["DA_SPLITS"]) * da.BLOCK_M
        each = (
            cdiv(min(start + rows, m), s.FLAG_M) - start // s.FLAG_M for start in range(0, m, rows)
        )
        waits += cdiv(a["N"], da.BLOCK_C) * cdiv(a["da"].members[0].R, da.BLOCK_R) * sum(each)
    # Integers: tickets, programs done, tiles of S; a wait adds zero to its flag; the last program
    # writes zeros.
    counted, used = 2 * programs + tiles_s, 2 + cdiv(m, s.FLAG_M)
    t.add(a["chain"], counted + waits, counted + waits + used, used)


def _add_tickets(t: _Account, a: dict[str, Any]) -> None:
    """The tickets of a product whose programs draw tiles."""
    tile = a["TILE"]
    tiles = cdiv(a["M"], tile.BLOCK_M) * cdiv(a["N"], tile.BLOCK_N)
    if tiles > a["PRODUCTS"]:
        # One a tile; the last one also sets the counter back.
        t.add(a["tickets"], tiles + 1, tiles + 1, 1)


def _add_product(t: _Account, a: dict[str, Any]) -> None:
    """The product, or gate's and up's, with the branch, and what the epilogue reads and stores."""
    m, n, tile = a["M"], a["N"], a["TILE"]
    tiles_m, tiles_n = cdiv(m, tile.BLOCK_M), cdiv(n, tile.BLOCK_N)
    if "PACKED" in a:
        way = -1 if a["TRANS_W"] else 1
        _add_packed(
            t,
            a["w"],
            a["PACKED"],
            (n, a["K"])[::way],
            (tile.BLOCK_N, tile.BLOCK_K)[::way],
            times=tiles_m,
        )
    else:
        t.read(*weights(a), times=tiles_m)
    if weights(a):
        t.read(operand(a, "x"), times=tiles_n)
    t.read(a.get("bias"), a.get("bias_g"), a.get("bias_u"), times=tiles_m)
    for branch, constants in branches(a):
        # The descriptors' kernel finishes a tile in parts. With a mask, each part reads S, also
        # beyond N.
        parts = 1 if branch.mask is None or "y_desc" not in a else tile.PARTS
        t.read(branch.up, times=tiles_m)
        t.read(branch.mask)
        if constants.LOAD_S:
            # With rank 0 any tensor stands for S.
            t.read(branch.s if branch.R else None, times=tiles_n * parts)
        else:
            t.read(operand(a, "down"), times=tiles_m * tiles_n)
            t.write(branch.s)
    if "parts" in a:
        used = 1.0
        if "PACKED" not in a:
            # The scratch for S's sum stays empty if S is read, and the scratch for rows beyond M
            # always.
            both = tile.BLOCK_N + a["BRANCH"].BLOCK_R
            used = (
                m * (tile.BLOCK_N if a["BRANCH"].LOAD_S else both) / (tiles_m * tile.BLOCK_M * both)
            )
        t.share(a["parts"], a["counter"], a["SPLITS"], used)
    if "BRANCH_G" in a:
        t.write(*(operand(a, name) for name in "guh"))
        return
    if a.get("gate") is not None:
        t.read(a["gate"].g, a["gate"].u)
        t.write(a["gate"].du)
    t.read(operand(a, "y") if getattr(tile, "ADD", False) else a.get("base"))
    t.write(operand(a, "y"))


def _add_packed(
    t: _Account, w: Any, packed: Any, sizes: Sequence[int], tile: Sequence[int], times: int
) -> None:
    """A quantized W, stored in rows and columns of these ``sizes``, dequantized ``times`` times
    over tile by tile.

    Every value of a code is taken to occur.
    """
    (n, k), (rows, cols) = sizes, tile
    tiles_k = cdiv(k, cols)
    tiles = cdiv(n, rows) * tiles_k * times
    if not packed.NF4:
        t.read(w.data, times=times)
        t.add(w.scale, n * tiles_k * times)
        return
    if packed.ALIGNED:
        t.read(w.data, times=times)
        # A row of a tile has this many scales. Scales beyond k are not read, but their code values
        # are looked up.
        in_tile = max(cols // packed.BLOCKSIZE, 1)
        scales = n * (k // packed.BLOCKSIZE if cols >= packed.BLOCKSIZE else tiles_k) * times
    else:
        # A byte, a scale an element.
        t.add(w.data, n * k * times)
        in_tile, scales = cols, n * k * times
    t.add(w.code, tiles * rows * cols)
    t.add(w.scale, scales)
    t.add(w.nested_scale, scales)
    t.add(w.nested_code, tiles * rows * in_tile)
    t.add(w.offset, tiles)


def _add_dequantized(t: _Account, a: dict[str, Any], *_: Any) -> None:
    _add_packed(t, a["w"], a["PACKED"], (a["N"], a["K"]), (a["BLOCK_N"], a["BLOCK_K"]), times=1)
    t.write(a["out_ptr"])


def _add_activation(t: _Account, a: dict[str, Any], *_: Any) -> None:
    t.read(a["g_ptr"], a["u_ptr"])
    t.write(a["h_ptr"])


# Launches without JOBS.
_FORMULAS = {"_dequantize_kernel": _add_dequantized, "_gated_activation_kernel": _add_activation}
