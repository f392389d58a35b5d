"""Calls of the specialized product with their oracle in float64, for the emulator and for a GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.lab.specialized.launches import Operands
from stablelora_kernels.dispatch.problem import cdiv

KEPT = 0.7


class Case(NamedTuple):
    """A product's sizes, what it adds, and at most how many programs compute it."""

    m: int
    n: int
    k: int
    r: int = 0
    bias: bool = False
    masked: bool = False
    trans_w: bool = False
    dtype: torch.dtype = torch.bfloat16
    # UP is a transpose.
    up_by_columns: bool = False
    pairs: bool = False
    programs: int = 132

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        words = [f"M{self.m} N{self.n} K{self.k} r{self.r} {kind}"]
        for word in ("bias", "masked", "trans_w", "up_by_columns", "pairs"):
            if getattr(self, word):
                words.append(word)
        return " ".join([*words, f"{self.programs} programs"])


# Ragged sizes; fewer programs than tiles; each rank's block; one step of K; one row.
CASES = (
    Case(128, 256, 128),
    Case(200, 320, 200),
    Case(300, 256, 320, programs=1),
    Case(130, 512, 192, bias=True, trans_w=True, programs=1),
    Case(200, 320, 200, r=16, bias=True, programs=1),
    Case(300, 512, 128, r=5, up_by_columns=True, programs=2),
    Case(200, 320, 192, r=16, masked=True, trans_w=True, programs=1),
    Case(130, 264, 128, r=3, bias=True, masked=True, programs=1),
    Case(200, 320, 192, r=20, bias=True, programs=1),
    Case(200, 320, 192, r=64, masked=True, trans_w=True, programs=1),
    Case(130, 256, 128, r=16, bias=True, dtype=torch.float16),
    Case(1, 64, 40, r=16, bias=True),
)
PAIRS = (
    Case(256, 256, 256, pairs=True),
    Case(300, 320, 200, pairs=True, programs=1),
    Case(600, 320, 200, r=16, bias=True, pairs=True, programs=2),
    Case(300, 320, 192, r=16, masked=True, trans_w=True, pairs=True, programs=1),
)


class Made(NamedTuple):
    operands: Operands
    # In float64, of the operands as rounded to their dtypes.
    expected: Tensor
    # How far each element may be off.
    bound: Tensor


def pack(keep: Tensor) -> Tensor:
    """The mask's words: bit j of word i is column 32 i + j."""
    rows, columns = keep.shape
    padded = torch.zeros(rows, 32 * cdiv(columns, 32), dtype=torch.int64, device=keep.device)
    padded[:, :columns] = keep
    bits = torch.arange(32, device=keep.device)
    words = (padded.view(rows, -1, 32) << bits).sum(2)
    # As int32, whose highest bit is the sign.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def make(case: Case, device: str | torch.device = "cpu", seed: int = 0) -> Made:
    """Random operands. Y holds NaN before the product."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    x = draw(case.m, case.k).to(case.dtype)
    w = draw(case.k, case.n) if case.trans_w else draw(case.n, case.k)
    w = w.to(case.dtype)
    y = torch.full((case.m, case.n), math.nan, dtype=case.dtype, device=device)
    operands = Operands(x, w, y, case.trans_w)
    if case.bias:
        operands = operands._replace(bias=draw(case.n).to(case.dtype))
    keep = None
    if case.r:
        up = draw(case.r, case.n).t() if case.up_by_columns else draw(case.n, case.r)
        # All of S is there.
        flags = torch.ones(cdiv(case.m, 128), dtype=torch.int32, device=device)
        s = draw(case.m, case.r).to(case.dtype)
        operands = operands._replace(s=s, up=up, flags=flags)
    if case.masked:
        keep = torch.rand(case.m, case.n, generator=generator, device=device) < KEPT
        operands = operands._replace(mask=pack(keep))
    return Made(operands, *_oracle(operands, keep))


def make_empty(case: Case) -> Operands:
    """Operands of any content: for compiling."""

    def empty(*size: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(*size, dtype=dtype)

    w = empty(case.k, case.n) if case.trans_w else empty(case.n, case.k)
    operands = Operands(empty(case.m, case.k), w, empty(case.m, case.n), case.trans_w)
    if case.bias:
        operands = operands._replace(bias=empty(case.n))
    if case.r:
        up = empty(case.n, case.r, dtype=torch.float32)
        flags = empty(cdiv(case.m, 128), dtype=torch.int32)
        operands = operands._replace(s=empty(case.m, case.r), up=up, flags=flags)
    if case.masked:
        mask = empty(case.m, cdiv(case.n, 32), dtype=torch.int32)
        operands = operands._replace(mask=mask)
    return operands


def _oracle(operands: Operands, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result in float64, and the bound on the error of each of its elements.

    Y is rounded once. The sum's terms are products of 16-bit numbers, which float32 holds exactly.
    The matrix units may cut each partial sum off instead of rounding it: by one unit in the last
    place of float32 at most, of at most the sum of the terms' sizes. A step of the matrix units
    adds 16 terms at once.
    """
    x = operands.x.double()
    w = operands.w.double()
    if not operands.trans_w:
        w = w.t()
    expected = x @ w
    sizes = x.abs() @ w.abs()
    steps = cdiv(x.shape[1], 16)
    if operands.s is not None and operands.up is not None:
        s = operands.s.double()
        up = operands.up.to(operands.s.dtype).double().t()
        branch = s @ up
        expected += branch if keep is None else branch * keep
        sizes += s.abs() @ up.abs()
        steps += cdiv(operands.rank, 16)
    if operands.bias is not None:
        bias = operands.bias.double()
        expected += bias
        sizes += bias.abs()
        steps += 1
    unit = torch.finfo(operands.y.dtype).eps / 2
    summed = steps * torch.finfo(torch.float32).eps * sizes
    return expected, unit * expected.abs() + (1 + unit) * summed


def share(made: Made) -> float:
    """The largest error as a share of its bound; infinite if an element is no number."""
    errors = (made.operands.y.double() - made.expected).abs()
    return (errors / made.bound).nan_to_num(nan=math.inf).max().item()
