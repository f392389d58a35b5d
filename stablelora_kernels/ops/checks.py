"""Checks of the arguments of the functional API. An error names the argument and both values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import Stored

#: The dtypes of x. Only the PyTorch backend computes in float64.
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check(x: Tensor, projections: Sequence[Projection], base: Tensor | None, is_mlp: bool) -> None:
    """Check the operands of projections of x, of gate, up and down of an MLP, or of a lone branch onto ``base``."""
    if base is not None:
        _check_lone_branch(x, base, projections[0])
    elif is_mlp:
        _check_mlp(x, *projections)
    else:
        for p in projections:
            _check_projection(x, p)
            dtype, first = cast(Tensor, p.lora_A).dtype, cast(Tensor, projections[0].lora_A).dtype
            if dtype != first:
                raise TypeError(f"lora_As must have one dtype, got {first} and {dtype}")


def _check_projection(x: Tensor, p: Projection, of: str = "") -> None:
    """``of``: the projection's name before those of its operands, such as ``"gate."``."""
    weight, bias = p.weight, p.bias
    assert weight is not None
    if len(weight.shape) != 2:
        raise ValueError(f"{of}weight must be [N, K], got {list(weight.shape)}")
    n, k = weight.shape
    shaped = f"{of}weight {[n, k]}"
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., {k}] to fit {shaped}, got {list(x.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{of}bias must be {[n]} to fit {shaped}, got {list(bias.shape)}")
    _check_branch(x, p, n, k, shaped, of)
    if isinstance(weight, Tensor) and weight.dtype != x.dtype:
        raise TypeError(f"{of}weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"{of}bias must have x's dtype {x.dtype}, got {bias.dtype}")
    data = weight.data if isinstance(weight, Stored) else weight
    _check_devices(x, **{f"{of}weight": data, f"{of}bias": bias, f"{of}lora_A": p.lora_A, f"{of}lora_B": p.lora_B})


def _check_branch(x: Tensor, p: Projection, n: int, k: int, other: str, of: str = "") -> None:
    """Check that A and B fit N and K, which come from the tensor that ``other`` names, and that their dtypes fit x's.

    Without A and B, only x's dtype is checked.
    """
    lora_A, lora_B = p.lora_A, p.lora_B
    if lora_A is None or lora_B is None:
        _check_float(x)
        return
    if lora_A.dim() != 2 or lora_A.shape[1] != k or lora_A.shape[0] < 1:
        raise ValueError(f"{of}lora_A must be [r, {k}] with r >= 1 to fit {other}, got {list(lora_A.shape)}")
    if lora_B.dim() != 2 or lora_B.shape[0] != n or lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(
            f"{of}lora_B must be {[n, lora_A.shape[0]]} to fit {other} and {of}lora_A {list(lora_A.shape)}, "
            f"got {list(lora_B.shape)}"
        )
    _check_dtypes(x, lora_A, lora_B, of)


def _check_dtypes(x: Tensor, lora_A: Tensor, lora_B: Tensor, of: str = "") -> None:
    _check_float(x)
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"{of}lora_A and lora_B must have one dtype, got {lora_A.dtype} and {lora_B.dtype}")
    if lora_A.dtype != x.dtype and (lora_A.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(f"{of}lora_A and lora_B must be float32 or of x's dtype {x.dtype}, got {lora_A.dtype}")


def _check_float(x: Tensor) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be bfloat16, float16, float32 or float64, got {x.dtype}")


def _check_devices(x: Tensor, **tensors: Any) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _check_lone_branch(x: Tensor, base_out: Tensor, p: Projection) -> None:
    if base_out.dim() < 1 or x.dim() < 1 or base_out.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"base_out must be [..., N] with x's leading sizes to fit x {list(x.shape)}, got {list(base_out.shape)}"
        )
    _check_branch(x, p, base_out.shape[-1], x.shape[-1], f"base_out {list(base_out.shape)}")
    if base_out.dtype not in FLOAT_DTYPES:
        raise TypeError(f"base_out must be bfloat16, float16, float32 or float64, got {base_out.dtype}")
    _check_devices(x, base_out=base_out, lora_A=p.lora_A, lora_B=p.lora_B)


def _check_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection) -> None:
    _check_projection(x, gate, "gate.")
    assert gate.weight is not None and up.weight is not None and down.weight is not None
    (f, _), up_shape, down_shape = gate.weight.shape, list(up.weight.shape), list(down.weight.shape)
    wanted = list(gate.weight.shape)
    if up_shape != wanted:
        raise ValueError(f"up.weight must be {wanted} to fit gate.weight, got {up_shape}")
    _check_projection(x, up, "up.")
    if len(down_shape) != 2 or down_shape[1] != f:
        raise ValueError(f"down.weight must be [N, {f}] to fit gate.weight {wanted}, got {down_shape}")
    _check_projection(x.new_empty(0, f), down, "down.")
    dtypes: dict[str, torch.dtype] = {}
    for name, p in (("gate", gate), ("up", up), ("down", down)):
        if (p.lora_A is None) != (p.lora_B is None):
            missing, given = ("lora_A", "lora_B") if p.lora_A is None else ("lora_B", "lora_A")
            raise ValueError(f"{name}.{missing} must be given with {name}.{given}, or both must be None, got None")
        if p.lora_A is not None:
            dtypes[f"{name}.lora_A"] = p.lora_A.dtype
    if len({*dtypes.values()}) > 1:
        given = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"the projections' lora_A must have one dtype, got {given}")


def check_experts(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, transposed: bool
) -> None:
    """Check the operands of ``lora_experts``."""
    if weight.dim() != 3:
        raise ValueError(f"weight must be {'[E, K, N]' if transposed else '[E, N, K]'}, got {list(weight.shape)}")
    count, n, k = weight.transpose(1, 2).shape if transposed else weight.shape
    shaped = f"{'transposed ' if transposed else ''}weight {list(weight.shape)}"
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"x must be [T, {k}] to fit {shaped}, got {list(x.shape)}")
    if bias is not None and bias.shape != (count, n):
        raise ValueError(f"bias must be {[count, n]} to fit {shaped}, got {list(bias.shape)}")
    if lora_A.dim() != 3 or lora_A.shape[0] != count or lora_A.shape[2] != k:
        raise ValueError(f"lora_A must be [{count}, r, {k}] to fit {shaped}, got {list(lora_A.shape)}")
    if lora_B.shape != (wanted := (count, n, lora_A.shape[1])):
        raise ValueError(
            f"lora_B must be {list(wanted)} to fit {shaped} and lora_A {list(lora_A.shape)}, got {list(lora_B.shape)}"
        )
    _check_dtypes(x, lora_A, lora_B)
    _check_devices(x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B, offsets=offsets)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")
        if t is not None and t.requires_grad:
            raise ValueError(f"{name} must be frozen, got one that requires a gradient")
    _check_offsets(offsets, count, x.shape[0])


def _check_offsets(offsets: Tensor, count: int, rows: int) -> None:
    if offsets.shape != (count,):
        raise ValueError(f"offsets must be {[count]}, each expert's end, got {list(offsets.shape)}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, got {offsets.dtype}")
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        # Reading them would wait for the device.
        return
    ends = offsets.tolist()
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end < start:
            raise ValueError(f"offsets must not descend from 0 on, got {end} of expert {e} behind {start}")
    if ends and ends[-1] > rows:
        raise ValueError(f"offsets must end within the {rows} rows of x, got {ends[-1]}")
