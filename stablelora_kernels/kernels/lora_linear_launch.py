"""From a call of ``lora_linear`` to the launches that do it. Tensors are 2-D and of any strides unless it says otherwise.

Nothing here launches: a list of :class:`Launch` is made, which the op runs, ``explain`` prints and the compile report
compiles. Tensors may be on the meta device for the latter two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stablelora_kernels import backend, dispatch
from stablelora_kernels.dispatch import Call, Choice, Device, Tile, cdiv, fit, pick_tile, rank_block, splits
from stablelora_kernels.kernels._common import Launch, input_precision, launch_counts
from stablelora_kernels.kernels._counters import MAX_COUNTERS, counters
from stablelora_kernels.kernels.lora_linear import _lora_linear_kernel, _lora_shrink_kernel
from stablelora_kernels.kernels.lora_linear_branch import _lora_linear_branch_kernel
from stablelora_kernels.kernels.lora_linear_grads import _lora_linear_grads_kernel
from stablelora_kernels.kernels.lora_linear_small import _lora_linear_small_kernel
from stablelora_kernels.kernels.lora_linear_tma import _lora_linear_tma_kernel

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])


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


def product_launches(
    device: Device, p: Product, choice: Choice, s_is_there: bool = False
) -> list[Launch | VendorProduct]:
    """The launches for ``p`` by the kernel chosen, which must be one that :func:`dispatch.choose` allows.

    ``s_is_there``: a launch before has filled ``p.s``, which "fused" would compute anew.
    """
    dispatch.check_possible(p.call, choice.kernel)
    if p.call.m == 0 or p.call.n == 0:
        return []
    if choice.kernel == "fused":
        return [_linear(device, p, choice.tile, load_s=False)]
    if choice.kernel == "vendor":
        return [VendorProduct(p.x, p.w, p.bias, p.y, p.call.add), *branch(device, p, p.y, s_is_there)]
    if s_is_there:
        return [_linear(device, p, choice.tile, load_s=True)]
    return _split(device, p, choice.tile)


def backward_launches(device: Device, p: Product, g: Gradients, choice: Choice | None) -> list[Launch | VendorProduct]:
    """The launches for dX, ``p.y``, by the kernel chosen, and for dA and dB; ``choice`` None: without dX, and of ``p`` w and y
    are not read.

    Where dS is computed on its own, dB is computed in the same launch, which so reads dY once, and dA in dX's.
    """
    if p.call.m == 0 or (choice is None and g.da is None):
        return [*gradient_launches(device, g)]
    if choice is None:
        return [shrink(device, p, g), *gradient_launches(device, g._replace(db=None))]
    if choice.kernel == "split":
        return _split(device, p, choice.tile, g)
    return [*product_launches(device, p, choice), *gradient_launches(device, g)]


def _split(device: Device, p: Product, tile: Tile | None, g: Gradients | None = None) -> list[Launch | VendorProduct]:
    p = p._replace(s=p.x.new_empty(p.call.m, p.call.r)) if p.s is None else p
    return [shrink(device, p, g, lead=overlap(device)), _linear(device, p, tile, load_s=True, g=g)]


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
    tile, _ = pick_tile(dispatch.GRADS_TILES, device, c)
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
        n = max(n, dispatch.chunks(c.m, block_r, steps))
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
    tile, reason = pick_tile(dispatch.SHRINK_TILES, device, c)
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
    return "small " if c.m <= dispatch.SMALL_M else ""


def words_of(**flags: bool) -> str:
    return "".join(f" {name}" for name, on in flags.items() if on)


def _linear(device: Device, p: Product, tile: Tile | None, load_s: bool, g: Gradients | None = None) -> Launch:
    """The product and the branch: S computed beside it, and stored if wanted, or read; with ``g``, dA too, S being dS then."""
    c = p.call
    # None where it is not read: pointers and None would be compiled apart.
    p = p._replace(seed=p.seed if c.masked else None)
    wait = load_s and overlap(device)
    # A pointer that is never followed still needs a type.
    s = p.y if p.s is None else p.s
    block_r = rank_block(c.r, dispatch.MAX_FUSED_R)
    flags = {
        "HAS_BIAS": p.bias is not None,
        "LOAD_S": load_s,
        "STORE_S": p.s is not None and not load_s,
        "MASK_BRANCH": c.masked,
        "ADD": p.call.add,
        "WAIT": wait,
        "BLOCK_R": block_r,
        "INPUT_PRECISION": input_precision(device, c.dtype),
    }
    build = _small_linear if c.m <= dispatch.SMALL_M else _tma_linear if _takes_tma(device, p) else _pointer_linear
    launch = build(device, p, s, tile, flags, g)
    words = "dx" if c.direction == "backward" else "y"
    da = launch.constants["HAS_GRAD"]
    variant = f"{words} r{block_r}{words_of(fused=not load_s, masked=c.masked, add=p.call.add, dA=da)} {launch.variant}"
    options = launch.options | ({"launch_pdl": True} if wait else {})
    return launch._replace(variant=small(c) + variant, options=options)


def _da_beside(device: Device, g: Gradients | None, tile: Tile) -> tuple[Tensor | None, _Beside]:
    """X and the programs for dA in the launch of dX, whose tile is ``tile``."""
    beside = _beside(device, g, None if g is None else g.da, tile.num_warps, lane=3)
    return (None if g is None or not beside.programs else g.x), beside


def _strides(z: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if z is None else z.stride()


def _stage(c: Call, tile: Tile, flags: dict[str, Any]) -> int:
    """Bytes of shared memory that a step of the main loop takes."""
    a = 0 if flags["LOAD_S"] else flags["BLOCK_R"] * c.lora_dtype.itemsize
    return tile.BLOCK_K * ((tile.BLOCK_M + tile.BLOCK_N) * c.dtype.itemsize + a)


def _pointer_linear(
    device: Device, p: Product, s: Tensor, tile: Tile | None, flags: dict[str, Any], g: Gradients | None
) -> Launch:
    c = p.call
    tile, reason = pick_tile(dispatch.LINEAR_TILES, device, c, tile)
    # The branch's operands are in shared memory beside the pipeline's buffers.
    branch = flags["BLOCK_R"] * (tile.BLOCK_M * c.dtype.itemsize + tile.BLOCK_N * c.lora_dtype.itemsize)
    tile = fit(tile, device, _stage(c, tile, flags), branch)
    tiles = cdiv(c.m, tile.BLOCK_M) * cdiv(c.n, tile.BLOCK_N)
    z, beside = _da_beside(device, g, tile)
    return Launch(
        _lora_linear_kernel,
        f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        reason,
        (tiles + beside.programs,),
        (p.x, p.w, p.bias, p.a, p.b, s, p.y, p.seed, z, *beside.pointers, c.m, c.n, c.k, c.r, tiles, beside.splits,
         *p.x.stride(), *p.w.stride(), *p.a.stride(), *p.b.stride(), s.stride(0), p.y.stride(0), *_strides(z), p.scaling,
         threshold(p.dropout_p)),
        flags | beside.constants | {"EVEN_K": c.k % tile.BLOCK_K == 0, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
                 "BLOCK_K": tile.BLOCK_K, "GROUP_M": 8},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip


def _small_linear(
    device: Device, p: Product, s: Tensor, tile: Tile | None, flags: dict[str, Any], g: Gradients | None
) -> Launch:
    c = p.call
    tile, reason = pick_tile(dispatch.SMALL_TILES, device, c, tile)
    tile = tile._replace(BLOCK_M=16 if c.m <= 16 else 64)
    tile = fit(tile, device, _stage(c, tile, flags))
    tiles, steps = cdiv(c.n, tile.BLOCK_N), cdiv(c.k, tile.BLOCK_K)
    part = tile.BLOCK_N * tile.BLOCK_M + tile.BLOCK_M * flags["BLOCK_R"]
    # The parts of 64 rows are as large as what a program reads of W in a few steps: there one program a processor is enough.
    n, parts, count = share(device, tiles, steps, part, p.x, lane=1, programs=2 if tile.BLOCK_M == 16 else 1)
    z, beside = _da_beside(device, g, tile)
    return Launch(
        _lora_linear_small_kernel,
        f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        reason,
        (tiles * n + beside.programs,),
        (p.x, p.w, p.bias, p.a, p.b, s, p.y, p.seed, parts, count, z, *beside.pointers, c.m, c.n, c.k, c.r, n, tiles * n,
         beside.splits, *p.x.stride(), *p.w.stride(), *p.a.stride(), *p.b.stride(), s.stride(0), p.y.stride(0), *_strides(z),
         p.scaling, threshold(p.dropout_p)),
        flags | beside.constants | {"EVEN_K": c.k % tile.BLOCK_K == 0, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
                 "BLOCK_K": tile.BLOCK_K,
                 "INPUT_PRECISION": input_precision(device, c.dtype, transposed=c.direction == "backward")},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip


def _described(t: Tensor) -> bool:
    """Whether a descriptor can hold ``t``: rows of unit stride that begin at multiples of 16 bytes."""
    return t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 and t.stride(0) > 0


def _takes_tma(device: Device, p: Product) -> bool:
    w = p.w.t() if p.w.stride(0) == 1 else p.w
    return device.tma and p.call.dtype != torch.float32 and all(_described(t) for t in (p.x, w, p.y)) and p.call.k > 0


def _tma_linear(
    device: Device, p: Product, s: Tensor, tile: Tile | None, flags: dict[str, Any], g: Gradients | None
) -> Launch:
    c = p.call
    tile, reason = pick_tile(dispatch.TMA_TILES, device, c, tile)
    # Under 3.6 the compiler gives up on it, and it changes nothing on Hopper. With Y read too it outgrows shared memory.
    plain = flags["LOAD_S"] and not c.masked and not c.add
    specialize = 100 <= device.generation < 120 and plain and TRITON >= (3, 9) and tile.BLOCK_N <= 128
    # The mask's random numbers are what takes the registers.
    parts = 1 if specialize else max(2, tile.BLOCK_N // 32) if c.masked else 2
    part = tile.BLOCK_N // parts
    # Y's way out and the branch's operands are in shared memory beside the pipeline's buffers.
    beside = c.dtype.itemsize * (tile.BLOCK_M * part + flags["BLOCK_R"] * (tile.BLOCK_M + part))
    tile = fit(tile, device, _stage(c, tile, flags), beside)
    w, trans = (p.w.t(), True) if p.w.stride(0) == 1 else (p.w, False)
    a, trans_a = (p.a.t(), True) if p.a.stride(0) == 1 else (p.a, False)
    # A float32 A passes through registers to be rounded, whichever way it comes.
    described_a = not flags["LOAD_S"] and c.lora_dtype == c.dtype and _described(a)
    a_block = (tile.BLOCK_K, flags["BLOCK_R"]) if trans_a else (flags["BLOCK_R"], tile.BLOCK_K)
    products = min(cdiv(c.m, tile.BLOCK_M) * cdiv(c.n, tile.BLOCK_N), device.processors)
    z, beside = _da_beside(device, g, tile)
    return Launch(
        _lora_linear_tma_kernel,
        f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}{words_of(specialized=specialize)}",
        reason,
        (products + beside.programs,),
        (_descriptor(p.x, tile.BLOCK_M, tile.BLOCK_K),
         _descriptor(w, *((tile.BLOCK_K, tile.BLOCK_N) if trans else (tile.BLOCK_N, tile.BLOCK_K))),
         p.bias, _descriptor(a, *a_block) if described_a else p.a, p.b, s, _descriptor(p.y, tile.BLOCK_M, part), p.seed,
         z, *beside.pointers, c.m, c.n, c.k, c.r, products, beside.splits, *p.a.stride(), *p.b.stride(), s.stride(0),
         *_strides(z), p.scaling, threshold(p.dropout_p)),
        flags | beside.constants | {
                 "PARTS": parts, "TRANS_W": trans, "DESCRIBED_A": described_a, "TRANS_A": trans_a, "SPECIALIZE": specialize,
                 "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K, "GROUP_M": 8},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip


def _descriptor(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols])


def branch(device: Device, p: Product, base: Tensor | None, s_is_there: bool = False) -> list[Launch]:
    """``p.y`` = ``base`` + branch; ``base`` is y itself, another of its strides, or None for nothing; no w, no bias.

    One launch, or S before it where the rank is high or dropout's mask would be drawn repeatedly.
    """
    c = p.call
    tile, reason = pick_tile(dispatch.BRANCH_TILES, device, c)
    row_tiles, col_tiles = cdiv(c.m, tile.BLOCK_M), cdiv(c.n, tile.BLOCK_N)
    # Few rows are few programs; then several of them share a row tile's columns, and S is computed by each.
    shares = max(1, min(device.processors // row_tiles, col_tiles))
    mask_x = c.dropout and not c.masked
    load_s = s_is_there or c.r > dispatch.MAX_FUSED_R or (mask_x and shares > 1)
    block_r = rank_block(c.r, dispatch.MAX_FUSED_R)
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
        _lora_linear_branch_kernel,
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
    tile, reason = pick_tile(dispatch.GRADS_TILES, device, c)
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
        _lora_linear_grads_kernel,
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
