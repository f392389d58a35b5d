"""Bytes that each kernel moves, by formula: ``counter`` counts the same in Triton's interpreter and explains the terms."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
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
    """Adds up a launch's reads and writes, each of a whole tensor a number of times unless elements are given.

    An argument that is None moves nothing.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.by_name = {name: (key, t) for key, t in named_tensors(arguments).items() for name in key.split("=")}
        self.tensors: Tensors = {}

    def _add(self, name: str, issued: int, unique: int, reads: bool, writes: bool) -> None:
        key, t = self.by_name[name]
        if issued:
            moved = (issued * reads, issued * writes, unique * reads, unique * writes)
            more = Traffic(*(elements * t.element_size() for elements in moved))
            self.tensors[key] = total((self.tensors.get(key, Traffic()), more))

    def read(self, name: str, times: int = 1, unique: bool = True, elements: int = 0) -> None:
        """``unique`` is False if the launch has counted the tensor already."""
        if name in self.by_name:
            t = self.by_name[name][1]
            self._add(name, times * (elements or t.numel()), (elements or _distinct(t)) * unique, True, False)

    def look_up(self, name: str, elements: int) -> None:
        """``elements`` loads of single elements, which reach every element of the tensor."""
        if name in self.by_name:
            self._add(name, elements, _distinct(self.by_name[name][1]), True, False)

    def write(self, name: str, elements: int = 0) -> None:
        if name in self.by_name:
            t = self.by_name[name][1]
            self._add(name, elements or t.numel(), elements or _distinct(t), False, True)

    def share(self, splits: int, part: float = 1, prefix: str = "") -> None:
        """A sum that ``splits`` programs share: stored, read, and counted; ``part`` of its memory is used."""
        if splits > 1:
            key, parts = self.by_name[f"{prefix}partial"]
            self.tensors[key] = Traffic(*[round(parts.numel() * part) * parts.element_size()] * 4)
            counters = self.by_name[f"{prefix}counter"][1].numel()
            self._add(f"{prefix}counter", splits * counters, counters, True, True)
            # Set back to 0.
            self._add(f"{prefix}counter", counters, 0, False, True)

    def grad_beside(
        self, z: str, t: str, columns: int, c: dict[str, Any], *, again: Sequence[str] = (), name: str = "grad"
    ) -> None:
        """dA or dB, of ``columns`` columns, beside another result, for which the tensors ``again`` were read already."""
        tiles_c, tiles_r = cdiv(columns, c[f"{name.upper()}_C"]), cdiv(c["R"], c[f"{name.upper()}_R"])
        splits = c[f"{name.upper()}_SPLITS"]
        self.read(z, tiles_r, unique=z not in again)
        self.read(t, tiles_c, unique=t not in again)
        self.share(splits, prefix=f"{name}_")
        self.write(name)


def formula_by_tensor(launch: Any) -> Tensors:
    """The bytes of each tensor in a launch of ``lora_linear``, without running it; tensors may be on the meta device."""
    arguments = arguments_of(launch)
    account = _Account(arguments)
    if hasattr(launch, "kernel"):
        _FORMULAS[launch.kernel.__name__](account, arguments | {"GRID": launch.grid})
        return account.tensors
    for name in ("x", "w", "bias", *(("y",) if launch.add else ())):
        account.read(name)
    account.write("y")
    return account.tensors


def formula(launch: Any) -> Traffic:
    """The bytes of a launch of ``lora_linear``, without running it."""
    return total(formula_by_tensor(launch).values())


def _shrink(t: _Account, c: dict[str, Any]) -> None:
    tiles_m, tiles_r = cdiv(c["M"], c["BLOCK_M"]), cdiv(c["R"], c["BLOCK_R"])
    t.read("x", tiles_r)
    t.read("a", tiles_m)
    t.read("seed", tiles_m * tiles_r * c["SPLITS"])
    t.share(c["SPLITS"])
    t.write("s")
    if c["HAS_GRAD"]:
        t.grad_beside("x", "t", c["K"], c, again=("x",))


def _chain(t: _Account, c: dict[str, Any]) -> None:
    """S and dB by programs of the product's launch, and what keeps the programs in order."""
    tiles_s, tiles_r = cdiv(c["M"], c["S_BLOCK_M"]), cdiv(c["R"], c["S_BLOCK_R"])
    t.read("x", tiles_r)
    t.read("a", tiles_s)
    if c["S_DROPOUT"]:
        t.read("seed", tiles_s * tiles_r * c["S_SPLITS"])
    t.share(c["S_SPLITS"], prefix="s_")
    t.write("s")
    if c["HAS_DB"]:
        t.grad_beside("x", "t", c["K"], c, again=("x",), name="db")
    # A flag is awaited for each tile of Y, and by each program of dA for all of its rows.
    waits = cdiv(c["M"], c["BLOCK_M"]) * cdiv(c["N"], c["BLOCK_N"]) if c["PRODUCTS"] else 0
    if c["HAS_GRAD"]:
        rows = cdiv(cdiv(c["M"], c["GRAD_M"]), c["GRAD_SPLITS"]) * c["GRAD_M"]
        each = (cdiv(min(start + rows, c["M"]), c["FLAG_M"]) - start // c["FLAG_M"] for start in range(0, c["M"], rows))
        waits += cdiv(c["N"], c["GRAD_C"]) * cdiv(c["R"], c["GRAD_R"]) * sum(each)
    # Integers: tickets, programs done, tiles of S; a wait loads its flag, then acquires it; the last program writes zeros.
    counted, used = 2 * c["GRID"][0] + tiles_s * tiles_r, 2 + cdiv(c["M"], c["FLAG_M"])
    key, _ = t.by_name["chain"]
    t.tensors[key] = Traffic(4 * (counted + 2 * waits), 4 * (counted + waits + used), 4 * used, 4 * used)


def _linear(t: _Account, c: dict[str, Any]) -> None:
    """The product by any of the three kernels."""
    if c["CHAINED"]:
        _chain(t, c)
    if c["PRODUCTS"]:
        _product(t, c)
    if c["HAS_GRAD"]:
        gated = c["GATE"] and c["PRODUCTS"]
        again = ("z", "u", "s") if gated else ("s",) if c["PRODUCTS"] else ()
        t.grad_beside("z", "s", c["N"], c, again=again)
        if c["MASK_BRANCH"]:
            programs = cdiv(c["N"], c["GRAD_C"]) * cdiv(c["R"], c["GRAD_R"]) * c["GRAD_SPLITS"]
            t.read("seed", programs, unique=False)
        t.read("u", cdiv(c["R"], c["GRAD_R"]), unique=not gated)


def _product(t: _Account, c: dict[str, Any]) -> None:
    tiles_m, tiles_n = cdiv(c["M"], c["BLOCK_M"]), cdiv(c["N"], c["BLOCK_N"])
    # The descriptors' kernel finishes a tile in parts. With a mask, each part reads S and the seed, also beyond N.
    parts = c["BLOCK_N"] // c["y_desc"].block_shape[1] if "y_desc" in c and c["MASK_BRANCH"] else 1
    if c.get("HAS_W", True):
        t.read("x", tiles_n, unique=not c["CHAINED"])
        t.read("w", tiles_m)
    t.read("bias", tiles_m)
    t.read("b", tiles_m)
    if c["MASK_BRANCH"]:
        t.read("seed", tiles_m * tiles_n * parts)
    if c["LOAD_S"]:
        t.read("s", tiles_n * parts)
    else:
        t.read("a", tiles_m * tiles_n)
        if c["STORE_S"]:
            t.write("s")
    if "SPLITS" in c:
        # The scratch for S's sum stays empty if S is read, and the scratch for rows beyond M always.
        columns = c["BLOCK_N"] + (0 if c["LOAD_S"] else c["BLOCK_R"])
        t.share(c["SPLITS"], c["M"] * columns / (tiles_m * c["BLOCK_M"] * (c["BLOCK_N"] + c["BLOCK_R"])))
    if c["ADD"]:
        t.read("y")
    t.write("y")
    if c["GATE"]:
        t.read("z")
        t.read("u")
        t.write("du")


def _weight(t: _Account, c: dict[str, Any], n: int, k: int, rows: int, cols: int, times: int) -> None:
    """A quantized W, stored as [n, k], dequantized ``times`` times over in tiles of ``rows`` by ``cols``.

    Every value of a code is taken to occur.
    """
    tiles_k = cdiv(k, cols)
    tiles = cdiv(n, rows) * tiles_k * times
    if not c["NF4"]:
        t.read("q", times)
        t.look_up("scale", n * tiles_k * times)
        return
    if c["ALIGNED"]:
        t.read("q", times)
        # A row of a tile has this many scales. Scales beyond k are not read, but their code values are looked up.
        in_tile = max(cols // c["BLOCKSIZE"], 1)
        scales = n * (k // c["BLOCKSIZE"] if cols >= c["BLOCKSIZE"] else tiles_k) * times
    else:
        # A byte, a scale an element.
        t.look_up("q", n * k * times)
        in_tile, scales = cols, n * k * times
    t.look_up("code", tiles * rows * cols)
    t.look_up("scale", scales)
    t.look_up("nested_scale", scales)
    t.look_up("nested_code", tiles * rows * in_tile)
    t.look_up("offset", tiles)


def _quantized(t: _Account, c: dict[str, Any]) -> None:
    """The product that dequantizes W in its loop."""
    tiles_m, tiles_n = cdiv(c["M"], c["BLOCK_M"]), cdiv(c["N"], c["BLOCK_N"])
    t.read("x", tiles_n)
    stored = (
        (c["K"], c["N"], c["BLOCK_K"], c["BLOCK_N"]) if c["TRANS_W"] else (c["N"], c["K"], c["BLOCK_N"], c["BLOCK_K"])
    )
    _weight(t, c | {"ALIGNED": True}, *stored, times=tiles_m)
    t.read("bias", tiles_m)
    t.read("b", tiles_m)
    t.read("s", tiles_n)
    t.read("seed", tiles_m * tiles_n)
    t.share(c["SPLITS"])
    t.write("y")


def _dequantize(t: _Account, c: dict[str, Any]) -> None:
    _weight(t, c, c["N"], c["K"], c["BLOCK_N"], c["BLOCK_K"], times=1)
    t.write("w")


def _branch(t: _Account, c: dict[str, Any]) -> None:
    tiles_m, shares = c["GRID"]
    t.read("seed", tiles_m * shares)
    if c["LOAD_S"]:
        t.read("s", cdiv(c["N"], c["BLOCK_N"]))
    else:
        t.read("x", shares)
        t.read("a", tiles_m * shares)
        if c["STORE_S"]:
            t.write("s")
    t.read("b", tiles_m)
    t.read("y" if c["IN_PLACE"] else "base")
    t.write("y")
    t.read("g")
    t.read("u")
    t.write("du")


def _grads(t: _Account, c: dict[str, Any]) -> None:
    tiles_r, splits = cdiv(c["R"], c["BLOCK_R"]), c["SPLITS"]
    tiles_a, tiles_b = cdiv(c["K"], c["BLOCK_C"]), cdiv(c["N"], c["BLOCK_C"])
    if c["PROGRAMS_A"]:
        t.read("x", tiles_r)
        t.read("u", tiles_r)
        t.read("ds", tiles_a)
        t.write("da")
    if c["GRID"][0] > c["PROGRAMS_A"]:
        t.read("dy", tiles_r)
        t.read("s", tiles_b)
        t.write("db")
    t.read("seed", tiles_a * tiles_r * splits)
    t.share(splits)


def _gate_up(t: _Account, c: dict[str, Any]) -> None:
    """Gate and up by either kernel. S_g and S_u are columns of one matrix."""
    tiles_m, tiles_n = cdiv(c["M"], c["BLOCK_M"]), cdiv(c["N"], c["BLOCK_N"])
    t.read("x", tiles_n)
    for name in ("wg", "wu", "bias_g", "bias_u", "bg", "bu"):
        t.read(name, tiles_m)
    if ranks := c["R_G"] + c["R_U"]:
        t.read("sg", tiles_n, elements=c["M"] * ranks)
    for name in ("g", "u", "h") if c["STORE_GU"] else ("h",):
        t.write(name)


def _gated_activation(t: _Account, c: dict[str, Any]) -> None:
    t.read("g")
    t.read("u")
    t.write("h")


def _group(t: _Account, c: dict[str, Any], tiles: int) -> int:
    """What both kernels of projections that share X read; the elements of their S or dS, of which the first's is given."""
    t.read("x")
    for i in range(c["MEMBERS"]):
        t.read(f"seed{i}", tiles * c["SPLITS"])
    t.share(c["SPLITS"])
    return c["M"] * sum(c[f"R{i}"] for i in range(c["MEMBERS"]))


def _shrink_group(t: _Account, c: dict[str, Any]) -> None:
    tiles_m = cdiv(c["M"], c["BLOCK_M"])
    t.write("s", elements=_group(t, c, tiles_m))
    for i in range(c["MEMBERS"]):
        t.read(f"a{i}", tiles_m)


def _grads_group(t: _Account, c: dict[str, Any]) -> None:
    tiles = cdiv(c["K"], c["BLOCK_C"])
    t.read("ds", tiles, elements=_group(t, c, tiles))
    for i in range(c["MEMBERS"]):
        t.write(f"da{i}")


_FORMULAS = {
    "_lora_shrink_group_kernel": _shrink_group,
    "_lora_weight_grads_group_kernel": _grads_group,
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
