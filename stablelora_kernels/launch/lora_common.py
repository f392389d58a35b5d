"""Launches that several ops need: S, the branch onto a product, dA and dB; and dA's or dB's programs inside other launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch import problem, rules, tiles
from stablelora_kernels.dispatch.problem import Call, Device, cdiv
from stablelora_kernels.dispatch.rules import input_precision
from stablelora_kernels.dispatch.tiles import Plan
from stablelora_kernels.kernels.lora.expand import _lora_expand_kernel
from stablelora_kernels.kernels.lora.shrink import _lora_shrink_kernel
from stablelora_kernels.kernels.lora.weight_grads import _lora_weight_grads_kernel
from stablelora_kernels.launch.base import Launch, flag_words, launch_counts, tile_blocks, tile_options
from stablelora_kernels.launch.counters import counters
from stablelora_kernels.launch.workspace import scratch


class VendorProduct(NamedTuple):
    """y = x w^T + bias by the library that PyTorch calls; or y += x w^T."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    y: Tensor
    add: bool = False

    @property
    def variant(self) -> str:
        return "the vendor's product" + flag_words(add=self.add)

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


class Gate(NamedTuple):
    """What a product needs if its Y is dH of a gated MLP: it then stores dG in Y and dU in ``du``. All are contiguous [M, N]."""

    activation: str
    g: Tensor
    u: Tensor
    du: Tensor


class Product(NamedTuple):
    """Y = X W^T + bias + (S B^T) ∘ keep with S = s' (X ∘ keep) A^T, where one of the two masks is all ones; or dX likewise.

    x [M, K], w [N, K], bias [N], a [r, K], b [N, r]; s [M, r], or None if not requested, and y [M, N] with unit column
    stride; seed int64 [1]. ``call.masked`` says which mask drops. With ``call.add``, the kernels add to y. S is in units of
    ``unit``, and ``scaling`` is s' divided by it. Without w, Y is the branch alone. Without ``wanted`` y is not computed, and any
    tensor stands for it.
    """

    call: Call
    x: Tensor
    w: Tensor | None
    bias: Tensor | None
    a: Tensor
    b: Tensor
    s: Tensor | None
    y: Tensor
    seed: Tensor | None
    scaling: float
    dropout_p: float
    unit: float = 1.0
    wanted: bool = True
    gate: Gate | None = None


class Gradients(NamedTuple):
    """Operands and results of dA = dS^T (X ∘ keep) and dB = dY^T S; a result that is not requested is None.

    x [M, K], dy [M, N]; s and ds [M, r] with unit column stride; da [r, K] and db [N, r] contiguous. ``call`` is the
    backward's: its n is K and its k is N. S is in units of ``unit``.
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
    unit: float = 1.0
    # Gated MLP: X stands for act(G) U; ``x`` holds G.
    gate: Gate | None = None


def gate_name(gate: Gate | None) -> str:
    """A kernel's GATE."""
    return "" if gate is None else gate.activation


def gate_flag(gate: Gate | None) -> dict[str, bool]:
    """The activation's name, as a flag of a variant."""
    return {} if gate is None else {gate.activation: True}


def gate_pointers(gate: Gate | None) -> tuple[Any, ...]:
    """A kernel's pointers to U and dU."""
    return (None, None) if gate is None else (gate.u, gate.du)


def s_unit(dtype: torch.dtype, scaling: float) -> float:
    """What a stored 1 of S = ``scaling`` X A^T means: the power of two that keeps S no larger than X A^T in float16."""
    if dtype != torch.float16 or not 1 < abs(scaling) < math.inf:
        return 1.0
    fraction, exponent = math.frexp(scaling)
    # Far from float32's limits, where the kernels scale sums by it.
    return 2.0 ** min(exponent - (abs(fraction) == 0.5), 64)


def forward_product(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: Tensor | None, y: Tensor,
    seed: Tensor | None, scaling: float, dropout_p: float,
) -> Product:  # fmt: skip
    """Y as a product. ``weight`` is None if no launch reads it."""
    # Kernels take no stride for it.
    bias = None if bias is None else bias.contiguous()
    (m, k), (n, r) = x.shape, lora_B.shape
    call, unit = Call("forward", m, n, k, r, x.dtype, lora_A.dtype, dropout_p > 0), s_unit(x.dtype, scaling)
    return Product(call, x, weight, bias, lora_A, lora_B, s, y, seed, scaling / unit, dropout_p, unit)


def backward_product(
    x: Tensor | None, grad: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: Tensor | None, ds: Tensor | None,
    seed: Tensor | None, dx: Tensor | None, da: Tensor | None, db: Tensor | None, scaling: float, dropout_p: float,
) -> tuple[Product, Gradients]:  # fmt: skip
    """dX as the forward's formula with every matrix transposed, and dA and dB. ``weight`` is None if no launch reads it."""
    (m, n), (r, k) = grad.shape, lora_A.shape
    call = Call("backward", m, k, n, r, grad.dtype, lora_A.dtype, dropout_p > 0)
    if s is not None and s.stride(1) != 1:
        # A hook of saved tensors gave it another layout.
        s = s.contiguous()
    y, w = grad if dx is None else dx, None if weight is None else weight.t()
    product = Product(
        call, grad, w, None, lora_B.t(), lora_A.t(), ds, y, seed, scaling, dropout_p, wanted=dx is not None
    )
    return product, Gradients(call, x, s, ds, grad, da, db, seed, dropout_p, s_unit(grad.dtype, scaling))


def with_s(p: Product) -> Product:
    """``p`` with memory for S."""
    return p._replace(s=scratch(p.x, p.call.m, p.call.r)) if p.s is None else p


def dropout_threshold(dropout_p: float) -> int:
    """A random number of 31 bits below this drops its element."""
    return min(round(dropout_p * 2**31), 2**31 - 1)


def few_rows_word(call: Call) -> str:
    return "small " if call.m <= problem.SMALL_M else ""


def split_k_buffers(plan: Plan, part: int, like: Tensor, lane: int = 0, sums: int = 1) -> tuple[Tensor, Tensor]:
    """The float32 scratch for partial sums, each of ``part`` elements, and the counters of ``sums`` for each tile.

    Sums that may run at the same time need different lanes: 0 and 1 for S and Y, 2 and 3 for co-scheduled dB and dA, and
    4 for a chain.
    """
    shared = plan.tiles * sums if plan.splits > 1 else 0
    parts = scratch(like, plan.splits * shared * part, dtype=torch.float32)
    return parts, counters(shared, like.device, lane)


class CoScheduledGrad(NamedTuple):
    """dA or dB by programs of another launch: how many, and the other kernel's arguments for them."""

    programs: int
    pointers: tuple[Any, ...]
    splits: int
    constants: dict[str, Any]


def co_scheduled_grad(
    device: Device, g: Gradients | None, out: Tensor | None, warps: int, lane: int
) -> CoScheduledGrad:
    """The programs for ``out``, which is g.da, g.db or None, in a launch of ``warps`` warps a program."""
    if g is None or out is None:
        constants = {
            "HAS_GRAD": False,
            "GRAD_M": 1,
            "GRAD_C": 1,
            "GRAD_R": 1,
            "GRAD_STAGES": 1,
            "GRAD_PRECISION": "ieee",
        }
        return CoScheduledGrad(0, (None, None, None), 1, constants)
    plan = tiles.co_scheduled_grad_plan(device, g.call, out is g.db, warps)
    tile = plan.tile
    constants = {
        "HAS_GRAD": True,
        "GRAD_M": tile.BLOCK_K,
        "GRAD_C": tile.BLOCK_M,
        "GRAD_R": plan.block_r,
        "GRAD_STAGES": tile.num_stages,
        "GRAD_PRECISION": input_precision(device, g.call.dtype, transposed=True),
    }
    buffers = split_k_buffers(plan, tile.BLOCK_M * plan.block_r, g.dy, lane)
    return CoScheduledGrad(plan.splits * plan.tiles, (out, *buffers), plan.splits, constants)


def shrink(device: Device, p: Product, g: Gradients | None = None, triggers_dependents: bool = False) -> Launch:
    """S = s' (X ∘ keep) A^T, without the mask if it falls on the branch's result; with ``g`` also dB, for which X is dY."""
    c, s = p.call, p.s
    assert s is not None
    dropout = c.dropout and not c.masked
    plan = tiles.shrink_plan(device, c)
    tile = plan.tile
    parts, count = split_k_buffers(plan, tile.BLOCK_M * plan.block_r, p.x)
    grad = co_scheduled_grad(device, g, None if g is None else g.db, tile.num_warps, lane=2)
    t = None if g is None or g.db is None else g.s
    words = flag_words(dropout=dropout, dB=grad.programs > 0, ahead=triggers_dependents)
    return Launch(
        _lora_shrink_kernel,
        f"r{plan.block_r} {tile.BLOCK_M}x{tile.BLOCK_K}{words}",
        plan.reason,
        (plan.tiles * plan.splits + grad.programs,),
        (p.x, p.a, s, p.seed if dropout else None, parts, count, t, *grad.pointers, c.m, c.k, c.r, plan.splits, grad.programs,
         grad.splits, *p.x.stride(), *p.a.stride(), s.stride(0), 0 if t is None else t.stride(0), p.scaling,
         dropout_threshold(p.dropout_p)),
        grad.constants | {
         "GRAD_UNIT": 1.0 if g is None else g.unit, "DROPOUT": dropout, "EVEN_K": c.k % tile.BLOCK_K == 0,
         "TRIGGERS_DEPENDENTS": triggers_dependents, "BLOCK_M": tile.BLOCK_M, "BLOCK_K": tile.BLOCK_K, "BLOCK_R": plan.block_r,
         "STAGES": tile.num_stages,
         # For dS, A is B^T, whose rows are not contiguous.
         "INPUT_PRECISION": input_precision(device, c.dtype, transposed=c.direction == "backward")},
        tile_options(tile),
    )  # fmt: skip


def expand(device: Device, p: Product, base: Tensor, s_ready: bool = False) -> list[Launch]:
    """``p.y`` = ``base`` + branch; ``base`` is y itself, or another tensor with y's strides. W is not read.

    One launch, or S's launch before it, which ``s_ready`` leaves out: an earlier launch has filled ``p.s``.
    """
    c = p.call
    plan = tiles.expand_plan(device, c)
    tile = plan.tile
    load_s = s_ready or rules.choose_expand(c, plan.splits).kernel == "split"
    p = with_s(p) if load_s else p
    before = [shrink(device, p)] if load_s and not s_ready else []
    columns = cdiv(cdiv(c.n, tile.BLOCK_N), plan.splits) * tile.BLOCK_N
    mask_x = c.dropout and not c.masked and not load_s
    s = p.y if p.s is None else p.s
    in_place = base is p.y
    flags = flag_words(fused=not load_s, dropout=mask_x, masked=c.masked, apart=not in_place, **gate_flag(p.gate))
    launch = Launch(
        _lora_expand_kernel,
        f"{'dx' if c.direction == 'backward' else 'y'} r{plan.block_r}{flags} {tile.BLOCK_M}x{tile.BLOCK_N}",
        plan.reason,
        (plan.tiles, cdiv(c.n, columns)),
        (p.x, p.a, p.b, s, None if in_place else base, p.y, p.seed if c.masked or mask_x else None,
         None if p.gate is None else p.gate.g, *gate_pointers(p.gate), c.m, c.n, c.k, c.r, columns,
         *p.x.stride(), *p.a.stride(), *p.b.stride(), s.stride(0), p.y.stride(0), p.scaling, dropout_threshold(p.dropout_p)),
        tile_blocks(tile) | {
         "IN_PLACE": in_place, "LOAD_S": load_s, "STORE_S": p.s is not None and not load_s,
         "S_UNIT": p.unit, "MASK_X": mask_x, "MASK_BRANCH": c.masked, "GATE": gate_name(p.gate),
         "EVEN_K": c.k % tile.BLOCK_K == 0, "BLOCK_R": plan.block_r,
         "INPUT_PRECISION": input_precision(device, c.dtype, transposed=c.direction == "backward")},
        tile_options(tile),
    )  # fmt: skip
    return [*before, launch]


def gradient_launches(device: Device, g: Gradients) -> list[Launch]:
    """One launch for dA and dB, or for the one that is wanted."""
    c = g.call
    if g.da is None and g.db is None:
        return []
    plan, tiles_a = tiles.weight_grads_plan(device, c, g.da is not None, g.db is not None)
    tile = plan.tile
    parts, count = split_k_buffers(plan, tile.BLOCK_M * plan.block_r, g.dy)
    dropout = c.dropout and g.da is not None
    # A pointer that the kernel never follows still needs a type.
    x, s, ds = (g.dy if given is None else given for given in (g.x, g.s, g.ds))
    da, db = g.da if g.da is not None else g.db, g.db if g.db is not None else g.da
    return [Launch(
        _lora_weight_grads_kernel,
        f"r{plan.block_r} {tile.BLOCK_M}x{tile.BLOCK_K}{flag_words(dropout=dropout, **gate_flag(g.gate))}",
        plan.reason,
        (plan.tiles * plan.splits,),
        (x, None if g.gate is None else g.gate.u, s, ds, g.dy, da, db, g.seed if dropout else None, parts, count, c.m, c.k, c.n,
         c.r, tiles_a * plan.splits, plan.splits, *x.stride(), s.stride(0), ds.stride(0), *g.dy.stride(),
         dropout_threshold(g.dropout_p)),
        {"S_UNIT": g.unit, "DROPOUT": dropout, "GATE": gate_name(g.gate), "BLOCK_M": tile.BLOCK_K, "BLOCK_C": tile.BLOCK_M,
         "BLOCK_R": plan.block_r, "STAGES": tile.num_stages,
         "INPUT_PRECISION": input_precision(device, c.dtype, transposed=True)},
        tile_options(tile),
    )]  # fmt: skip
