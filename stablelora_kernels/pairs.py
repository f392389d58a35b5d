"""Find LoRA's (A, B) pairs by parameter names, in this library's layers and in PEFT's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeGuard

import torch
from torch import nn

# Matches our "q_proj.lora_A", PEFT's "q_proj.lora_A.default.weight" and a PEFT file's
# "q_proj.lora_A.weight".
_LORA_NAME = re.compile(
    r"^(?:(?P<prefix>.+)\.)?lora_(?P<role>[AB])(?:\.(?P<adapter>[^.]+))??(?:\.weight)?$"
)
# PEFT's name of an adapter in the name of one of its parameters: after LoRA's, and after those of
# modules_to_save and of trainable tokens.
_ADAPTER = re.compile(
    r"(?:^|\.)(?:lora_\w+|modules_to_save|trainable_tokens_\w+)\.(?P<adapter>[^.]+)"
)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, also where DeepSpeed's ZeRO has cut it, stage 3, and has left an
    empty placeholder.
    """
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@dataclass(frozen=True, eq=False, repr=False)
class LoRAPair:
    """One LoRA branch: W = W0 + s·B·A.

    Attributes:
        name: the layer's dotted name, then the adapter's name if the layer has named adapters, as
            in PEFT.
        A: [r, in_features].
        B: [out_features, r].

    Raises:
        ValueError: A and B are not two matrices of the same rank.
    """

    name: str
    A: torch.Tensor
    B: torch.Tensor

    def __post_init__(self) -> None:
        a, b = tuple(full_shape(self.A)), tuple(full_shape(self.B))
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ValueError(
                f"pair {self.name!r}: A must be [r, in] and B [out, r] with one r, got A {list(a)} and B {list(b)}"
            )

    def __repr__(self) -> str:
        a, b = [*full_shape(self.A)], [*full_shape(self.B)]
        return f"LoRAPair({self.name!r}, A {a}, B {b}, {self.A.dtype}, {self.A.device})"

    @property
    def r(self) -> int:
        """The rank."""
        return full_shape(self.A)[0]


def split_lora_name(name: str) -> tuple[str, str] | None:
    """``(pair name, "A" or "B")`` of a LoRA matrix's dotted name; None for any other name."""
    match = _LORA_NAME.match(name)
    if match is None:
        return None
    return _joined(match["prefix"], match["adapter"]), match["role"]


def _joined(*names: str | None) -> str:
    """A dotted name of ``names``, without the empty ones."""
    return ".".join(filter(None, names))


def other_half(role: str) -> Literal["A", "B"]:
    """ "B" of "A", and "A" of "B"."""
    return "B" if role == "A" else "A"


def layer_name(name: str) -> str:
    """The dotted name of a LoRA matrix's layer, without PEFT's adapter; any other name unchanged."""
    match = _LORA_NAME.match(name)
    return name if match is None else match["prefix"] or ""


def adapter_of(name: str) -> str | None:
    """The adapter that a PEFT model's parameter of this dotted name belongs to; None if it belongs
    to none.
    """
    match = _ADAPTER.search(name)
    return None if match is None else match["adapter"]


def is_named_parameter(item: object) -> TypeGuard[tuple[str, torch.Tensor]]:
    """Whether ``item`` is a tuple (name, tensor)."""
    if not isinstance(item, tuple) or len(item) != 2:
        return False
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def is_stable(a_norm: float, b_norm: float) -> bool:
    """Whether a pair is stable by its norms now: ``a_norm`` = ||A||_F / n is at most ``b_norm`` =
    ||B||_F / m. At the first step that finds a pair stable, it latches.
    """
    return a_norm <= b_norm


def lora_pairs(source: nn.Module | Iterable[tuple[str, torch.Tensor]]) -> list[LoRAPair]:
    """The LoRA pairs of a model or of named parameters, in the order of the parameters.

    Works on this library's layers and on PEFT's. LoRA on embeddings (``lora_embedding_A``) and on
    convolutions (4-dimensional A) is outside the method and is not listed.

    Raises:
        ValueError: an A has no B, a B has no A, or their shapes do not fit.
        TypeError: ``source`` yields something other than (name, tensor).
    """
    named = source.named_parameters() if isinstance(source, nn.Module) else source
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for item in named:
        if not is_named_parameter(item):
            raise TypeError(
                f"source must be a module or give (name, parameter) tuples, got an item of type {type(item).__name__}"
            )
        name, parameter = item
        split = split_lora_name(name)
        if split is not None and len(full_shape(parameter)) == 2:
            halves.setdefault(split[0], {})[split[1]] = parameter
    for name, half in halves.items():
        if len(half) == 1:
            (role,) = half
            raise ValueError(
                f"pair {name!r} has lora_{role} {list(full_shape(half[role]))} but no lora_{other_half(role)}"
            )
    return [LoRAPair(name, half["A"], half["B"]) for name, half in halves.items()]


def stacked_experts(model: nn.Module) -> dict[str, int]:
    """By a pair's name, how many experts' pairs are stacked in it; pairs of single layers are left
    out.

    A [experts r, in] and B [out, experts r] are one pair to Stable-LoRA: they shrink and latch as
    one.
    """
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        count = getattr(module, "num_experts", 1)
        lora_A = getattr(module, "lora_A", None)
        # PEFT's wrappers of stacks, which have an A for each adapter.
        if count > 1 and isinstance(lora_A, nn.ModuleDict):
            counts |= {_joined(name, adapter): count for adapter in lora_A}
    return counts
