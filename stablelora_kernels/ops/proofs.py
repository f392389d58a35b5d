"""What a proof of kernels needs, whatever the op: stand-ins for a call's operands, a sample of its
rows, and how far a result may be off.

A user's own numbers may hide a fault: B starts at zero, so that a first call has no branch to see.
So a proof runs on operands of the call's layouts whose branch is as large as the base product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch.first_use import Unprovable
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.dispatch.settings import tf32_allowed
from stablelora_kernels.formats import Stored
from stablelora_kernels.projection import WEIGHTS, Projection
from stablelora_kernels.reference import dropout_keep_ref, unpack_mask
from stablelora_kernels.reference.rounding import (
    Arithmetic,
    Rounded,
    dequantized,
    operand,
    unit_roundoff,
)
from stablelora_kernels.utils.tensors import drop_share

# By how many standard deviations of its rounding an element may be off, and all of them in the root
# of the mean square. A right element is never off by half as many, and one that a kernel left out, or
# took from another place, by hundreds; right ones are off by less than one in the mean.
DEVIATIONS = 16.0
MEAN_DEVIATIONS = 4.0
# By how many roundings all elements may be too large or too small together.
ROUNDINGS = 4.0
# One row in so many is compared, so that each tile has one.
EVERY = 16
# In the blocks of so many rows, the samples are these places: across all blocks, every place of a
# matrix instruction's rows.
_STEP = 7
# Sums over rows are cut into parts of a multiple of so many rows.
_SEAM = 16
# Bytes of NaN before and behind a stand-in, a result or scratch: more than what a kernel reads at once.
MARGIN = 4096
# Elements of float64 copies at a time.
_ELEMENTS = 1 << 23


class Compared(NamedTuple):
    """A sample of a result, and what it must be."""

    name: str
    out: Tensor
    expected: Rounded
    arithmetic: Arithmetic

    def fault(self) -> str:
        """What is wrong, in words, or ""."""
        if not self.out.numel():
            return ""
        exact = self.expected.exact.reshape(self.out.shape)
        deviation = self.expected.deviation.reshape(self.out.shape)
        error = (self.out.double() - exact).abs().nan_to_num(nan=math.inf)
        # Where both are zero, the share is NaN.
        shares = (error / deviation).nan_to_num(nan=0.0, posinf=math.inf)
        place = int(shares.argmax())
        if shares.flatten()[place].item() > DEVIATIONS:
            bound = DEVIATIONS * deviation.flatten()[place].item()
            return f"{self.name} is off by {error.flatten()[place].item():.3g}, allowed {bound:.3g}"
        # Of few elements, the mean is not far below the largest.
        allowed = MEAN_DEVIATIONS + DEVIATIONS / math.sqrt(self.out.numel())
        mean = shares.square().mean().sqrt().item()
        if mean > allowed:
            return f"{self.name} is off by {mean:.3g} deviations in the mean, allowed {allowed:.3g}"
        return self._fault_of_scale(exact, deviation)

    def _fault_of_scale(self, exact: Tensor, deviation: Tensor) -> str:
        """What is wrong with the size of the result as a whole, in words, or ""."""
        square = exact.square().sum().item()
        if not square or not math.isfinite(square):
            return ""
        error = abs((self.out.double() * exact).sum().item() / square - 1)
        # One rounding may be that of every element: of the only S, for one.
        unit = max(unit_roundoff(self.arithmetic.storage), self.arithmetic.of_factors, 2.0**-18)
        chance = DEVIATIONS * (deviation * exact).square().sum().sqrt().item() / square
        allowed = ROUNDINGS * unit + chance
        if error <= allowed:
            return ""
        return f"{self.name} is {error:.2%} too large or too small, allowed {allowed:.2%}"


def _nothing(call: Any) -> Sequence[Any]:
    return ()


class Oracle(NamedTuple):
    """What first use asks of an op. ``Any`` stands for the records of its calls and results."""

    # The call on stand-ins, equal ones each time.
    stand_ins: Callable[[Any], Any]
    # What the results of such a call must be, and faults in words: of the call as it was before, its
    # results, and the operands that its launches have written to.
    compare: Callable[[Any, Any, Sequence[Tensor]], Iterator[Compared | str]]
    # The results by PyTorch's operators, with the masks that the call's seeds draw.
    by_operators: Callable[[Any], Any]
    # The names of the strategies that may do the call, the table's first.
    strategies: Callable[[Any], list[str]]
    # The operands that its launches write to.
    written: Callable[[Any], Sequence[Tensor]] = _nothing
    # What dispatch knows of the products whose tiles may be tried.
    products: Callable[[Any], Sequence[Call]] = _nothing


class StandIns:
    """Draws operands of the layouts of a call's own. The generators of torch are left alone."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, t: Tensor, deviation: float = 1.0) -> Tensor:
        """Normal numbers in the layout of ``t``, and NaN around them: in the gaps between its rows,
        and before and behind it.
        """
        memory, view = like(t)
        poison(memory)
        without_repeats(view).normal_(0.0, deviation, generator=self._generator)
        return view

    def of(self, t: Tensor | None, deviation: float = 1.0) -> Tensor | None:
        """The same, or None for None."""
        return None if t is None else self.normal(t, deviation)

    def sampled(self, t: Tensor, rows: Tensor) -> Tensor:
        """Normal numbers in these ``rows`` of [..., N] alone, and zeros in all others: what sums
        over rows then adds up is the sample's.
        """
        drawn = self.normal(t)
        if is_expanded(t):
            return drawn
        others = torch.ones(t.shape[:-1].numel(), dtype=torch.bool, device=t.device)
        others[rows] = False
        drawn[others.view(t.shape[:-1])] = 0.0
        return drawn


def like(t: Tensor) -> tuple[Tensor, Tensor]:
    """New memory, and the view of it with the shape, strides and alignment of ``t``, with MARGIN
    bytes more on either side.
    """
    margin = MARGIN // t.itemsize
    before = margin + t.data_ptr() % 16 // t.itemsize
    last = sum((length - 1) * stride for length, stride in zip(t.shape, t.stride(), strict=True))
    memory = t.new_empty(before + max(last, -1) + 1 + margin)
    return memory, memory.as_strided(t.shape, t.stride(), before)


def poison(memory: Tensor) -> None:
    """Fill memory with NaN, or with ones in each bit."""
    # 255 are all bits of an unsigned number, which here has 8.
    bits = 255 if memory.dtype == torch.uint8 else -1
    memory.fill_(torch.nan if memory.is_floating_point() else bits)


def is_poisoned(memory: Tensor) -> bool:
    """Whether memory is as :func:`poison` has left it."""
    if memory.is_floating_point():
        return bool(memory.isnan().all())
    return bool((memory == (255 if memory.dtype == torch.uint8 else -1)).all())


def without_repeats(t: Tensor) -> Tensor:
    """A view of ``t`` that has each element once, of those that expand() repeats."""
    for dim, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t


def is_expanded(t: Tensor) -> bool:
    """Whether elements of ``t`` share memory."""
    return any(
        length > 1 and stride == 0 for length, stride in zip(t.shape, t.stride(), strict=True)
    )


def sample_of(count: int, device: torch.device) -> Tensor:
    """The numbers of the rows that are compared, of ``count``: all of a few, or one of each sixteen,
    at another place in each block of them, and the last one.
    """
    if count <= 4 * EVERY:
        return torch.arange(count, device=device)
    blocks = torch.arange(-(-count // EVERY), device=device)
    rows = blocks * EVERY + blocks * _STEP % EVERY
    last = rows.new_tensor([count - 1])
    sample: Tensor = torch.cat([rows.clamp(max=count - 1), last]).unique()
    return sample


def sample_of_sums(count: int, device: torch.device) -> Tensor:
    """The numbers of the rows of gradients that are not zero, of ``count``: the sample, and both
    sides of each seam, where one program's sum over rows may end and another's begin.
    """
    seams = torch.arange(_SEAM, max(count, _SEAM), _SEAM, device=device)
    sample: Tensor = torch.cat([sample_of(count, device), seams - 1, seams]).unique()
    return sample[sample < count]


def arithmetic_of(dtype: torch.dtype) -> Arithmetic:
    """How kernels compute in ``dtype``."""
    # TensorFloat-32 has 10 bits behind the point, and may cut the others off.
    of_factors = 2.0**-10 if dtype == torch.float32 and tf32_allowed() else 0.0
    return Arithmetic(dtype, of_factors)


def frozen(p: Projection) -> Tensor | None:
    """The weight of a projection, if it has one; a quantized one in float32."""
    weight = p.weight
    if isinstance(weight, Stored):
        return weight.dequantize(torch.float32)
    assert weight is None or isinstance(weight, Tensor)
    return weight


def size_of_base(weight: Tensor | None) -> float:
    """The standard deviation of a base product's elements for standard normal inputs; 1 of a branch
    alone.
    """
    if weight is None:
        return 1.0
    size = torch.linalg.vector_norm(weight, dtype=torch.float32).item() / math.sqrt(weight.shape[0])
    if not math.isfinite(size):
        raise Unprovable("the weight has elements that are not finite")
    return size or 1.0


def branch_like(draw: StandIns, p: Projection, size: float) -> Projection:
    """``p`` with another A and B, if it has them, whose branch has elements of the standard deviation
    ``size`` for standard normal inputs.
    """
    if p.lora_A is None or p.lora_B is None:
        return p
    rank, columns = p.lora_A.shape
    of_a = 1 / math.sqrt(max(columns, 1))
    of_b = size / (math.sqrt(max(rank, 1)) * (abs(p.scaling) or 1.0))
    return p._replace(lora_A=draw.normal(p.lora_A, of_a), lora_B=draw.normal(p.lora_B, of_b))


def with_stand_ins(
    draw: StandIns, operands: Sequence[Tensor | None], projections: Sequence[Projection]
) -> list[Tensor | None]:
    """``operands``, those of the projections, with stand-ins for all but the weights."""
    replaced: list[Tensor | None] = []
    for data, p in zip(operands[WEIGHTS], projections, strict=True):
        size = size_of_base(frozen(p))
        branch = branch_like(draw, p, size)
        replaced += (data, draw.of(p.bias, size), branch.lora_A, branch.lora_B)
    return replaced


def blocks_of(columns: int, rows: int) -> Iterator[slice]:
    """Columns of a matrix with ``rows``, so many at a time that float64 copies stay small."""
    step = max(16, _ELEMENTS // max(rows, 1))
    for start in range(0, columns, step):
        yield slice(start, min(start + step, columns))


def multiplied(part: Tensor | None, p: Projection, dtype: torch.dtype) -> Rounded | None:
    """A part of the :func:`frozen` weight of ``p`` as a kernel multiplies it in ``dtype``."""
    if part is None:
        return None
    is_quantized = isinstance(p.weight, Stored)
    return dequantized(part.double(), dtype) if is_quantized else operand(part, dtype)


def side_by_side(parts: Sequence[Rounded]) -> Rounded:
    """Columns of one matrix."""
    value = torch.cat([part.value for part in parts], 1)
    return Rounded(value, torch.cat([part.deviation for part in parts], 1))


class Kept(NamedTuple):
    """What dropout keeps of the sampled rows, and what of it is wrong."""

    keep: Tensor
    fault: str


def kept_rows(mask: Tensor | None, seed: Tensor, rows: Tensor, columns: int, p: float) -> Kept:
    """Sampled rows of the mask that ``seed`` draws. ``mask``: what a kernel has stored of it."""
    drawn = dropout_keep_ref(rows, columns, drop_share(p), int(seed[0]))
    if mask is None or torch.equal(unpack_mask(mask[rows], columns), drawn):
        return Kept(drawn, "")
    return Kept(drawn, "dropout's mask is not the one that its seed draws")


def packed(keep: Tensor) -> Tensor:
    """A mask, bool [M, K], as kernels store it: see ``reference.unpack_mask``."""
    rows, columns = keep.shape
    words = -(-columns // 32)
    bits = torch.nn.functional.pad(keep.int(), (0, -columns % 32)).view(rows, words, 32)
    places = torch.arange(32, dtype=torch.int32, device=keep.device)
    return (bits << places).sum(-1, dtype=torch.int32)


def drawn_mask(x: Tensor, seed: Tensor | None, p: float) -> Tensor | None:
    """The mask of x [M, K] that ``seed`` draws, bool; None without dropout."""
    if seed is None or not p:
        return None
    rows = torch.arange(x.shape[0], device=x.device)
    return dropout_keep_ref(rows, x.shape[1], drop_share(p), int(seed[0]))


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """PyTorch's operators as they are written: no autograd, no autocast."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
