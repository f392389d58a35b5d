"""Launches that several ops share: S, the branch onto a product, dA and dB, and programs for these inside other launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch import backend, problem
from stablelora_kernels.dispatch import tiles as tiles_
from stablelora_kernels.dispatch.problem import Call, Device, cdiv
from stablelora_kernels.dispatch.tiles import fit, pick_tile, rank_block, splits
from stablelora_kernels.kernels.lora.expand import _lora_expand_kernel
from stablelora_kernels.kernels.lora.linear import _lora_shrink_kernel
from stablelora_kernels.kernels.lora.weight_grads import _lora_weight_grads_kernel
from stablelora_kernels.launch.base import Launch, input_precision, launch_counts
from stablelora_kernels.launch.counters import MAX_COUNTERS, counters


class VendorProduct(NamedTuple):
    """y = x w^T + bias by the library that PyTorch calls; or y += x w^T."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    y: Tensor
    add: bool = False

    @property
    def variant(self) -> str:
        return "the vendor's product" + words_of(add=self.add)

    @property
    def reason(self) -> str:
        return "cuBLAS, hipBLASLt or, on a CPU, PyTorch's BLAS"

    def run(self, device: torch.device) -> None:
        launch_counts["vendor"] += 1
        if self.add:
            self.y.addmm_(self.x, self.w.t())
        elif self.bias is None:
            torch.mm(self.x, self.w.t(), out=self.y)
        else:
            torch.addmm(self.bias, self.x, self.w.t(), out=self.y)


class Product(NamedTuple):
    """Y = X W^T + bias + (S B^T) ∘ keep with S = s' (X ∘ keep) A^T, and dropout in one of the two places; or dX likewise.

    x [M, K], w [N, K], bias [N], a [r, K], b [N, r]; s [M, r], where it is wanted, and y [M, N] with unit column stride; seed
    int64 [1]. ``call.masked`` says where the mask is. With ``call.add``, all this is added to y.
    """

    call: Call
    x: Tensor
    w: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    s: Tensor | None
    y: Tensor
    seed: Tensor | None
    scaling: float
    dropout_p: float


class Gradients(NamedTuple):
    """What dA = dS^T (X ∘ keep) and dB = dY^T S need, and where they go; what is not wanted is None.

    x [M, K], dy [M, N]; s and ds [M, r] with unit column stride; da [r, K] and db [N, r] contiguous. ``call`` is the
    backward's, its n being K and its k being N.
    """

    call: Call
    x: Tensor | None
    s: Tensor | None
    ds: Tensor | None
    dy: Tensor
    da: Tensor | None
    db: Tensor | None
    seed: Tensor | None
    dropout_p: float


def overlap(device: Device) -> bool:
    return device.overlaps and not backend.INTERPRETING


def threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 2**31), 2**31 - 1)


def share(
    device: Device, tiles: int, steps: int, part: int, like: Tensor, lane: int = 0, programs: int = 2, sums: int = 1
) -> tuple[int, Tensor, Tensor]:
    """How many programs share each of ``tiles``, of ``sums`` each, and the memory for their parts, of ``part`` float32, and
    counters."""
    n = splits(device, tiles, steps, programs) if tiles * sums <= MAX_COUNTERS else 1
    return n, *_shared(n, tiles * sums, part, like, lane)


def _shared(n: int, tiles: int, part: int, like: Tensor, lane: int) -> tuple[Tensor, Tensor]:
    """The memory for the parts of ``tiles`` sums, each of ``n`` parts of ``part`` float32, and their counters.

    What may run at the same time needs different lanes: 0 and 1 for sums of the products, 2 and 3 for dB and dA beside them.
    """
    parts = torch.empty(n * tiles * part if n > 1 else 0, dtype=torch.float32, device=like.device)
    return parts, counters(tiles if n > 1 else 0, like.device, lane)


class _Beside(NamedTuple):
    """dA or dB by programs of another launch: how many, and the kernel's arguments for them."""

    programs: int
    pointers: tuple[Any, ...]
    splits: int
    constants: dict[str, Any]


def _beside(device: Device, g: Gradients | None, out: Tensor | None, warps: int, lane: int) -> _Beside:
    """The programs for ``out``, which is g.da, g.db or None, in a launch of ``warps`` warps a program."""
    if g is None or out is None:
        flags = {"HAS_GRAD": False, "GRAD_M": 1, "GRAD_C": 1, "GRAD_R": 1, "GRAD_STAGES": 1, "GRAD_PRECISION": "ieee"}
        return _Beside(0, (None, None, None), 1, flags)
    c = g.call
    tile, _ = pick_tile(tiles_.WEIGHT_GRADS_TILES, device, c)
    # A wider block of ranks beside another kernel's accumulators would spill registers.
    block_r = rank_block(c.r, min(tile.BLOCK_N, 128))
    masked = c.dropout and out is g.da
    # A matrix instruction's 64 rows for each four warps; but the mask's random numbers take registers.
    columns = tile.BLOCK_M if masked and block_r == 32 else max(tile.BLOCK_M, 16 * warps)
    tile = tile._replace(BLOCK_M=columns, BLOCK_K=32 if masked else tile.BLOCK_K)
    tile = fit(tile, device, tile.BLOCK_K * (tile.BLOCK_M + block_r) * c.dtype.itemsize)
    columns = c.n if out is g.da else c.k
    tiles, steps = cdiv(columns, tile.BLOCK_M) * cdiv(c.r, block_r), cdiv(c.m, tile.BLOCK_K)
    n = splits(device, tiles, steps, programs=1)
    if out is g.db:
        n = max(n, tiles_.chunks(c.m, block_r, steps))
    parts, count = _shared(n, tiles, tile.BLOCK_M * block_r, g.dy, lane)
    flags = {
        "HAS_GRAD": True,
        "GRAD_M": tile.BLOCK_K,
        "GRAD_C": tile.BLOCK_M,
        "GRAD_R": block_r,
        "GRAD_STAGES": tile.num_stages,
        "GRAD_PRECISION": input_precision(device, c.dtype, transposed=True),
    }
    return _Beside(n * tiles, (out, parts, count), n, flags)


def shrink(device: Device, p: Product, g: Gradients | None = None, lead: bool = False) -> Launch:
    """S = s' (X ∘ keep) A^T, the mask being X's unless it is the result's; with ``g``, dB too, X being dY then."""
    c, s = p.call, p.s
    assert s is not None
    dropout = c.dropout and not c.masked
    tile, reason = pick_tile(tiles_.SHRINK_TILES, device, c)
    block_r = rank_block(c.r, tile.BLOCK_N)
    stage = tile.BLOCK_K * (tile.BLOCK_M * c.dtype.itemsize + block_r * c.lora_dtype.itemsize)
    tile = fit(tile, device, stage)
    tiles_m, tiles_r = cdiv(c.m, tile.BLOCK_M), cdiv(c.r, block_r)
    steps = cdiv(c.k, tile.BLOCK_K)
    n, parts, count = share(device, tiles_m * tiles_r, steps, tile.BLOCK_M * block_r, p.x)
    beside = _beside(device, g, None if g is None else g.db, tile.num_warps, lane=2)
    t = None if g is None or g.db is None else g.s
    return Launch(
        _lora_shrink_kernel,
        f"r{block_r} {tile.BLOCK_M}x{tile.BLOCK_K}{words_of(dropout=dropout, dB=beside.programs > 0, ahead=lead)}",
        reason,
        (tiles_m * tiles_r * n + beside.programs,),
        (p.x, p.a, s, p.seed if dropout else None, parts, count, t, *beside.pointers, c.m, c.k, c.r, n, beside.programs,
         beside.splits, *p.x.stride(), *p.a.stride(), s.stride(0), 0 if t is None else t.stride(0), p.scaling,
         threshold(p.dropout_p)),
        beside.constants | {
         "DROPOUT": dropout, "EVEN_K": c.k % tile.BLOCK_K == 0, "LEAD": lead, "BLOCK_M": tile.BLOCK_M,
         "BLOCK_K": tile.BLOCK_K, "BLOCK_R": block_r,
         # For dS, A is B^T, whose rows are not contiguous.
         "INPUT_PRECISION": input_precision(device, c.dtype, transposed=c.direction == "backward")},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip


def small(c: Call) -> str:
    return "small " if c.m <= problem.SMALL_M else ""


def words_of(**flags: bool) -> str:
    return "".join(f" {name}" for name, on in flags.items() if on)


def branch(device: Device, p: Product, base: Tensor | None, s_is_there: bool = False) -> list[Launch]:
    """``p.y`` = ``base`` + branch; ``base`` is y itself, another of its strides, or None for nothing; no w, no bias.

    One launch, or S before it where the rank is high or dropout's mask would be drawn repeatedly.
    """
    c = p.call
    tile, reason = pick_tile(tiles_.EXPAND_TILES, device, c)
    row_tiles, col_tiles = cdiv(c.m, tile.BLOCK_M), cdiv(c.n, tile.BLOCK_N)
    # Few rows are few programs; then several of them share a row tile's columns, and S is computed by each.
    shares = max(1, min(device.processors // row_tiles, col_tiles))
    mask_x = c.dropout and not c.masked
    load_s = s_is_there or c.r > problem.MAX_FUSED_R or (mask_x and shares > 1)
    block_r = rank_block(c.r, problem.MAX_FUSED_R)
    stage = tile.BLOCK_K * (tile.BLOCK_M * c.dtype.itemsize + block_r * c.lora_dtype.itemsize)
    columns = tile.BLOCK_N * (tile.BLOCK_M * c.dtype.itemsize + block_r * c.lora_dtype.itemsize)
    tile = fit(tile, device, max(stage, columns))
    share = cdiv(col_tiles, shares) * tile.BLOCK_N
    if load_s and p.s is None:
        p = p._replace(s=p.x.new_empty(c.m, c.r))
    before = [shrink(device, p)] if load_s and not s_is_there else []
    p = p._replace(seed=p.seed if c.masked or not load_s else None)
    s = p.y if p.s is None else p.s
    words = "dx" if c.direction == "backward" else "y"
    in_place = base is p.y
    apart = base is not None and not in_place
    flags = words_of(fused=not load_s, dropout=mask_x and not load_s, masked=c.masked, apart=apart, alone=base is None)
    launch = Launch(
        _lora_expand_kernel,
        f"{words} r{block_r}{flags} {tile.BLOCK_M}x{tile.BLOCK_N}",
        reason,
        (row_tiles, cdiv(c.n, share)),
        (p.x, p.a, p.b, s, base if apart else None, p.y, p.seed, c.m, c.n, c.k, c.r, share, *p.x.stride(), *p.a.stride(),
         *p.b.stride(), s.stride(0), p.y.stride(0), p.scaling, threshold(p.dropout_p)),
        {"HAS_BASE": base is not None, "IN_PLACE": in_place, "LOAD_S": load_s, "STORE_S": p.s is not None and not load_s,
         "MASK_X": mask_x and not load_s, "MASK_BRANCH": c.masked, "EVEN_K": c.k % tile.BLOCK_K == 0,
         "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K, "BLOCK_R": block_r,
         "INPUT_PRECISION": input_precision(device, c.dtype, transposed=c.direction == "backward")},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip
    return [*before, launch]


def gradient_launches(device: Device, g: Gradients) -> list[Launch]:
    """One launch for both, or for the one that is wanted."""
    c = g.call
    if g.da is None and g.db is None:
        return []
    tile, reason = pick_tile(tiles_.WEIGHT_GRADS_TILES, device, c)
    block_r = rank_block(c.r, tile.BLOCK_N)
    tile = fit(tile, device, tile.BLOCK_K * (tile.BLOCK_M + block_r) * c.dtype.itemsize)
    tiles_r = cdiv(c.r, block_r)
    tiles_a = 0 if g.da is None else cdiv(c.n, tile.BLOCK_M) * tiles_r
    tiles_b = 0 if g.db is None else cdiv(c.k, tile.BLOCK_M) * tiles_r
    steps = cdiv(c.m, tile.BLOCK_K)
    n, parts, count = share(device, tiles_a + tiles_b, steps, tile.BLOCK_M * block_r, g.dy)
    dropout = c.dropout and g.da is not None
    # A pointer that is never followed still needs a type.
    x, s, ds = (g.dy if given is None else given for given in (g.x, g.s, g.ds))
    da, db = g.da if g.da is not None else g.db, g.db if g.db is not None else g.da
    return [Launch(
        _lora_weight_grads_kernel,
        f"r{block_r} {tile.BLOCK_M}x{tile.BLOCK_K}{words_of(dropout=dropout)}",
        reason,
        ((tiles_a + tiles_b) * n,),
        (x, s, ds, g.dy, da, db, g.seed if dropout else None, parts, count, c.m, c.k, c.n, c.r, tiles_a * n, n,
         *x.stride(), s.stride(0), ds.stride(0), *g.dy.stride(), threshold(g.dropout_p)),
        {"DROPOUT": dropout, "BLOCK_M": tile.BLOCK_K,
         "BLOCK_C": tile.BLOCK_M, "BLOCK_R": block_r, "STAGES": tile.num_stages,
         "INPUT_PRECISION": input_precision(device, c.dtype, transposed=True)},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )]  # fmt: skip
