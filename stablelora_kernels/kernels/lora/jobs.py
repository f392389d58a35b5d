"""What the kernels' jobs take: for each a named tuple of run-time values, and one of compile-time
constants.

A launch may do several jobs: a product with its branch, S or dS, dB, dA. The constants are None
where a launch lacks the job. Triton specializes every integer of a tuple, so what changes from
batch to batch (rows, programs) is an argument of its own. None stands for a pointer that is not
read. A tuple holds values or tuples, never both: in a loop, Triton 3.6 forgets the constants of the
latter.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """Elements at ``ptr + i * row + j * col``."""

    ptr: Any
    row: Any
    col: Any


class Rows(NamedTuple):
    """Z [M, width] at ``ptr + i * row + j * col``. With ``u``, of the same strides, act(Z) ∘ U
    takes its place, see ``gated``.
    """

    ptr: Any
    u: Any
    row: Any
    col: Any
    width: Any


class Shared(NamedTuple):
    """What members share: the distance of rows of S or T, the strides of DOWN or OUT, and for
    programs that share a tile's sum the partial sums in float32 and int32 counters.
    """

    stride: Any
    row: Any
    col: Any
    parts: Any
    counter: Any


class SMember(NamedTuple):
    """One projection's S [M, R] = s' (X ∘ keep) DOWN^T.

    DOWN[r, k] is at ``down + r * row + k * col``.

    The seed is None without dropout. The mask that it gives is stored where ``mask`` is not None, a
    bit an element.
    """

    down: Any
    s: Any
    seed: Any
    mask: Any
    scaling: Any
    R: Any


class SJob(NamedTuple):
    """S of projections that share X [M, K]."""

    members: tuple[SMember, ...]
    shared: Shared


class STile(NamedTuple):
    """FLAG_M: rows of S that share a flag of the chain; 0 if no program of the launch reads S."""

    MEMBERS: int
    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int
    STAGES: int
    EVEN_K: bool
    FLAG_M: int
    PRECISION: str


class GradMember(NamedTuple):
    """One projection's OUT = (Z ∘ keep)^T T, T [M, R], OUT[c, r] at ``out + c * row + r * col``;
    keep is all ones or stored.
    """

    t: Any
    out: Any
    mask: Any
    R: Any


class GradJob(NamedTuple):
    """dA or dB of projections that share Z [M, C]."""

    members: tuple[GradMember, ...]
    shared: Shared


class GradTile(NamedTuple):
    """UNIT: what a stored 1 of T means."""

    MEMBERS: int
    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    STAGES: int
    GATE: str
    UNIT: float
    PRECISION: str


class Branch(NamedTuple):
    """(S UP^T) ∘ keep: S [M, R] with rows of ``stride_s``, UP [N, R] like a ``Matrix``; keep is
    all ones or stored.

    A product that computes S in its own loop scales it and, if s is not None, stores it.
    """

    s: Any
    stride_s: Any
    up: Any
    up_row: Any
    up_col: Any
    mask: Any
    scaling: Any
    R: Any


class BranchTile(NamedTuple):
    """UNIT: what a stored 1 of S means."""

    BLOCK_R: int
    UNIT: float
    PRECISION: str


class Gate(NamedTuple):
    """Y is dH of a gated MLP, see ``gated``: G, U and dU, contiguous [M, N]. Y takes dG."""

    g: Any
    u: Any
    du: Any


class Tile(NamedTuple):
    """A product's. EVEN_K: BLOCK_K divides K, so that loads along K need no mask. GROUP_M: see
    ``tile_of``.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    EVEN_K: bool
    GATE: str
    PRECISION: str


class DescribedTile(NamedTuple):
    """A product's through tensor descriptors. TRANS_W: they hold W^T.

    PARTS of a tile's columns are finished one after another. ADD: add to Y's earlier values.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    PARTS: int
    TRANS_W: bool
    ADD: bool
    GATE: str
    PRECISION: str


class Packed(NamedTuple):
    """A W [N, K] in 4 or 8 bits, see ``formats.Stored``: bytes in rows of ``stride``, absmax or
    scales, code, nested scales. ``formats.FORMATS`` says which of them a format has.
    """

    data: Any
    stride: Any
    scale: Any
    code: Any = None
    nested_scale: Any = None
    nested_code: Any = None
    offset: Any = None


class PackedTile(NamedTuple):
    """FORMAT is a name of ``quantized.WEIGHTS``. BLOCKSIZE elements share a scale, and NESTED scales
    a nested one, 0 if scales are float32.

    ALIGNED: no byte and no block lies across two rows, and blocks divide a tile's columns or are
    divided by them. SWIZZLED: scales lie in the tiles that Blackwell's tensor cores read.
    """

    FORMAT: str
    BLOCKSIZE: int
    NESTED: int
    ALIGNED: bool
    SWIZZLED: bool
