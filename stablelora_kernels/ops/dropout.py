"""Dropout's mask, and how it is drawn.

The kernels draw it from a seed and store a bit an element. On the PyTorch path a mask is a tensor of
one of two kinds, which differ in their dtype:

    bool, of x's shape     which elements are kept
    int32, of one size     the positions of the elements that are dropped, in x's rows one behind
                           another, ascending; the last one fills the tensor up

Positions are fewer than elements: up to a probability of POSITIONS_UP_TO it takes less time to draw
them, to keep them for backward and to apply them. Compiled code draws the bool kind alone, because
the number of positions would be a size that a graph cannot know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.matrices import row_count
from stablelora_kernels.utils.tensors import drop_share

# Up to so many elements of a mask, fewer operators are faster.
BERNOULLI_UP_TO = 8192
# Up to this probability, and from so many elements on, a mask is positions: where a draw and two
# uses of them take less time than those of bools.
POSITIONS_UP_TO = 0.15
POSITIONS_FROM = 1 << 15
# A random 64-bit word gives so many elements 16 bits each.
_ELEMENTS_PER_WORD = 4

# Of a generator's state.
_STATE_DTYPE = torch.uint8

# On Triton.


def new_mask(x: Tensor, columns: int) -> Tensor:
    """Memory for the dropout mask of x's rows: int32 [M, ceil(columns / 32)], see
    ``reference.unpack_mask``.
    """
    return x.new_empty((row_count(x), -(-columns // 32)), dtype=torch.int32)


def draw_seeds(device: torch.device, dropout_ps: Sequence[float]) -> list[Tensor | None]:
    """The seeds of the masks of one call's branches, by one launch; None for one without dropout.

    A seed is int64 [2], of which kernels read the first word: so it begins at a multiple of 16
    bytes wherever it lies in the draw, and Triton compiles one kernel for all of them.

    Seeds are not drawn ahead for later calls. A checkpoint that sets torch's generator back would
    compute again with the next seeds of the stock, and a CUDA graph would replay those it holds.
    """
    count = len(dropout_ps) - dropout_ps.count(0.0)
    if not count:
        return [None] * len(dropout_ps)
    # They stay on the device: there is no synchronization, and a CUDA graph draws new ones at each
    # replay.
    if count == 1:
        # A view would take half as long as the draw.
        drawn = iter([torch.randint(2**63 - 1, (2,), device=device)])
    else:
        drawn = iter(torch.randint(2**63 - 1, (count, 2), device=device).unbind())
    return [next(drawn) if dropout_p else None for dropout_p in dropout_ps]


def scalings_after_dropout(scalings: Sequence[float], dropout_p: float) -> tuple[float, ...]:
    """s' = scaling / (1 - p) of each projection, with the probability that the kernels drop by."""
    kept_share = 1 - drop_share(dropout_p)
    return tuple([scaling / kept_share for scaling in scalings])


# On the PyTorch path.


def _is_small(size: int) -> bool:
    """Whether a mask of so many elements takes its time for calls of operators, rather than for its
    elements. It counts as small in torch.jit.trace, which records neither views in another dtype nor
    a generator's state.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or size <= BERNOULLI_UP_TO


def draw_keep(x: Tensor, dropout_p: float) -> tuple[Tensor, float]:
    """Draw x's mask from torch's generator, as a bool tensor of x's shape in any case. Return it
    with its exact dropout probability.
    """
    mask, share = _draw(x.shape, x.device, dropout_p)
    if not is_positions(mask):
        return mask, share
    return masked(torch.ones(x.shape, dtype=torch.bool), mask), share


def _draw(
    shape: Sequence[int],
    device: torch.device,
    dropout_p: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float]:
    """A mask of either kind for a shape on a device, from ``generator`` or from torch's; and its
    exact dropout probability.
    """
    size = math.prod(shape)
    share = drop_share(dropout_p)
    if _are_positions_drawn(size, device, share):
        return _draw_positions(size, share, generator), share
    return _draw_bools(shape, device, share, generator), share


def _draw_bools(
    shape: Sequence[int], device: torch.device, share: float, generator: torch.Generator | None
) -> Tensor:
    """Which elements are kept, each with the probability 1 - ``share``."""
    size = math.prod(shape)
    if device.type != "cpu" or _is_small(size):
        keep = torch.empty(shape, dtype=torch.bool, device=device)
        return keep.bernoulli_(1 - share, generator=generator)
    # On a CPU, bernoulli_ draws one double per element sequentially. 16 bits per element, four
    # elements per int64 word, are several times faster.
    return _bools_of(_random_words(_word_count(size), generator), shape, share)


def _word_count(size: int) -> int:
    """How many random words a mask of so many elements takes."""
    return -(-size // _ELEMENTS_PER_WORD)


def _bools_of(words: Tensor, shape: Sequence[int], share: float) -> Tensor:
    """A mask of random ``words``."""
    values = words.view(torch.int16)[: math.prod(shape)].view(shape)
    return values >= round(share * 65536) - 32768


def _random_words(count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` int64 with 64 random bits each, on the CPU."""
    if torch.compiler.is_compiling():
        # torch.compile does not support random_(). These are the same bits: randint's offset flips
        # a word's highest bit.
        return torch.randint(-(2**63), 2**63 - 1, (count,), device="cpu") ^ -(2**63)
    words = torch.empty(count, dtype=torch.int64, device="cpu")
    return words.random_(-(2**63), None, generator=generator)


def _are_positions_drawn(size: int, device: torch.device, share: float) -> bool:
    """Whether a mask of so many elements is positions."""
    # First, because a compiled or traced graph would hold what it compares of a size.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if size < POSITIONS_FROM or size >= 2**31 or share == 0 or share > POSITIONS_UP_TO:
        return False
    if device.type != "cpu":
        return False
    # A fake tensor has no values to count.
    return type(torch.empty(0)) is Tensor


def _draw_positions(size: int, share: float, generator: torch.Generator | None) -> Tensor:
    """Where Bernoulli trials of probability ``share`` succeed among ``size``: int32, ascending.

    The distance from one success to the next is geometric, so it is ceil(log(u) / log(1 - share))
    for a uniform u.

    The last position comes several times, so that two masks have one size: a checkpoint that keeps no
    state of the generator draws another mask in backward, and requires the sizes of forward.
    """
    expected = size * share
    # More than so many come once in a billion masks.
    count = int(expected + 6 * math.sqrt(expected)) + 8
    positions: list[Tensor] = []
    last = -1.0
    while True:
        uniform = torch.empty(count, dtype=torch.float32).uniform_(generator=generator)
        # A uniform number is a multiple of 2^-24, and 0 among them; the middle between two of them
        # has a logarithm. In float64 no processor's logarithm gives another distance.
        distances = uniform.double().add_(2.0**-25).log_().mul_(1 / math.log1p(-share)).ceil_()
        ends = distances.cumsum(0).add_(last)
        inside = int(torch.searchsorted(ends, size))
        if inside < count:
            last = float(ends[inside - 1]) if inside else last
            # Without a success there is no position to repeat.
            ends = ends[:0] if last < 0 else ends.clamp_(max=last)
            positions.append(ends.int())
            return positions[0] if len(positions) == 1 else torch.cat(positions)
        positions.append(ends.int())
        last = float(ends[-1])


def draw_dropout(x: Tensor, dropout_p: float, scaling: float) -> tuple[Tensor | None, float]:
    """The mask, None without dropout, and s' = scaling / (1 - p)."""
    if not dropout_p:
        return None, scaling
    mask, share = _draw(x.shape, x.device, dropout_p)
    return mask, scaling / (1 - share)


class Drawn(NamedTuple):
    """A mask, what gives it to backward again, and s' / scaling. Both are None if nothing is
    dropped.
    """

    mask: Tensor | None
    # The mask itself, or the state of a generator that draws it again.
    recipe: Tensor | None
    scale: float


NOT_DROPPED = Drawn(None, None, 1.0)


def draw_to_keep(x: Tensor, dropout_p: float) -> Drawn:
    """Draw x's mask, which is kept for backward as it is."""
    if not dropout_p:
        return NOT_DROPPED
    mask, share = _draw(x.shape, x.device, dropout_p)
    return Drawn(mask, mask, 1 / (1 - share))


def draw_from(x: Tensor, dropout_p: float, seed: Tensor) -> Drawn:
    """Draw x's mask, which is the same for one ``seed``, an int64 on the CPU of which the first word
    is read.
    """
    generator = torch.Generator(x.device)
    generator.manual_seed(int(seed.view(-1)[0]))
    mask, share = _draw(x.shape, x.device, dropout_p, generator)
    return Drawn(mask, mask, 1 / (1 - share))


def draw_for_backward(x: Tensor, dropout_p: float) -> Drawn:
    """Draw x's mask so that :func:`drawn_again` gives it to backward with little memory."""
    size = x.numel()
    share = drop_share(dropout_p)
    if _is_kept(size, x.device, share):
        return draw_to_keep(x, dropout_p)
    # A state and the words behind it are read by two calls, between which another thread may draw
    # from torch's generator. Then the words do not follow from the state, and others are drawn. The
    # generator is never set back: the other thread would get its numbers twice.
    generator = torch.Generator()
    while True:
        state = torch.get_rng_state()
        words = _random_words(_word_count(size), None)
        generator.set_state(state)
        if torch.equal(_random_words(1, generator), words[:1]):
            return Drawn(_bools_of(words, x.shape, share), state, 1 / (1 - share))


def _is_kept(size: int, device: torch.device, share: float) -> bool:
    """Whether :func:`draw_for_backward` keeps a mask of so many elements as it is."""
    # A compiled graph keeps no state of a generator, and a CUDA graph can't read it.
    if torch.compiler.is_compiling() or device.type != "cpu" or torch.jit.is_tracing():
        return True
    # Positions are small, and so are few bools: a state takes 5,056 bytes. A fake tensor has no
    # words to compare.
    is_fake = type(torch.empty(0)) is not Tensor
    return is_fake or _is_small(size) or _are_positions_drawn(size, device, share)


def drawn_again(recipe: Tensor | None, shape: Sequence[int], dropout_p: float) -> Tensor | None:
    """The mask that :func:`draw_for_backward` has drawn."""
    if recipe is None or recipe.dtype is not _STATE_DTYPE:
        return recipe
    generator = torch.Generator()
    generator.set_state(recipe)
    return _draw(shape, torch.device("cpu"), dropout_p, generator)[0]


# A mask applied.


def is_positions(mask: Tensor) -> bool:
    """Whether a mask is the positions of dropped elements."""
    return mask.dtype is torch.int32 or mask.dtype is torch.int64


def applicable(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as :func:`masked` and :func:`mask_` apply it with the least work, for several uses:
    int64 positions, or zeros and ones in ``dtype``.
    """
    if mask is None:
        return None
    return mask.long() if is_positions(mask) else _as_float(mask, dtype)


def _as_float(keep: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():
        # Inductor vectorizes both, and that of torch 2.11 has no view of a bool.
        return keep.to(dtype)
    # PyTorch vectorizes the conversion from uint8, but not from bool.
    return keep.view(torch.uint8).to(dtype)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """X ∘ keep, for a mask as it was drawn or :func:`applicable`."""
    if mask is None:
        return x
    if is_positions(mask):
        return x.reshape(-1).index_fill(0, mask.long(), 0).view(x.shape)
    if mask.dtype is torch.bool and not _is_small(mask.numel()):
        mask = _as_float(mask, x.dtype)
    return x * mask


def mask_(x: Tensor, mask: Tensor | None) -> Tensor:
    """x ∘ keep in place of x, which is contiguous. ``mask``: an :func:`applicable` one."""
    if mask is None:
        return x
    if is_positions(mask):
        x.view(-1).index_fill_(0, mask, 0)
        return x
    return x.mul_(mask)


def mask_of_rows(mask: Tensor | None, rows: slice, width: int) -> Tensor | None:
    """The mask of some ``rows`` of an X [M, ``width``]."""
    if mask is None or not is_positions(mask):
        return None if mask is None else mask[rows]
    start = rows.start * width
    bounds = torch.tensor([start, rows.stop * width], dtype=mask.dtype)
    first, end = torch.searchsorted(mask, bounds).tolist()
    in_rows: Tensor = mask[first:end] - start
    return in_rows
