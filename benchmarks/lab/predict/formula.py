"""Bytes that each kernel moves, by formula: ``counter`` counts the same in Triton's interpreter and explains the terms."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
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


# The arguments of a launch, by name: "x" for x_ptr and x_desc. One tensor given as two arguments is "da=db".
Tensors = dict[str, Traffic]
# X, Y, dY and dX, under the names that the kernels have for them; "z" is X beside dX, "both dX" autograd's sum of two.
ACTIVATIONS = frozenset({"x", "y", "dy", "z", "both dX"})


def total(parts: Iterable[Traffic]) -> Traffic:
    return Traffic(*map(sum, zip(Traffic(), *parts, strict=True)))


def activation_bytes(tensors: Tensors) -> int:
    """Unique bytes of X, Y, dY and dX; S and dS, of r columns, are none of them."""
    return sum(traffic.unique for name, traffic in tensors.items() if ACTIVATIONS & set(name.split("=")))


def arguments_of(launch: Any) -> dict[str, Any]:
    """The arguments and constants of a launch, by name."""
    if not hasattr(launch, "kernel"):
        return dict(launch._asdict())
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants


def named_tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among a launch's arguments, descriptors' included."""
    found: dict[int, tuple[Tensor, dict[str, None]]] = {}
    for name, value in arguments.items():
        tensor = value if isinstance(value, Tensor) else getattr(value, "base", None)
        if tensor is not None:
            names = found.setdefault(id(tensor), (tensor, {}))[1]
            names[re.sub("_(ptr_or_desc|ptr|desc)$", "", name)] = None
    return {"=".join(names): tensor for tensor, names in found.values()}


# The kernels.


def _distinct(t: Tensor) -> int:
    """Elements of ``t`` in memory, where a dimension of stride 0 repeats them."""
    return math.prod(size if stride or not size else 1 for size, stride in zip(t.shape, t.stride(), strict=True))


class _Account:
    """Adds up what a launch moves, by tensor. An argument that is None moves nothing; what is touched again is not unique."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.by_name = {name: (key, t) for key, t in named_tensors(arguments).items() for name in key.split("=")}
        self.tensors: Tensors = {}

    def add(self, name: str, read: int = 0, written: int = 0, touched: int = 0) -> None:
        """Elements that all programs together read and write, and how many of the tensor they touch: all unless given."""
        if name in self.by_name and read + written:
            key, t = self.by_name[name]
            size, was = t.element_size(), self.tensors.get(key, Traffic())
            unique = size * (touched or _distinct(t))
            self.tensors[key] = Traffic(
                was.read_issued + size * read,
                was.written_issued + size * written,
                max(was.read_unique, unique * (read > 0)),
                max(was.written_unique, unique * (written > 0)),
            )

    def read(self, **times: int) -> None:
        """All of each tensor, so many times."""
        for name in times.keys() & self.by_name.keys():
            self.add(name, read=times[name] * self.by_name[name][1].numel())

    def write(self, *names: str) -> None:
        for name in self.by_name.keys() & names:
            self.add(name, written=self.by_name[name][1].numel())

    def share(self, splits: int, part: float = 1, prefix: str = "") -> None:
        """A sum that ``splits`` programs share: stored, read, and counted; ``part`` of its memory is used."""
        if splits > 1:
            parts = round(self.by_name[f"{prefix}partial"][1].numel() * part)
            self.add(f"{prefix}partial", parts, parts, parts)
            counters = self.by_name[f"{prefix}counter"][1].numel()
            # The last program sets them back to 0.
            self.add(f"{prefix}counter", splits * counters, (splits + 1) * counters)

    def grad_beside(self, z: str, t: str, columns: int, c: dict[str, Any], name: str = "grad") -> int:
        """dA or dB, of ``columns`` columns, beside another result; the programs that compute it."""
        tiles_c, tiles_r = cdiv(columns, c[f"{name.upper()}_C"]), cdiv(c["R"], c[f"{name.upper()}_R"])
        splits = c[f"{name.upper()}_SPLITS"]
        self.read(**{z: tiles_r, t: tiles_c})
        self.share(splits, prefix=f"{name}_")
        self.write(name)
        return tiles_c * tiles_r * splits


def formula_by_tensor(launch: Any) -> Tensors:
    """The bytes of each tensor in a launch, without running it; tensors may be on the meta device.

    One that is neither ours nor the vendor's counts as a read of all of its ``bytes``.
    """
    if hasattr(launch, "bytes"):
        return {launch.name: Traffic(int(launch.bytes), 0, int(launch.bytes), 0)}
    arguments = arguments_of(launch)
    account = _Account(arguments)
    if hasattr(launch, "kernel"):
        _FORMULAS[launch.kernel.__name__](account, arguments | {"GRID": launch.grid})
        return account.tensors
    account.read(x=1, w=1, bias=1, y=int(launch.add))
    account.write("y")
    return account.tensors


def formula(launch: Any) -> Traffic:
    """The bytes of a launch of ``lora_linear``, without running it."""
    return total(formula_by_tensor(launch).values())


def _shrink(t: _Account, c: dict[str, Any]) -> None:
    tiles_m, tiles_r = cdiv(c["M"], c["BLOCK_M"]), cdiv(c["R"], c["BLOCK_R"])
    t.read(x=tiles_r, a=tiles_m, seed=tiles_m * tiles_r * c["SPLITS"])
    t.share(c["SPLITS"])
    t.write("s")
    if c["HAS_GRAD"]:
        t.grad_beside("x", "t", c["K"], c)


def _chain(t: _Account, c: dict[str, Any]) -> None:
    """S and dB by programs of the product's launch, and what keeps the programs in order."""
    tiles_s, tiles_r = cdiv(c["M"], c["S_BLOCK_M"]), cdiv(c["R"], c["S_BLOCK_R"])
    t.read(x=tiles_r, a=tiles_s, seed=tiles_s * tiles_r * c["S_SPLITS"] * c["S_DROPOUT"])
    t.share(c["S_SPLITS"], prefix="s_")
    t.write("s")
    if c["HAS_DB"]:
        t.grad_beside("x", "t", c["K"], c, name="db")
    # A flag is awaited for each tile of Y, and by each program of dA for all of its rows.
    waits = cdiv(c["M"], c["BLOCK_M"]) * cdiv(c["N"], c["BLOCK_N"]) if c["PRODUCTS"] else 0
    if c["HAS_GRAD"]:
        rows = cdiv(cdiv(c["M"], c["GRAD_M"]), c["GRAD_SPLITS"]) * c["GRAD_M"]
        each = (cdiv(min(start + rows, c["M"]), c["FLAG_M"]) - start // c["FLAG_M"] for start in range(0, c["M"], rows))
        waits += cdiv(c["N"], c["GRAD_C"]) * cdiv(c["R"], c["GRAD_R"]) * sum(each)
    # Integers: tickets, programs done, tiles of S; a wait loads its flag, then acquires it; the last program writes zeros.
    counted, used = 2 * c["GRID"][0] + tiles_s * tiles_r, 2 + cdiv(c["M"], c["FLAG_M"])
    t.add("chain", counted + 2 * waits, counted + waits + used, used)


def _linear(t: _Account, c: dict[str, Any]) -> None:
    """The product by any of the three kernels."""
    if c["CHAINED"]:
        _chain(t, c)
    if c["PRODUCTS"]:
        _product(t, c)
    if c["HAS_GRAD"]:
        programs = t.grad_beside("z", "s", c["N"], c)
        t.read(seed=programs * c["MASK_BRANCH"], u=cdiv(c["R"], c["GRAD_R"]))


def _product(t: _Account, c: dict[str, Any]) -> None:
    tiles_m, tiles_n = cdiv(c["M"], c["BLOCK_M"]), cdiv(c["N"], c["BLOCK_N"])
    # The descriptors' kernel finishes a tile in parts. With a mask, each part reads S and the seed, also beyond N.
    parts = c["BLOCK_N"] // c["y_desc"].block_shape[1] if "y_desc" in c and c["MASK_BRANCH"] else 1
    if c.get("HAS_W", True):
        t.read(x=tiles_n, w=tiles_m)
    t.read(bias=tiles_m, b=tiles_m, seed=tiles_m * tiles_n * parts * c["MASK_BRANCH"], y=int(c["ADD"]))
    t.write("y", *(("s",) if c["STORE_S"] else ()))
    if c["LOAD_S"]:
        t.read(s=tiles_n * parts)
    else:
        t.read(a=tiles_m * tiles_n)
    if "SPLITS" in c:
        # The scratch for S's sum stays empty if S is read, and the scratch for rows beyond M always.
        columns = c["BLOCK_N"] + (0 if c["LOAD_S"] else c["BLOCK_R"])
        t.share(c["SPLITS"], c["M"] * columns / (tiles_m * c["BLOCK_M"] * (c["BLOCK_N"] + c["BLOCK_R"])))
    if c["GATE"]:
        t.read(z=1, u=1)
        t.write("du")


def _weight(t: _Account, c: dict[str, Any], n: int, k: int, rows: int, cols: int, times: int) -> None:
    """A quantized W, stored as [n, k], dequantized ``times`` times over in tiles of ``rows`` by ``cols``.

    Every value of a code is taken to occur.
    """
    tiles_k = cdiv(k, cols)
    tiles = cdiv(n, rows) * tiles_k * times
    if not c["NF4"]:
        t.read(q=times)
        t.add("scale", n * tiles_k * times)
        return
    if c["ALIGNED"]:
        t.read(q=times)
        # A row of a tile has this many scales. Scales beyond k are not read, but their code values are looked up.
        in_tile = max(cols // c["BLOCKSIZE"], 1)
        scales = n * (k // c["BLOCKSIZE"] if cols >= c["BLOCKSIZE"] else tiles_k) * times
    else:
        # A byte, a scale an element.
        t.add("q", n * k * times)
        in_tile, scales = cols, n * k * times
    t.add("code", tiles * rows * cols)
    t.add("scale", scales)
    t.add("nested_scale", scales)
    t.add("nested_code", tiles * rows * in_tile)
    t.add("offset", tiles)


def _quantized(t: _Account, c: dict[str, Any]) -> None:
    """The product that dequantizes W in its loop."""
    tiles_m, tiles_n = cdiv(c["M"], c["BLOCK_M"]), cdiv(c["N"], c["BLOCK_N"])
    t.read(x=tiles_n, bias=tiles_m, b=tiles_m, s=tiles_n, seed=tiles_m * tiles_n)
    stored = [c["N"], c["K"]], [c["BLOCK_N"], c["BLOCK_K"]]
    sizes, tile = (pair[::-1] if c["TRANS_W"] else pair for pair in stored)
    _weight(t, c | {"ALIGNED": True}, *sizes, *tile, times=tiles_m)
    t.share(c["SPLITS"])
    t.write("y")


def _dequantize(t: _Account, c: dict[str, Any]) -> None:
    _weight(t, c, c["N"], c["K"], c["BLOCK_N"], c["BLOCK_K"], times=1)
    t.write("w")


def _branch(t: _Account, c: dict[str, Any]) -> None:
    tiles_m, shares = c["GRID"]
    t.read(b=tiles_m, seed=tiles_m * shares, base=1, y=int(c["IN_PLACE"]), g=1, u=1)
    t.write("y", "du", *(("s",) if c["STORE_S"] else ()))
    if c["LOAD_S"]:
        t.read(s=cdiv(c["N"], c["BLOCK_N"]))
    else:
        t.read(x=shares, a=tiles_m * shares)


def _grads(t: _Account, c: dict[str, Any]) -> None:
    tiles_r, splits = cdiv(c["R"], c["BLOCK_R"]), c["SPLITS"]
    tiles_a, tiles_b = cdiv(c["K"], c["BLOCK_C"]), cdiv(c["N"], c["BLOCK_C"])
    if c["PROGRAMS_A"]:
        t.read(x=tiles_r, u=tiles_r, ds=tiles_a)
        t.write("da")
    if c["GRID"][0] > c["PROGRAMS_A"]:
        t.read(dy=tiles_r, s=tiles_b)
        t.write("db")
    t.read(seed=tiles_a * tiles_r * splits)
    t.share(splits)


def _gate_up(t: _Account, c: dict[str, Any]) -> None:
    """Gate and up by either kernel. S_g and S_u are columns of one matrix."""
    tiles_m, tiles_n = cdiv(c["M"], c["BLOCK_M"]), cdiv(c["N"], c["BLOCK_N"])
    t.read(x=tiles_n, **dict.fromkeys(("wg", "wu", "bias_g", "bias_u", "bg", "bu"), tiles_m))
    s = c["M"] * (c["R_G"] + c["R_U"])
    t.add("sg", read=tiles_n * s, touched=s)
    t.write("h", *(("g", "u") if c["STORE_GU"] else ()))


def _gated_activation(t: _Account, c: dict[str, Any]) -> None:
    t.read(g=1, u=1)
    t.write("h")


def _group(t: _Account, c: dict[str, Any]) -> None:
    """S of projections that share X, or their dA. S and dS are columns of one matrix, of which the first's are given."""
    members, tiles = range(c["MEMBERS"]), cdiv(c["K"], c["BLOCK_C"]) if "BLOCK_C" in c else cdiv(c["M"], c["BLOCK_M"])
    s = c["M"] * sum(c[f"R{i}"] for i in members)
    t.read(x=1, **{f"a{i}": tiles for i in members}, **{f"seed{i}": tiles * c["SPLITS"] for i in members})
    t.add("s", written=s, touched=s)
    t.add("ds", read=tiles * s, touched=s)
    t.write(*(f"da{i}" for i in members))
    t.share(c["SPLITS"])


_FORMULAS = {
    "_lora_shrink_group_kernel": _group,
    "_lora_weight_grads_group_kernel": _group,
    "_lora_gate_up_kernel": _gate_up,
    "_lora_gate_up_tma_kernel": _gate_up,
    "_gated_activation_kernel": _gated_activation,
    "_lora_shrink_kernel": _shrink,
    "_lora_linear_kernel": _linear,
    "_lora_linear_split_k_kernel": _linear,
    "_lora_linear_tma_kernel": _linear,
    "_lora_linear_quantized_kernel": _quantized,
    "_dequantize_kernel": _dequantize,
    "_lora_expand_kernel": _branch,
    "_lora_weight_grads_kernel": _grads,
}
