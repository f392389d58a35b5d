"""The bytes that a gated MLP keeps for backward, tensor by tensor, for this library and others.

Sizes: M tokens, x of width K, the activation's width F, rank r. Adapters are float32, and all three projections have one.
Parameters do not count. ``arms.counted`` counts the same by hooks; tests compare the two.

The rows that this machine cannot count follow from source code: Liger's ``LigerSiLUMulFunction`` saves G and U
(src/liger_kernel/ops/swiglu.py), and Unsloth's ``LoRA_MLP`` saves x, G and U (unsloth/kernels/fast_lora.py). Unsloth's has no
dropout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch

FROZEN, PEFT, PEFT_LIGER, UNSLOTH = "frozen", "PEFT", "PEFT, Liger's SwiGLU", "Unsloth"
SEPARATE, PROJECTIONS, SEPARATE_LIGER = "apply_lora", "apply_lora, fuse_projections", "apply_lora, Liger's SwiGLU"
FUSED, ACCELERATED = "apply_lora, fuse_mlp", "accelerate_peft, fuse_mlp"
ARMS = (FROZEN, PEFT, PEFT_LIGER, UNSLOTH, SEPARATE, PROJECTIONS, SEPARATE_LIGER, FUSED, ACCELERATED)
# The groups of kept tensors, in the order in which tables and plots show them.
X, G, U, ACT, H, COPIES, MASKS, SMALL = "X", "G", "U", "act(G)", "H", "copies of X and H", "masks", "S, A and B"
GROUPS = (X, G, U, ACT, H, COPIES, MASKS, SMALL)

# Coefficients of "MK", "MF", "Mr", "r(K+F)" and "1".
Terms = Mapping[str, int]


class Sizes(NamedTuple):
    tokens: int
    width: int
    inner: int
    rank: int

    def bytes(self, terms: Terms) -> int:
        m, k, f, r = self
        return sum(
            count * {"MK": m * k, "MF": m * f, "Mr": m * r, "r(K+F)": r * (k + f), "1": 1}[unit]
            for unit, count in terms.items()
        )


def kept(arm: str, dtype: torch.dtype, dropout: bool, gpu: bool) -> dict[str, Terms]:
    """The terms of each group of tensors. On a GPU our layers run Triton's kernels, elsewhere PyTorch's operators.

    Raises:
        ValueError: the arm is unknown, or has no dropout.
    """
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(map(repr, ARMS))}, got {arm!r}")
    size = dtype.itemsize
    found: dict[str, Terms] = {G: {"MF": size}, U: {"MF": size}}
    if arm in (FROZEN, PEFT, SEPARATE, PROJECTIONS):
        # PyTorch's SiLU keeps its input, and the product both factors.
        found[ACT] = {"MF": size}
    if arm == FROZEN:
        return found
    if arm == UNSLOTH:
        if dropout:
            raise ValueError(f"dropout must be False for {UNSLOTH!r}, whose function has none, got True")
        return {X: {"MK": size}} | found
    if arm in (PEFT, PEFT_LIGER):
        return found | _peft(size, dropout, gpu)
    return found | _ours(arm, size, dropout, gpu)


def _peft(size: int, dropout: bool, gpu: bool) -> dict[str, Terms]:
    """PEFT casts each layer's input to the adapter's dtype; A's product keeps the cast, or what dropout made of it."""
    found: dict[str, Terms] = {SMALL: {"Mr": 3 * 4}}
    if dropout:
        # A GPU's dropout keeps a mask of bool, a CPU's the factor in float32. Gate and up draw one each.
        mask = 1 if gpu else 4
        return found | {COPIES: {"MK": 2 * 4, "MF": 4}, MASKS: {"MK": 2 * mask, "MF": mask}}
    if size == 4:
        return found | {X: {"MK": 4}, H: {"MF": 4}}
    return found | {COPIES: {"MK": 2 * 4, "MF": 4}}


def _ours(arm: str, size: int, dropout: bool, gpu: bool) -> dict[str, Terms]:
    found: dict[str, Terms] = {X: {"MK": size}}
    fused = arm in (FUSED, ACCELERATED)
    if not fused:
        found[H] = {"MF": size}
    small = Counter({"Mr": 3 * size})
    if not gpu and size != 4:
        # PyTorch's operators need A and B in x's dtype, cast once for forward and backward.
        small["r(K+F)"] = 3 * size
    if dropout and gpu:
        # Each projection's seed.
        found[MASKS] = {"1": 3 * 8}
    elif dropout:
        # The fused MLP draws its masks again, from three states of the CPU's generator.
        found[MASKS] = {"1": 3 * torch.get_rng_state().numel()} if fused else {"MK": 2, "MF": 1}
    return found | {SMALL: dict(small)}


def total(terms: Mapping[str, Terms]) -> Terms:
    """All groups together."""
    found: Counter[str] = Counter()
    for each in terms.values():
        found.update(each)
    return found


def in_words(terms: Terms) -> str:
    """The terms as a formula; single bytes are left out."""
    shown = [f"{terms[unit]} {unit}" for unit in ("MK", "MF", "Mr", "r(K+F)") if terms.get(unit)]
    return " + ".join(shown)
