"""Dropout's mask, and how it is drawn: a seed for the kernels, which store a bit an element, and a
bool tensor for the PyTorch path.
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
# A random 64-bit word gives so many elements 16 bits each.
_ELEMENTS_PER_WORD = 4

# On Triton.


def new_mask(x: Tensor, columns: int) -> Tensor:
    """Memory for the dropout mask of x's rows: int32 [M, ceil(columns / 32)], see
    ``reference.unpack_mask``.
    """
    return x.new_empty((row_count(x), -(-columns // 32)), dtype=torch.int32)


def draw_seed(device: torch.device, dropout_p: float) -> Tensor | None:
    """The seed of dropout's mask, None without dropout."""
    if not dropout_p:
        return None
    # It stays on the device: there is no synchronization, and a CUDA graph draws a new one at each
    # replay.
    return torch.randint(2**63 - 1, (1,), device=device)


def scalings_after_dropout(scalings: Sequence[float], dropout_p: float) -> tuple[float, ...]:
    """s' = scaling / (1 - p) of each projection, with the probability that the kernels drop by."""
    kept_share = 1 - drop_share(dropout_p)
    return tuple([scaling / kept_share for scaling in scalings])


# On the PyTorch path.


def _is_small(size: int) -> bool:
    """Whether a mask of so many elements takes its time for calls of operators, rather than for its
    elements.
    """
    return not torch.compiler.is_compiling() and size <= BERNOULLI_UP_TO


def draw_keep(x: Tensor, dropout_p: float) -> tuple[Tensor, float]:
    """Draw a bool keep-mask of x's shape from torch's generator. Return it with its exact dropout
    probability.
    """
    return _draw(x.shape, x.device, dropout_p)


def _draw(
    shape: Sequence[int],
    device: torch.device,
    dropout_p: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float]:
    """:func:`draw_keep` for a shape on a device, from ``generator`` or from torch's."""
    size = math.prod(shape)
    share = drop_share(dropout_p)
    if device.type != "cpu" or _is_small(size):
        keep = torch.empty(shape, dtype=torch.bool, device=device)
        return keep.bernoulli_(1 - share, generator=generator), share
    # On a CPU, bernoulli_ draws one double per element sequentially. 16 bits per element, four
    # elements per int64 word, are several times faster.
    words = _random_words(-(-size // _ELEMENTS_PER_WORD), generator)
    values = words.view(torch.int16)[:size].view(shape)
    return values >= round(share * 65536) - 32768, share


def _random_words(count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` int64 with 64 random bits each, on the CPU."""
    if torch.compiler.is_compiling():
        # torch.compile does not support random_(). These are the same bits: randint's offset flips
        # a word's highest bit.
        return torch.randint(-(2**63), 2**63 - 1, (count,), device="cpu") ^ -(2**63)
    words = torch.empty(count, dtype=torch.int64, device="cpu")
    return words.random_(-(2**63), None, generator=generator)


def draw_dropout(x: Tensor, dropout_p: float, scaling: float) -> tuple[Tensor | None, float]:
    """The keep-mask, None without dropout, and s' = scaling / (1 - p)."""
    if not dropout_p:
        return None, scaling
    keep, share = draw_keep(x, dropout_p)
    return keep, scaling / (1 - share)


class Drawn(NamedTuple):
    """A keep-mask, what gives it to backward again, and s' / scaling. Both are None if nothing is
    dropped.
    """

    keep: Tensor | None
    # The mask itself, or the state of a generator that draws it again.
    recipe: Tensor | None
    scale: float


NOT_DROPPED = Drawn(None, None, 1.0)


def draw_for_backward(x: Tensor, dropout_p: float) -> Drawn:
    """Draw x's keep-mask so that :func:`drawn_again` gives it to backward with as little memory as
    can be.
    """
    # A compiled graph keeps no state of a generator, and a CUDA graph can't read it.
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        keep, share = draw_keep(x, dropout_p)
        return Drawn(keep, keep, 1 / (1 - share))
    # Other threads draw from torch's generator too. A generator of the mask's own makes the mask
    # follow from the state alone, whatever they draw meanwhile; torch's generator then continues
    # behind it.
    state = torch.get_rng_state()
    generator = torch.Generator()
    generator.set_state(state)
    keep, share = _draw(x.shape, x.device, dropout_p, generator)
    torch.set_rng_state(generator.get_state())
    return Drawn(keep, state, 1 / (1 - share))


def drawn_again(recipe: Tensor | None, shape: Sequence[int], dropout_p: float) -> Tensor | None:
    """The keep-mask that :func:`draw_for_backward` has drawn."""
    if recipe is None or recipe.dtype == torch.bool:
        return recipe
    generator = torch.Generator()
    generator.set_state(recipe)
    return _draw(shape, torch.device("cpu"), dropout_p, generator)[0]


def as_float(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as zeros and ones."""
    # PyTorch vectorizes the conversion from uint8, but not from bool.
    return keep.view(torch.uint8).to(dtype)


def masked(x: Tensor, keep: Tensor | None) -> Tensor:
    """X ∘ keep."""
    if keep is None:
        return x
    if _is_small(keep.numel()):
        return x * keep
    return x * as_float(keep, x.dtype)
