"""The Triton kernels of ``lora_linear`` for a quantized weight, as torch.library ops. ``ops/lora_linear.py`` calls them.

Their scaling is s' = scaling / (1 - p). ``layout`` is a ``quantized.Layout``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stablelora_kernels.dispatch import problem
from stablelora_kernels.ops.library import empty_gradients
from stablelora_kernels.ops.matmul import row_count
from stablelora_kernels.ops.plans import define_launches
from stablelora_kernels.ops.torch_path import as_matrix
from stablelora_kernels.quantized import Layout, Stored


def _fwd_fake(x, data, scales, layout, bias, lora_A, lora_B, seed, scaling, dropout_p, save_s):  # type: ignore[no-untyped-def]
    y = x.new_empty((*x.shape[:-1], Layout(*layout).n))
    return y, x.new_empty(row_count(x) if save_s else 0, lora_A.shape[0])


@define_launches(
    "lora_linear_quantized_fwd",
    "(Tensor x, Tensor data, Tensor[] scales, int[] layout, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, "
    "float scaling, float dropout_p, bool save_s) -> (Tensor, Tensor)",
    _fwd_fake,
)
def lora_linear_quantized_fwd(
    x: Tensor, data: Tensor, scales: Sequence[Tensor], layout: Sequence[int], bias: Tensor | None, lora_A: Tensor,
    lora_B: Tensor, seed: Tensor | None, scaling: float, dropout_p: float, save_s: bool,
) -> tuple[tuple[Tensor, Tensor], list[Any]]:  # fmt: skip
    from stablelora_kernels.launch.lora_linear_quantized import forward_launches

    results = y, s = _fwd_fake(x, data, scales, layout, bias, lora_A, lora_B, seed, scaling, dropout_p, save_s)
    weight = Stored(data, tuple(scales), Layout(*layout))
    kept = s if save_s else None
    given = (as_matrix(x), weight, bias, lora_A, lora_B, kept, as_matrix(y), seed, scaling, dropout_p)
    return results, forward_launches(problem.device_of(x.device), *given)


def _bwd_fake(x, grad, data, scales, layout, lora_A, lora_B, s, seed, scaling, dropout_p, need_a, need_b):  # type: ignore[no-untyped-def]
    return empty_gradients(grad, lora_A, lora_B, True, need_a, need_b)


@define_launches(
    "lora_linear_quantized_bwd",
    "(Tensor? x, Tensor grad, Tensor data, Tensor[] scales, int[] layout, Tensor lora_A, Tensor lora_B, Tensor? s, "
    "Tensor? seed, float scaling, float dropout_p, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def lora_linear_quantized_bwd(
    x: Tensor | None, grad: Tensor, data: Tensor, scales: Sequence[Tensor], layout: Sequence[int], lora_A: Tensor,
    lora_B: Tensor, s: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float, need_a: bool, need_b: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Any]]:  # fmt: skip
    from stablelora_kernels.launch.lora_linear_quantized import backward_launches

    results = dx, da, db = empty_gradients(grad, lora_A, lora_B, True, need_a, need_b)
    weight = Stored(data, tuple(scales), Layout(*layout))
    wanted = (as_matrix(dx), da if need_a else None, db if need_b else None)
    rows = None if x is None else as_matrix(x)
    given = (rows, as_matrix(grad), weight, lora_A, lora_B, s, seed, *wanted, scaling, dropout_p)
    return results, backward_launches(problem.device_of(grad.device), *given)
