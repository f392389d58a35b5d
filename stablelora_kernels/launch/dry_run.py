"""The launches of a call without the call: launchers get tensors of the meta device, without memory, or of another device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch import lora_branch, lora_linear, lora_linear_group, lora_linear_quantized, lora_mlp
from stablelora_kernels.quantized import FP8Weight, NF4Weight


def call_launches(
    device: Device, m: int, n: int, k: int, r: int, dtype: torch.dtype, lora_dtype: torch.dtype, dropout_p: float,
    forward_choice: Choice | None = None, backward_choice: Choice | None = None, where: str = "meta",
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """The forward's and the backward's launches of a call with a bias."""
    t = _call_tensors(m, n, k, r, dtype, lora_dtype, dropout_p, where)
    w = _zeros(where, n, k, of=dtype)
    forward = lora_linear.forward_launches(
        device, t.x, w, t.bias, t.a, t.b, t.s, t.y, t.seed, 1.0, dropout_p, forward_choice
    )
    backward = lora_linear.backward_launches(
        device, t.x, t.y, w, t.a, t.b, t.s, t.seed, *t.gradients(), scaling=1.0, dropout_p=dropout_p, choice=backward_choice
    )  # fmt: skip
    return forward, backward


def group_launches(
    device: Device, m: int, ns: Sequence[int], k: int, r: int, dtype: torch.dtype, lora_dtype: torch.dtype, dropout_p: float,
    where: str = "meta",
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """:func:`call_launches` for a projection group with ``ns`` output features."""
    t = [_call_tensors(m, n, k, r, dtype, lora_dtype, dropout_p, where) for n in ns]
    weights = [_zeros(where, n, k, of=dtype) for n in ns]
    lora_As, lora_Bs = [each.a for each in t], [each.b for each in t]
    seeds = [each.seed for each in t if each.seed is not None]
    scalings, x, ys = [1.0] * len(ns), t[0].x, [each.y for each in t]
    s = _zeros(where, m, r * len(ns), of=dtype)
    forward = lora_linear_group.forward_launches(
        device, x, weights, [each.bias for each in t], lora_As, lora_Bs, s, ys, seeds, scalings, dropout_p
    )
    parts = lora_linear_group.columns(s, [r] * len(ns))
    gradients = (torch.empty_like(x), [torch.empty_like(a) for a in lora_As], [torch.empty_like(b) for b in lora_Bs])
    backward = lora_linear_group.backward_launches(
        device, x, ys, weights, lora_As, lora_Bs, parts, seeds, scalings, dropout_p, *gradients
    )
    return forward, backward


def mlp_launches(
    device: Device, m: int, n: int, f: int, k: int, r: int | Sequence[int], dtype: torch.dtype, lora_dtype: torch.dtype,
    dropout_p: float, activation: str = "silu", where: str = "meta",
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """:func:`call_launches` for a gated MLP of n output features and f features between, without biases.

    ``r``: the rank, or those of gate, up and down, 0 for one without a branch.
    """
    sizes, ranks = ((f, k), (f, k), (n, f)), (r,) * 3 if isinstance(r, int) else tuple(r)
    t = [
        _call_tensors(m, *size, rank, dtype, lora_dtype, dropout_p, where)
        for size, rank in zip(sizes, ranks, strict=True)
    ]
    weights = [_zeros(where, *size, of=dtype) for size in sizes]
    lora_As, lora_Bs, seeds = [each.a for each in t], [each.b for each in t], [each.seed for each in t]
    x, g, u, y, s = t[0].x, t[0].y, t[1].y, t[2].y, _zeros(where, m, sum(ranks[:2]), of=dtype)
    given = (weights, [None] * 3, lora_As, lora_Bs, seeds, [1.0] * 3, dropout_p, activation)
    forward = lora_mlp.forward_launches(device, x, *given, y, g, u, s, t[2].s)
    of_a, of_b = ([torch.empty_like(each) if each.numel() else None for each in given] for given in (lora_As, lora_Bs))
    gradients = (torch.empty_like(x), of_a, of_b)
    backward = lora_mlp.backward_launches(
        device, x, torch.zeros_like(y), g, u, weights, lora_As, lora_Bs, s, t[2].s, seeds, [1.0] * 3, dropout_p, activation,
        *gradients,
    )  # fmt: skip
    return forward, backward


def branch_launches(
    device: Device, m: int, n: int, k: int, r: int, dtype: torch.dtype, lora_dtype: torch.dtype, dropout_p: float
) -> tuple[list[Any], list[Any]]:
    """:func:`call_launches` for the branch alone."""
    t = _call_tensors(m, n, k, r, dtype, lora_dtype, dropout_p, "meta")
    base = torch.empty_like(t.y)
    forward = lora_branch.forward_launches(device, base, t.x, t.a, t.b, t.s, t.y, t.seed, 1.0, dropout_p)
    backward = lora_branch.backward_launches(
        device, t.x, t.y, t.a, t.b, t.s, t.seed, *t.gradients(), scaling=1.0, dropout_p=dropout_p
    )
    return forward, backward


def quantized_launches(
    device: Device, m: int, n: int, k: int, r: int, dtype: torch.dtype, lora_dtype: torch.dtype, dropout_p: float,
    quantized: str | NF4Weight | FP8Weight, choice: Choice | None = None, where: str = "meta",
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """:func:`call_launches` for a weight, or one in ``"nf4"``, nested in bitsandbytes' usual blocks, or ``"fp8"``."""
    t = _call_tensors(m, n, k, r, dtype, lora_dtype, dropout_p, where)
    weight: NF4Weight | FP8Weight
    if not isinstance(quantized, str):
        weight = quantized
    elif quantized == "fp8":
        weight = FP8Weight(_zeros(where, n, k, of=torch.float8_e4m3fn), _zeros(where, n))
    else:
        blocks = -(-n * k // 64)
        packed, absmax = (_zeros(where, size, of=torch.uint8) for size in (-(-n * k // 2), blocks))
        nested = (_zeros(where, -(-blocks // 256)), _zeros(where, 256), _zeros(where), 256)
        weight = NF4Weight(packed, absmax, _zeros(where, 16), (n, k), 64, *nested)
    forward = lora_linear_quantized.forward_launches(
        device, t.x, weight.stored, t.bias, t.a, t.b, t.s, t.y, t.seed, 1.0, dropout_p, choice
    )
    backward = lora_linear_quantized.backward_launches(
        device, t.x, t.y, weight.stored, t.a, t.b, t.s, t.seed, *t.gradients(), 1.0, dropout_p, choice
    )
    return forward, backward


class _CallTensors(NamedTuple):
    """A call's tensors except the weight."""

    x: torch.Tensor
    bias: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    s: torch.Tensor
    y: torch.Tensor
    seed: torch.Tensor | None

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """New tensors for dX, dA and dB. Byte counts tell read tensors from written ones."""
        return torch.empty_like(self.x), torch.empty_like(self.a), torch.empty_like(self.b)


def _zeros(where: str, *size: int, of: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(size, dtype=of, device=where)


def _call_tensors(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, lora_dtype: torch.dtype, dropout_p: float, where: str
) -> _CallTensors:
    x, bias, s, y = (_zeros(where, *size, of=dtype) for size in ((m, k), (n,), (m, r), (m, n)))
    a, b = _zeros(where, r, k, of=lora_dtype), _zeros(where, n, r, of=lora_dtype)
    return _CallTensors(x, bias, a, b, s, y, _zeros(where, 1, of=torch.int64) if dropout_p else None)
